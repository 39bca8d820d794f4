"""Where the chunks of an XVA's disks lie: one pass over the archive's headers.

::

    tar    ova.xml | Ref:2/00000000 | .xxhash | Ref:2/00000001 | .xxhash | Ref:2/00000007 | ...
    disk   chunk 0 | chunk 1 | ......... zeroes ......... | chunk 7 |          1 MiB each
    runs   (first 0, 2 chunks, at position, stride apart) (first 7, ...)

The first and the last chunk are always there, whatever they hold; others that are zero are left
out. A file of no bytes only keeps the connection alive while XAPI finds nothing to send.

Cost: two headers of 512 bytes are read for each MiB that is stored, some 35 microseconds, so 40 s
for a TiB. Chunks at equal distances share a run: the index is small unless the disk is in tatters.
"""

from array import array
from bisect import bisect_right
from collections.abc import Generator, Iterator

from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.tar import Member, walk
from nbdsrv.formats.xva.manifest import Manifest, read_manifest

__all__ = ["CHUNK", "Chunks", "find_chunks"]

CHUNK = 1 << 20
MAX_RUNS = 1 << 22
"""Runs of all disks together, 32 bytes each."""
MAX_DIGITS = 12
"""Of a chunk's number: exabytes."""
MEMBERS_A_STEP = 64


class Chunks:
    """The chunks of one disk.

    Attributes:
        count: how many there are.
        last_size: bytes in the last one.
        checksums: what kind of checksum lies beside them: ``xxhash``, ``checksum`` (SHA-1), "".
    """

    def __init__(self) -> None:
        self.count = 0
        self.last_size = 0
        self.checksums = ""
        self._firsts = array("Q")
        self._counts = array("Q")
        self._positions = array("Q")
        self._strides = array("Q")
        self._next = 0

    @property
    def runs(self) -> int:
        """How many runs of chunks at equal distances there are."""
        return len(self._firsts)

    @property
    def end(self) -> int:
        """The number behind the last chunk's."""
        return self._next

    def add(self, file: ImageFile, number: int, position: int, size: int) -> None:
        """The next chunk.

        Raises:
            CorruptImage: it is out of order, or of a wrong size.
        """
        if number < self._next:
            raise file.corrupt(position, f"chunk {number} comes after chunk {self._next - 1}")
        if size > CHUNK or (self.count and self.last_size < CHUNK):
            raise file.corrupt(position, f"chunk {number} or the one before is not 1 MiB long")
        if not self._extend(number, position):
            self._firsts.append(number)
            self._counts.append(1)
            self._positions.append(position)
            self._strides.append(0)
        self.count += 1
        self.last_size = size
        self._next = number + 1

    def _extend(self, number: int, position: int) -> bool:
        """Does it continue the last run?"""
        if not self._firsts or number != self._next:
            return False
        count = self._counts[-1]
        stride = position - self._positions[-1] - (count - 1) * self._strides[-1]
        if count > 1 and stride != self._strides[-1]:
            return False
        self._strides[-1] = stride
        self._counts[-1] = count + 1
        return True

    def between(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """(number, position) of the chunks in a range of numbers."""
        index = max(bisect_right(self._firsts, first) - 1, 0)
        while index < len(self._firsts) and self._firsts[index] < end:
            start, stride = self._firsts[index], self._strides[index]
            for number in range(max(start, first), min(start + self._counts[index], end)):
                yield number, self._positions[index] + (number - start) * stride
            index += 1


def find_chunks(file: ImageFile) -> Generator[None, None, tuple[Manifest, dict[str, Chunks]]]:
    """The manifest, and the chunks of each disk by its reference. Blocking, step by step.

    Raises:
        CorruptImage: the archive is broken, or its chunks out of order.
        UnsupportedImage: its disk is in too many pieces.
    """
    members = walk(file)
    first = next(members, None)
    if first is None or first.name != "ova.xml":
        raise file.corrupt(0, "an XVA begins with ova.xml")
    manifest = read_manifest(file, first)
    found: dict[str, Chunks] = {}
    runs = 0
    for done, member in enumerate(members):
        chunks = found.get(member.name.partition("/")[0])
        before = chunks.runs if chunks is not None else 0
        chunks = _note(file, member, manifest, found)
        runs += chunks.runs - before if chunks is not None else 0
        if runs > MAX_RUNS:
            raise UnsupportedImage(f"{file.path}: its disks are in more than {MAX_RUNS} pieces")
        if not done % MEMBERS_A_STEP:
            yield
    return manifest, found


def _note(
    file: ImageFile, member: Member, manifest: Manifest, found: dict[str, Chunks]
) -> Chunks | None:
    """Add what a member is; None if it is nothing of a disk's."""
    reference, _, name = member.name.partition("/")
    digits, _, checksum = name.partition(".")
    if reference not in manifest.vdis or not digits.isascii() or not digits.isdigit():
        return None
    if len(digits) > MAX_DIGITS:
        raise file.corrupt(member.position, f"chunk {digits[:40]} of {reference}")
    chunks = found.setdefault(reference, Chunks())
    if checksum:
        chunks.checksums = checksum
    elif member.size:
        chunks.add(file, int(digits), member.position, member.size)
    return chunks
