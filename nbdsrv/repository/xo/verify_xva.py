"""Looking at an XVA.

::

    structure   every header of the archive; its disks are whole
    packs       also the MD5 beside it (``.xva.checksum``), or the tag of an encrypted one
    chunks      also every chunk of 1 MiB against the checksum that follows it in the archive

What is packed, encrypted or in a bucket goes through a temporary file for that.
"""

import hashlib
import re
from collections.abc import Generator

import xxhash

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.tar import Member, walk
from nbdsrv.formats.turns import in_turns
from nbdsrv.formats.xva.chunks import CHUNK, find_chunks
from nbdsrv.repository.damage import Check
from nbdsrv.repository.xo.layout import CHECKSUM
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.repository.xo.verify_blocks import CHUNKS, PACKS
from nbdsrv.repository.xo.xva import plain_archive
from nbdsrv.store.store import ObjectMissing

__all__ = ["verify_xva"]

PIECE = 4 << 20
MAX_CHECKSUM = 1024
_MD5 = re.compile(r"\$1\$[^$]*\$([0-9a-f]{32})")
_SUMS = {"xxhash": 16, "checksum": 40}


async def verify_xva(
    remote: Remote, path: str, deep: int, check: Check, workers: Workers
) -> set[str]:
    """Look at one archive; what could not be checked, a sentence each.

    Raises:
        CorruptImage: it is damaged.
        DiskError: it cannot be read.
    """
    unchecked: set[str] = set()
    check.objects += 1
    summed = deep >= PACKS and not remote.encrypted
    if summed and not await in_turns(workers, _md5(remote, path, check)):
        unchecked.add("an XVA without a .checksum file beside it has nothing to prove it whole")
    if deep < CHUNKS and (remote.tree.distant or remote.encrypted):
        unchecked.add("of XVAs that are encrypted or in a bucket only the beginning was looked at")
        return unchecked
    file = await plain_archive(remote, path, workers, unpacked=deep >= CHUNKS)
    if file is None:
        unchecked.add("packed XVAs were not unpacked; --level chunks does that")
        return unchecked
    try:
        await in_turns(workers, _whole(file))
        if deep >= CHUNKS and not await in_turns(workers, _chunks(file, check)):
            unchecked.add("some chunks of XVAs have no checksum in the archive")
    finally:
        await workers.look_up(file.close)
    return unchecked


def _md5(remote: Remote, path: str, check: Check) -> Generator[None, None, bool]:
    """Was there a checksum to compare with?"""
    try:
        raw = remote.tree.read(path + CHECKSUM, MAX_CHECKSUM)
    except ObjectMissing:
        return False
    said = _MD5.fullmatch(raw.decode("ascii", "replace").strip())
    if said is None:
        return False
    node = remote.tree.find(path)
    size, at = node.size if node is not None else 0, 0
    digest = hashlib.md5(usedforsecurity=False)
    while at < size:
        piece = remote.tree.read_range(path, at, min(PIECE, size - at))
        digest.update(piece)
        at += len(piece)
        check.read_bytes += len(piece)
        yield
    if digest.hexdigest() != said[1]:
        text = f"its MD5 is {digest.hexdigest()}, and {CHECKSUM} beside it says {said[1]}"
        raise CorruptImage(f"corrupt image: {remote.full(path)} at 0: {text}")
    return True


def _whole(file: ImageFile) -> Generator[None, None, None]:
    manifest, found = yield from find_chunks(file)
    for reference, vdi in manifest.vdis.items():
        end = found[reference].end if reference in found else 0
        if end != -(-vdi.size // CHUNK):
            text = f"{reference} of {vdi.size} bytes ends with chunk {end - 1}; it was cut short"
            raise file.corrupt(file.size, text)


def _chunks(file: ImageFile, check: Check) -> Generator[None, None, bool]:
    """Had all of them a checksum?"""
    before: Member | None = None
    checked, all_checked = True, True
    for member in walk(file):
        name, _, kind = member.name.partition(".")
        if kind in _SUMS and before is not None and name == before.name:
            _compare(file, before, member, kind)
            check.read_bytes += before.size
            checked = True
            yield
        elif kind not in _SUMS and "/" in member.name:
            all_checked = all_checked and checked
            before, checked = member, not member.size
    yield
    return all_checked and checked


def _compare(file: ImageFile, chunk: Member, member: Member, kind: str) -> None:
    if member.size != _SUMS[kind]:
        raise file.corrupt(member.position, f"{member.name} of {member.size} bytes")
    said = file.read(member.position, member.size, "a checksum").decode("ascii", "replace").lower()
    data = file.read(chunk.position, chunk.size, "a chunk")
    found = (
        xxhash.xxh64_hexdigest(data)
        if kind == "xxhash"
        else hashlib.sha1(data, usedforsecurity=False).hexdigest()
    )
    if found != said:
        raise file.corrupt(chunk.position, f"{chunk.name} is not what its checksum says")
