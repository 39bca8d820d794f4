"""Reading somebody else's export: pieces asked for together, and what to do when one fails.

::

    read_into |--------------------------------------------|
              | ask | ask | ask |  no room: one task each ..|     in flight, see ``nbd_depth``
                 |     |
                 |   EIO, dead twice  ──> taken apart (``nbd_salvage``)
               dead once ──> asked again on a new connection

Rule: nothing is received into a buffer once ``read_into`` has returned or was cancelled.
"""

import errno as os_errno
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from nbdsrv.errors import DiskError
from nbdsrv.net.client import Client, ConnectionLost
from nbdsrv.net.client_pending import Pending
from nbdsrv.source.nbd_depth import Depth
from nbdsrv.source.nbd_links import Incidents, Links
from nbdsrv.source.nbd_pieces import in_pieces
from nbdsrv.source.nbd_salvage import Salvage

__all__ = ["Reads", "whole_blocks"]


@dataclass(slots=True)
class Asked:
    """A piece on its way: where it belongs, and who has been asked for it."""

    offset: int
    view: memoryview
    client: Client
    pending: Pending


class Reads:
    """The READs of one disk. Belongs to one event loop.

    Attributes:
        reach: bytes that can be asked for: of a size that is no multiple of the server's smallest
            block the last ones cannot.
    """

    def __init__(
        self,
        links: Links,
        name: str,
        salvage: Salvage,
        incidents: Incidents,
        depth: Depth,
        aligned: int,
        piece: int,
    ) -> None:
        """``aligned``: what offsets and lengths are multiples of; ``piece``: bytes of one READ."""
        self._links = links
        self._name = name
        self._salvage = salvage
        self._incidents = incidents
        self._depth = depth
        self._aligned = aligned
        self._piece = piece
        self._size = links.terms.size
        self._block = links.terms.blocks.minimum
        self.reach = self._size // self._block * self._block

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` in pieces; on an error all before its offset is good."""
        length = len(buffer)
        # As many pieces as can be asked for now are: a task for each would cost more than it does.
        asked: deque[Asked] = deque()
        try:
            at, end = offset, offset + length
            while at < end:
                count = min(self._piece - at % self._piece, end - at)
                one = self._start(at, buffer[at - offset : at - offset + count])
                if one is None:
                    break
                asked.append(one)
                at += count
            while asked:
                await self._finish(asked)
        finally:
            for one in asked:
                one.client.abandon(one.pending)
                self._depth.leave(len(one.view))
        if at < end:
            await self._read_rest(at, buffer[at - offset :])

    def begin(self, offset: int, buffer: memoryview, done: Callable[[bool], None]) -> bool:
        """One piece, as ``Disk.begin_read``; whatever goes wrong, ``read_into`` mends it."""
        length, depth = len(buffer), self._depth
        if not 0 < length <= self._piece - offset % self._piece:
            return False
        if (offset | length) & (self._aligned - 1) or not depth.enter_now(length):
            return False

        def answered(good: bool) -> None:  # noqa: FBT001 - as ``done``
            if good:
                depth.answered(length)
            depth.leave(length)
            done(good)

        client = self._links.ready()
        if client is None or not client.begin_read(offset, buffer, answered):
            depth.leave(length)
            return False
        return True

    def _start(self, offset: int, view: memoryview) -> "Asked | None":
        """Ask for a piece, unless something has to be waited for."""
        length = len(view)
        if (offset | length) & (self._aligned - 1) or not self._depth.enter_now(length):
            return None
        with suppress(DiskError):  # it will be raised again by who waits for a connection
            client = self._links.ready()
            if client is not None and (pending := client.start_read(offset, view)) is not None:
                return Asked(offset, view, client, pending)
        self._depth.leave(length)
        return None

    async def _finish(self, asked: "deque[Asked]") -> None:
        """Wait for the first of them; if need be, it is asked for again."""
        one = asked[0]
        try:
            await one.client.answer(one.pending)
            self._depth.answered(len(one.view))
        except DiskError as error:
            failed: DiskError | None = error
        else:
            failed = None
        asked.popleft()
        self._depth.leave(len(one.view))
        if failed is not None:
            await self._mend(one.offset, one.view, failed)

    async def _read_rest(self, offset: int, buffer: memoryview) -> None:
        async def one(at: int, count: int) -> None:
            await self._read(at, buffer[at - offset : at - offset + count])

        await in_pieces(offset, len(buffer), self._piece, one, self._depth.bytes // self._piece)

    async def _read(self, offset: int, view: memoryview) -> None:
        """A piece; one that is not in whole blocks is read as a larger one and cut."""
        if offset + len(view) > self.reach:
            await self._read_to_reach(offset, view)
            return
        if not (offset | len(view)) & (self._aligned - 1):
            await self._read_whole(offset, view)
            return
        begin, end = whole_blocks(self._aligned, self._size, offset, len(view))
        block = memoryview(bytearray(end - begin))
        try:
            await self._read_whole(begin, block)
        except DiskError as error:
            bad = max(error.offset or 0, offset)
            if bad >= offset + len(view):  # only the surroundings are bad
                view[:] = block[offset - begin : offset - begin + len(view)]
                return
            view[: bad - offset] = block[offset - begin : bad - begin]
            raise type(error)(str(error), error.errno, bad) from error
        view[:] = block[offset - begin : offset - begin + len(view)]

    async def _read_to_reach(self, offset: int, view: memoryview) -> None:
        """proto.md wants sizes in whole blocks, "since otherwise, the client would be unable to
        access the final few bytes".
        """
        good = max(self.reach - offset, 0)
        if good:
            await self._read(offset, view[:good])
        text = f"{self._name}: its last {self._size - self.reach} bytes cannot be read"
        why = f"its size is no multiple of the {self._block} that its server reads at least"
        raise DiskError(f"{text}: {why}", os_errno.EINVAL, offset + good)

    async def _read_whole(self, offset: int, view: memoryview) -> None:
        try:
            await self._attempt(offset, view)
        except DiskError as error:
            await self._mend(offset, view, error)

    async def _attempt(self, offset: int, view: memoryview) -> None:
        length = len(view)
        await self._depth.enter(length)
        try:
            await self._links.ask(lambda client: client.read(offset, view))
            self._depth.answered(length)
        finally:
            self._depth.leave(length)

    async def _mend(self, offset: int, view: memoryview, error: DiskError) -> None:
        """A read has failed: once more on a new connection, then taken apart."""
        if isinstance(error, ConnectionLost):
            self._incidents.reread += 1
            try:
                await self._attempt(offset, view)
            except ConnectionLost as again:
                if again.errno == os_errno.ETIMEDOUT:
                    raise  # silent twice: asking for less would only take longer
            except DiskError as again:
                if again.errno != os_errno.EIO or _is_placed(again, offset):
                    raise
            else:
                return
        elif error.errno != os_errno.EIO or _is_placed(error, offset):
            raise error
        await self._salvage.read(offset, view)

    async def close(self) -> None:
        """Close the connection for bad places, if there is one."""
        await self._salvage.close()


def whole_blocks(block: int, size: int, offset: int, length: int) -> tuple[int, int]:
    """The range in whole blocks; a size that is none itself ends where it ends."""
    begin = offset // block * block
    end = min(-(-(offset + length) // block) * block, size)
    return begin, end


def _is_placed(error: DiskError, offset: int) -> bool:
    """Has the server said where exactly?"""
    return error.offset is not None and error.offset > offset
