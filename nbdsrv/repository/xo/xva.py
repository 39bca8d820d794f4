"""Points of mode "full": the whole VM in one XVA, a tar archive that may be packed and encrypted.

::

    ls      the beginning of the file ── deciphered ── unpacked ──> ova.xml: which disks there are
    open    plain file of this host                    served where it is
            packed (zstd, gzip)                        unpacked into a temporary file first
            encrypted, or in a bucket                  fetched into a temporary file first, and
                                                       proven as a whole before a byte is served

An encrypted XVA is one sealed message of any length: its tag says nothing before the last byte has
been read. Only the names of its disks are shown before that.
"""

import os
import tempfile
import zlib
from collections.abc import Generator, Mapping
from typing import cast

import zstandard

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.compressed.spool import unpack
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.opening import Opening, open_file
from nbdsrv.formats.tar import walk
from nbdsrv.formats.turns import in_turns
from nbdsrv.formats.xva.manifest import Manifest, read_manifest
from nbdsrv.formats.xva.reader import XvaDisk
from nbdsrv.repository.xo.records import DiskRecord, named
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.store.store import ObjectMissing

__all__ = ["open_xva_disk", "plain_archive", "xva_disks", "xva_kind"]

FIRST = 1 << 20
"""Bytes of an XVA looked at for its ova.xml; if they do not do, ``LAST``."""
LAST = 18 << 20
PIECE = 4 << 20
"""Bytes fetched at a time."""
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"


class _Beginning:
    """The first bytes of an archive, as what ``tar.walk`` reads."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path = path
        self.size = 1 << 62  # what lies behind is not looked at
        self._data = data

    def read(self, position: int, length: int, what: str) -> bytes:
        if position + length > len(self._data):
            raise self.corrupt(position, f"{what} is not within the first {len(self._data)} bytes")
        return self._data[position : position + length]

    def corrupt(self, position: int, what: str) -> CorruptImage:
        return CorruptImage(f"corrupt image: {self.path} at {position}: {what}")


def xva_kind(beginning: bytes) -> str:
    """``xva``, ``zstd`` or ``gzip``, by the first bytes of the (deciphered) file."""
    if beginning.startswith(_ZSTD):
        return "zstd"
    return "gzip" if beginning.startswith(_GZIP) else "xva"


def xva_disks(remote: Remote, path: str) -> tuple[tuple[DiskRecord, ...], str]:
    """The disks of an XVA by its ova.xml, and how it is packed. Blocking.

    Raises:
        CorruptImage: it is missing, or no XVA.
        StoreError: it cannot be read.
    """
    node = remote.tree.find(path)
    if node is None or node.directory:
        raise CorruptImage(f"corrupt image: {remote.full(path)} at 0: is missing")
    manifest, kind = None, ""
    for length in (FIRST, LAST):
        sealed = remote.tree.read_range(path, 0, min(length, node.size)) if node.size else b""
        raw = remote.sealing.peek(sealed)
        kind = xva_kind(raw)
        try:
            manifest = _manifest(remote.full(path), _unpacked(kind, raw, length))
        except CorruptImage:
            if length == LAST or node.size <= length:
                raise
        else:
            break
    assert manifest is not None
    found = []
    for ref, vdi in manifest.vdis.items():
        aliases = tuple(filter(None, (vdi.uuid, ref)))
        found.append(DiskRecord(vdi.label, path, vdi.size, aliases, ref, "", vdi.uuid))
    return named(found), kind


def _unpacked(kind: str, raw: bytes, limit: int) -> bytes:
    """As much of the beginning as there is. What is broken is found when it is parsed."""
    try:
        if kind == "zstd":
            with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(raw) as stream:
                return bytes(stream.read(limit))
        if kind == "gzip":
            return zlib.decompressobj(31).decompress(raw, limit)
    except (zstandard.ZstdError, zlib.error, MemoryError):
        return b""
    return raw


def _manifest(path: str, data: bytes) -> Manifest:
    file = cast("ImageFile", _Beginning(path, data))
    first = next(walk(file, 4), None)
    if first is None or first.name != "ova.xml":
        raise file.corrupt(0, "an XVA begins with ova.xml")
    return read_manifest(file, first)


async def open_xva_disk(
    remote: Remote, record: DiskRecord, workers: Workers, facts: Mapping[str, object]
) -> Disk:
    """Open a disk of an XVA. The Disk owns all that it needs.

    Args:
        remote: where it is.
        record: which disk of which XVA.
        workers: that read it.
        facts: of the point; without them an overlay would not know what it is over.

    Raises:
        CorruptImage: the archive is damaged, or cut short.
        DiskError: it cannot be read, or there is no room for a temporary file.
    """
    file = await _archive(remote, record.path, workers)
    try:
        kind = xva_kind(await workers.look_up(file.read_up_to, 0, 4))
        disk = await open_file(file, kind, Opening(workers, member=record.reference))
    except BaseException:
        file.close()
        raise
    if isinstance(disk, XvaDisk):
        disk.of_point = facts
    return disk


async def plain_archive(
    remote: Remote, path: str, workers: Workers, *, unpacked: bool
) -> ImageFile | None:
    """The archive, deciphered; unpacked too, or None if it is packed and is not to be.

    Raises:
        CorruptImage, DiskError: as ``open_xva_disk``.
    """
    file = await _archive(remote, path, workers)
    try:
        kind = xva_kind(await workers.look_up(file.read_up_to, 0, 4))
        if kind == "xva":
            return file
        found: ImageFile | None = None
        if unpacked:
            found = await in_turns(workers, unpack(file, kind), ImageFile.close)
    except BaseException:
        file.close()
        raise
    file.close()
    return found


async def _archive(remote: Remote, path: str, workers: Workers) -> ImageFile:
    if remote.tree.distant or remote.encrypted:
        return await in_turns(workers, _spool(remote, path), ImageFile.close)
    opened: list[ImageFile] = []
    try:
        await workers.look_up(_open, remote, path, opened)
    except BaseException:  # cancelled: it has been opened all the same
        for each in opened:
            each.close()
        raise
    return opened[0]


def _open(remote: Remote, path: str, opened: list[ImageFile]) -> None:
    try:
        fd = remote.tree.open_file(path)
    except ObjectMissing as error:
        raise CorruptImage(f"corrupt image: {remote.full(path)} at 0: is missing") from error
    assert fd is not None
    opened.append(ImageFile.from_descriptor(remote.full(path), fd))


def _spool(remote: Remote, path: str) -> Generator[None, None, ImageFile]:
    """Fetch and decipher all of it; proven when this ends. Blocking, step by step."""
    where = remote.full(path)
    node = remote.tree.find(path)
    size = node.size if node is not None else 0
    if not size:
        raise CorruptImage(f"corrupt image: {where} at 0: is missing, or empty")
    stream = remote.sealing.stream(size, where)
    try:
        with tempfile.TemporaryFile(buffering=0) as temporary:
            at, written = 0, 0
            while at < size:
                piece = remote.tree.read_range(path, at, min(PIECE, size - at))
                at += len(piece)
                data = stream.update(piece)
                while data:
                    count = os.pwrite(temporary.fileno(), data, written)
                    written, data = written + count, data[count:]
                yield
            stream.finish()
            fd = os.dup(temporary.fileno())
    except OSError as error:
        raise DiskError.from_os(f"fetching {where} into {tempfile.gettempdir()}", error) from error
    return ImageFile.from_descriptor(where, fd)
