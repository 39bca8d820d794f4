"""Images whose file is thinner than their tables say: ``preallocation=metadata``.

::

    L2      |=========== data ===========|     every cluster has its place
    file    |== data ==|...... hole .....|     but nothing was ever written there
    told    |== DATA ==|====== ZERO =====|

QEMU looks into the file for such images, and so do we: a copy of one would otherwise read
terabytes of nothing.
"""

import errno as os_errno
import os
import stat
from array import array
from collections.abc import Iterable, Iterator

from nbdsrv.errors import CorruptImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.qcow2.entries import words_of
from nbdsrv.formats.qcow2.header import Header

__all__ = ["is_thin", "without_holes"]

MAX_REFCOUNTS = 64 << 20
"""Bytes of refcounts looked at, of 2 TiB of 64 KiB clusters; some 0.3 s."""
MAX_PIECES = 1 << 14
"""Pieces that the segments of a page are cut into; what is left then counts as data."""

_DATA, _ZERO = int(Kind.DATA), int(Kind.ZERO)


def is_thin(file: ImageFile, header: Header) -> bool:
    """Does the image count many more clusters as used than its file has? Blocking.

    The question and the threshold are QEMU's. Refcounts that cannot be read answer it with no:
    reading the disk does not need them.
    """
    if file.device or file.base or header.has_data_file:
        return False
    info = os.fstat(file.fd)
    allocated = info.st_blocks * 512 >> header.cluster_bits
    threshold = max(allocated * 10 // 9, allocated + 2)
    if not stat.S_ISREG(info.st_mode) or file.size >> header.cluster_bits < threshold:
        return False
    try:
        return _has_used(file, header, threshold)
    except CorruptImage:
        return False


def _has_used(file: ImageFile, header: Header, threshold: int) -> bool:
    """Have at least ``threshold`` clusters a refcount?"""
    size = header.refcount_table_clusters << header.cluster_bits
    table = file.read(header.refcount_table_offset, size, "the refcount table")
    used = seen = 0
    for position in words_of(table):
        if used >= threshold or seen > MAX_REFCOUNTS:
            break
        if position:
            block = file.read(position, header.cluster_size, "a refcount block")
            used += _nonzero(block, header.refcount_order)
            seen += len(block)
    return used >= threshold


def _nonzero(block: bytes, order: int) -> int:
    """How many of its counts are not zero."""
    if order < 3:
        return sum(block.count(byte) * used for byte, used in enumerate(_USED[order]) if used)
    counts = array("BHIQ"[order - 3], block)
    return len(counts) - counts.count(0)


_USED = [
    [
        sum(bool(byte >> at & (1 << (1 << order)) - 1) for at in range(0, 8, 1 << order))
        for byte in range(256)
    ]
    for order in range(3)
]
"""For counts smaller than a byte: how many in a byte are not zero."""


def without_holes(file: ImageFile, segments: Iterable[Segment]) -> Iterator[Segment]:
    """The segments, with what is a hole in its file made ZERO. Blocking."""
    pieces = 0
    for segment in segments:
        if segment.kind != _DATA or pieces > MAX_PIECES:
            yield segment
            continue
        source = segment.file or file
        at, end = segment.position, segment.position + segment.length
        while at < end:
            data = min(_seek(source, at, os.SEEK_DATA), end)
            if data > at:
                yield Segment(data - at, _ZERO)
            at = data
            if at < end:
                hole = end if pieces > MAX_PIECES else _seek(source, at, os.SEEK_HOLE)
                hole = min(max(hole, at + 1), end)  # the file may be changing under us
                yield Segment(hole - at, _DATA, at, segment.file)
                at = hole
            pieces += 2


def _seek(file: ImageFile, at: int, whence: int) -> int:
    """Next data or hole; a file that does not tell is all data."""
    try:
        return os.lseek(file.fd, at, whence)
    except OSError as error:
        if error.errno == os_errno.ENXIO and whence == os.SEEK_DATA and at < file.size:
            return file.size
    return at if whence == os.SEEK_DATA else file.size
