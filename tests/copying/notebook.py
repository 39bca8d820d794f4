"""A writer that keeps what it is given, and fails the test if the contract is broken."""

import asyncio

from nbdsrv.formats.writer import ImageWriter, Plan

__all__ = ["Notebook"]


class Notebook(ImageWriter):
    """Writes into memory.

    Attributes:
        image: what would be read from it.
        data_calls: (offset, length) in the order they came.
        zero_calls: likewise.
        most: calls that were under way together.
        planned: the ranges of the plan.
        fate: "open", "begun", "finished" or "aborted"; "" before.
        fault: raised by ``data`` when it has been called this often, or None.
    """

    def __init__(
        self,
        *,
        ordered: bool = True,
        granularity: int = 1,
        seekable: bool = True,
        fresh: bool = True,
        before: bytes = b"",
        fault: tuple[int, Exception] | None = None,
    ) -> None:
        self.ordered = ordered
        self.granularity = granularity
        self.seekable = seekable
        self.fresh = fresh
        self.image = bytearray(before)
        self.fault = fault
        self.data_calls: list[tuple[int, int]] = []
        self.zero_calls: list[tuple[int, int]] = []
        self.planned: list[tuple[int, int]] = []
        self.fate = ""
        self.under_way = self.most = 0
        self._end = 0
        self._size = 0

    async def open(self, size: int) -> None:
        assert self.fate == ""
        self.fate = "open"
        self._size = size

    async def begin(self, plan: Plan) -> None:
        assert self.fate == "open"
        assert self._size == plan.size
        self.fate = "begun"
        self.planned = list(plan.data())
        assert self.planned == list(plan.data())
        self.image += bytes(max(0, plan.size - len(self.image)))

    async def data(self, offset: int, data: memoryview) -> None:
        self._check(offset, len(data))
        assert offset % self.granularity == 0
        end = offset + len(data)
        assert end % self.granularity == 0 or end == self._size
        assert any(s <= offset and end <= s + n for s, n in self.planned), "not in the plan"
        self.data_calls.append((offset, len(data)))
        if self.fault and len(self.data_calls) >= self.fault[0]:
            raise self.fault[1]
        await self._slowly()
        self.image[offset:end] = data

    async def zero(self, offset: int, length: int) -> None:
        self._check(offset, length)
        self.zero_calls.append((offset, length))
        await self._slowly()
        self.image[offset : offset + length] = bytes(length)

    def _check(self, offset: int, length: int) -> None:
        assert self.fate == "begun"
        assert length > 0
        assert offset + length <= self._size
        if self.ordered:
            assert self.under_way == 0, "two at a time"
            assert offset >= self._end, "not ascending"
            self._end = offset + length

    async def _slowly(self) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            for _ in range(len(self.data_calls) % 3):
                await asyncio.sleep(0)
        finally:
            self.under_way -= 1

    async def finish(self) -> None:
        assert (self.fate, self.under_way) == ("begun", 0)
        self.fate = "finished"

    async def abort(self) -> None:
        assert self.under_way == 0, "aborted while something was under way"
        if self.fate != "finished":
            self.fate = "aborted"
