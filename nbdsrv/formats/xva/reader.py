"""Reading one disk of an XVA, where it lies in the archive.

::

    disk.xva#Ref:2    disk.xva#root    disk.xva#1cf0caaf-64cb-...        one of several
    disk.xva                                                             the only one

Chunks are served from the archive as they are. Their checksums stay unverified: one covers a MiB
and would have to be computed for a read of 4 KiB; ``info`` says that there are some.

XAPI and Xen Orchestra export whole MiB: a disk may have grown by some zeroes at its end.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.mapped import MappedDisk
from nbdsrv.formats.opening import Opening
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.turns import in_turns
from nbdsrv.formats.xva.chunks import CHUNK, Chunks, find_chunks
from nbdsrv.formats.xva.manifest import Manifest, Vdi
from protocol.terms import BlockSizes

__all__ = ["XvaDisk", "open_xva"]

PAGE_CHUNKS = 4096
"""Chunks translated at a time: 4 GiB of disk."""
MAX_PREFERRED = 64 << 10
"""Bytes; a larger piece of a chunk is not cheaper to read."""
MAX_LISTED = 16
"""Disks that fit a message."""


class XvaDisk(MappedDisk):
    """One disk.

    Attributes:
        of_point: what the repository says of it that it is a restore point's disk in; for facts.
    """

    format = "xva"
    page_span = PAGE_CHUNKS * CHUNK

    def __init__(
        self, workers: Workers, file: ImageFile, manifest: Manifest, vdi: Vdi, chunks: Chunks
    ) -> None:
        super().__init__(workers, file)
        self.name = f"{file.path}#{vdi.reference}"
        self.size = vdi.size
        self.block_sizes = replace(BlockSizes(), preferred=MAX_PREFERRED)
        self._manifest = manifest
        self._vdi = vdi
        self._chunks = chunks
        self.of_point: Mapping[str, object] = {}

    @property
    def facts(self) -> Mapping[str, object]:
        """The machine, the disk, and all disks there are to choose from."""
        return {
            "machine": self._manifest.machine,
            "creator": self._manifest.product,
            "disk": self._vdi.reference,
            "name": self._vdi.label,
            "uuid": self._vdi.uuid,
            "chunks": self._chunks.count,
            "checksums": self._chunks.checksums or "none",
            "members": list(self._manifest.vdis),
            **self.of_point,
        }

    def _read_page(self, offset: int, length: int) -> Iterable[Segment]:
        return self._translate(offset, offset + length)

    def _translate(self, at: int, end: int) -> Iterator[Segment]:
        for number, position in self._chunks.between(at // CHUNK, -(-end // CHUNK)):
            start = number * CHUNK
            if start > at:
                yield Segment(start - at, Kind.ABSENT)
            at = min(start + CHUNK, end)
            yield Segment(at - start, Kind.DATA, position)
        if at < end:
            yield Segment(end - at, Kind.ABSENT)


async def open_xva(file: ImageFile, opening: Opening) -> Disk:
    """Open the disk ``opening.member`` names: by reference, UUID or name; or the only one.

    Reads every header of the archive: see ``chunks`` for what that costs.

    Raises:
        CorruptImage: the archive is broken, or cut short.
        DiskError: no such disk, or several and none named.
    """
    manifest, found = await in_turns(opening.workers, find_chunks(file))
    vdi = _choose(file, manifest, found, opening.member)
    chunks = found.get(vdi.reference, Chunks())
    _check(file, vdi, chunks)
    return XvaDisk(opening.workers, file, manifest, vdi, chunks)


def _choose(file: ImageFile, manifest: Manifest, found: Mapping[str, Chunks], member: str) -> Vdi:
    vdis = [vdi for vdi in manifest.vdis.values() if vdi.reference in found or not vdi.size]
    for named in (
        [vdi for vdi in vdis if member in {vdi.reference, vdi.uuid}],
        [vdi for vdi in vdis if member == vdi.label],
        [] if member else vdis,
    ):
        if len(named) == 1:
            return named[0]
    listed = [f"#{vdi.reference} ({vdi.label or vdi.uuid})" for vdi in vdis[:MAX_LISTED]]
    more = ", ..." if len(vdis) > MAX_LISTED else ""
    have = f"it has {', '.join(listed)}{more}" if vdis else "it has none"
    if not member:
        raise DiskError(f"{file.path}: which disk? {have}")
    raise DiskError(f"{file.path}: {member!r} is not one of its disks; {have}")


def _check(file: ImageFile, vdi: Vdi, chunks: Chunks) -> None:
    """Do the chunks make a disk of that size? A whole archive always has the last one."""
    wanted = -(-vdi.size // CHUNK)
    if chunks.end != wanted:
        what = f"{vdi.reference} of {vdi.size} bytes ends with chunk {chunks.end - 1}"
        raise file.corrupt(file.size, f"{what}, was the file cut short?")
    if chunks.count and chunks.last_size < vdi.size - (wanted - 1) * CHUNK:
        raise file.corrupt(file.size, f"the last chunk of {vdi.reference} is too short")
