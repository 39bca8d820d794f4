"""Opening a compressed disk: blocks where the stream has them, unpacked once where it has none.

::

    gzip   bgzf members ──> blocks        anything else ──> checkpoints
    xz     several blocks ──> blocks      one huge block ──> temporary file
    zstd   several frames ──> blocks      one huge frame ──> temporary file

What is inside must be a raw disk. A compressed XVA is unpacked and opened; other formats are
refused: their readers need to seek in what here is a stream, and would be slow.
"""

from collections.abc import Callable

from nbdsrv.disk.disk import Disk
from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.compressed.bgzf import is_bgzf, survey_bgzf
from nbdsrv.formats.compressed.gzip import survey_gzip
from nbdsrv.formats.compressed.reader import CompressedDisk
from nbdsrv.formats.compressed.source import BlockSource, Survey
from nbdsrv.formats.compressed.spool import SpooledDisk, unpack
from nbdsrv.formats.compressed.xz import survey_xz
from nbdsrv.formats.compressed.zstd import survey_zstd
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.opening import Opening, open_file
from nbdsrv.formats.probe import FOOTER, probe_file, recognise
from nbdsrv.formats.turns import in_turns

__all__ = ["open_gzip", "open_xz", "open_zstd"]

ARCHIVES = frozenset({"ova", "xva"})


async def open_gzip(file: ImageFile, opening: Opening) -> Disk:
    """Open ``disk.img.gz``.

    Raises:
        CorruptImage: the stream is broken, or cut short.
        UnsupportedImage: what is inside is no raw disk.
    """
    surveys = [survey_bgzf, survey_gzip]
    if not await opening.workers.look_up(is_bgzf, file):
        del surveys[0]
    return await _open(file, opening, "gzip", *surveys)


async def open_xz(file: ImageFile, opening: Opening) -> Disk:
    """Open ``disk.img.xz``; raises like ``open_gzip``."""
    return await _open(file, opening, "xz", survey_xz)


async def open_zstd(file: ImageFile, opening: Opening) -> Disk:
    """Open ``disk.img.zst``; raises like ``open_gzip``."""
    return await _open(file, opening, "zstd", survey_zstd)


async def _open(
    file: ImageFile, opening: Opening, kind: str, *surveys: Callable[[ImageFile], Survey]
) -> Disk:
    workers = opening.workers
    source: BlockSource | None = None
    for survey in surveys:
        source = source or await in_turns(workers, survey(file))
    if source is not None:
        inside = await workers.run(_inside, source)
        _check_inside(file, inside)
        if inside == "raw":
            return CompressedDisk(workers, file, kind, source)
    unpacked = await in_turns(workers, unpack(file, kind), ImageFile.close)
    try:
        disk = await _open_unpacked(unpacked, opening, kind)
    except BaseException:
        unpacked.close()
        raise
    await workers.look_up(file.close)
    return disk


async def _open_unpacked(unpacked: ImageFile, opening: Opening, kind: str) -> Disk:
    inside = await opening.workers.look_up(probe_file, unpacked)
    _check_inside(unpacked, inside)
    if inside == "raw":
        return SpooledDisk(opening.workers, unpacked, kind)
    return await open_file(unpacked, inside, opening)


def _inside(source: BlockSource) -> str:
    """The format of what the blocks hold. Blocking."""
    end = source.read(max(source.size - FOOTER, 0), FOOTER)
    return recognise(source.read(0, FOOTER), end[:9])


def _check_inside(file: ImageFile, inside: str) -> None:
    if inside != "raw" and inside not in ARCHIVES:
        what = f"holds a {inside} image; only raw disks are served compressed, unpack it first"
        raise UnsupportedImage(f"{file.path}: {what}")
