"""A file that lies in pieces, as a Disk.

::

    guest   | piece 0 | piece 1 | piece 2 | ...            ``Pieces``
    pages   |  BLOCK  | ABSENT: zeroes | BLOCK ...         256 MiB each
    tool    _piece(id)                                     fetched, opened, proven, in a thread
            _is_zero(id, size)                             told by the id alone: nothing is read

Pieces are as long as their tool made them, and are unpacked as a whole; one that a page's edge
cuts is unpacked for each half.

Adds ``nbdsrv:changed-since:POINT`` for the same file in other points, by comparing ids.
"""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.paged import PagedDisk
from nbdsrv.formats.probe import FOOTER, recognise
from nbdsrv.repository.comparing import MAX_OTHERS, announced
from nbdsrv.repository.pieces import Pieces
from nbdsrv.repository.repository import CHANGED_SINCE, Point
from protocol.extents import ExtentList
from protocol.terms import BlockSizes

__all__ = ["PiecesDisk", "content_of"]

PAGE = 256 << 20
PREFERRED = 1 << 20
"""What reads are best aligned to: about a piece."""

_SKIP_BITS = 32
_SKIP = (1 << _SKIP_BITS) - 1
_GAP = -1


def content_of(pieces: Pieces, piece: Callable[[bytes], bytes]) -> str:
    """What a file begins like: a format's name, or "raw"; "unknown" if that cannot be read.

    Blocking. Reads the first piece.
    """
    index, begin, end = next(pieces.between(0, 1), (-1, 0, 0))
    if index < 0 or end - begin < FOOTER:
        return "unknown"
    try:
        return recognise(piece(pieces.id(index))[:FOOTER], b"")
    except DiskError:
        return "unknown"


class PiecesDisk(PagedDisk):
    """A regular file of another tool's restore point, read-only."""

    page_span = PAGE

    def __init__(
        self,
        workers: Workers,
        name: str,
        point: Point,
        path: str,
        pieces: Pieces,
        content: str,
        others: Mapping[str, Callable[[], Pieces]],
        release: Callable[[], Awaitable[None]],
    ) -> None:
        """A disk.

        Args:
            workers: for everything that blocks.
            name: of the repository.
            point: whose it is.
            path: of the file: the disk's name.
            pieces: of the file.
            content: what the file begins like: ``content_of``.
            others: point to the pieces of its file of that name, blocking; from old to new.
            release: called once, when the disk is closed.
        """
        super().__init__(workers, f"{name}#{point.group}/{path}@{point.id}")
        self.size = pieces.size
        self.block_sizes = BlockSizes(preferred=PREFERRED)
        self.contexts = announced(others)
        self.repository = name
        self.point = point
        self.path = path
        self.pieces = pieces
        self._content = content
        self._others = others
        self._compared: OrderedDict[str, Pieces] = OrderedDict()
        self._release = release

    @property
    def facts(self) -> Mapping[str, object]:
        """The point and the file."""
        point = self.point
        facts: dict[str, object] = {
            "group": point.group,
            "disk": self.path,
            "point": point.id,
            "created": point.stamp,
            **self._own_facts(),
            "content": self._content,
        }
        if self._content not in {"raw", "unknown"}:
            facts["note"] = f"the bytes of the {self._content} file are served, not its disk"
        begin, end = self.pieces.gap
        if end > begin:
            facts["lost_bytes"] = end - begin
        return facts

    @abstractmethod
    def _own_facts(self) -> Mapping[str, object]:
        """What only this tool says of a point and a file."""

    # --- a tool's part, in threads -------------------------------------------------------------

    @abstractmethod
    def _piece(self, id_: bytes) -> bytes:
        """A piece, proven as far as its tool allows.

        Raises:
            DiskError: it cannot be read, or is damaged.
        """

    @abstractmethod
    def _is_zero(self, id_: bytes, size: int, *, repeated: bool) -> bool:
        """Is it known to be zeroes? ``repeated``: the same piece comes again at once."""

    # --- pages, in threads ---------------------------------------------------------------------

    def _read_page(self, offset: int, length: int) -> Iterable[Segment]:
        return self._segments_of(offset, offset + length)

    def _segments_of(self, offset: int, end: int) -> Iterator[Segment]:
        pieces = self.pieces
        last, zero = b"", False
        for index, begin, stop in pieces.between(offset, end):
            start, upto = max(begin, offset), min(stop, end)
            if index < 0:
                yield Segment(upto - start, Kind.BLOCK, _GAP)
                continue
            id_ = pieces.id(index)
            if id_ != last:
                repeated = index + 1 < len(pieces) and pieces.id(index + 1) == id_
                last, zero = id_, self._is_zero(id_, stop - begin, repeated=repeated)
            if zero:
                yield Segment(upto - start, Kind.ABSENT)
            else:
                yield Segment(upto - start, Kind.BLOCK, index << _SKIP_BITS | start - begin)

    def _decode(self, key: int) -> bytes:
        pieces = self.pieces
        if key == _GAP:
            assert pieces.missing is not None
            begin, end = pieces.gap
            where = f"corrupt repository: {self.repository}: {self.path}"
            text = f"{where}: piece {pieces.missing.hex()} is nowhere to be found"
            raise CorruptImage(f"{text}; bytes {begin} to {end} of the disk are lost")
        index, skip = key >> _SKIP_BITS, key & _SKIP
        data = self._piece(pieces.id(index))
        if len(data) != pieces.length(index):
            text = f"corrupt repository: {self.repository}: piece {pieces.id(index).hex()}"
            text = f"{text}: has {len(data)} bytes, not {pieces.length(index)}"
            raise CorruptImage(text)
        return data[skip:] if skip else data

    # --- changes -------------------------------------------------------------------------------

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """Allocation, and what differs from the file of that name in other points."""
        if not context.startswith(CHANGED_SINCE):
            return await super().status(context, offset, length)
        other = self._others.get(context.removeprefix(CHANGED_SINCE))
        if other is None:
            raise self._no_context(context)
        self._check(offset, length)
        theirs = await self._other(context, other)
        found = await self.workers.run(self.pieces.changes, theirs, offset, length)
        return ExtentList(offset, found)

    async def _other(self, context: str, other: Callable[[], Pieces]) -> Pieces:
        pieces = self._compared.get(context)
        if pieces is None:
            pieces = self._compared.setdefault(context, await self.workers.run(other))
            while len(self._compared) > MAX_OTHERS:
                self._compared.popitem(last=False)
        return pieces

    async def close(self) -> None:
        """Give memory back, and the repository if it was its last disk."""
        if self._closed:
            return
        await super().close()
        self._compared.clear()
        await self._release()
