r"""Which format is this file? Magic numbers, strictest first; raw only when nothing else matches.

========== ============================ ==========
format     magic                        at
========== ============================ ==========
qcow2      ``QFI\xfb`` version 2, 3     0
qcow       ``QFI\xfb`` version 1        0
vhdx       ``vhdxfile``                 0
vmdk       ``KDMV`` ``COWD`` descriptor 0
           0xcafebabe (seSparse)
vdi        0xbeda107f little-endian     64
parallels  ``WithoutFreeSpace`` ...     0
luks       ``LUKS\xba\xbe``             0
qed        ``QED\0``                    0
vma        ``VMA\0``                    0
vhd        ``conectix``                 0 or end - 512
ova        tar, first member ``*.ovf``  0 and 257
xva        tar, first ``ova.xml``       0
gzip, xz, zstd                          0
========== ============================ ==========

A file with such a magic is never served as raw unless ``raw:`` says so: a guest that wrote a
qcow2 header into its raw disk could otherwise choose a backing file on the host.
"""

import os
import stat

from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import ImageFile

__all__ = ["FOOTER", "probe", "probe_file", "recognise"]

_AT_START = (
    (b"vhdxfile", "vhdx"),
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"\xbe\xba\xfe\xca\0\0\0\0", "vmdk"),
    (b"WithoutFreeSpace", "parallels"),
    (b"WithouFreSpacExt", "parallels"),
    (b"LUKS\xba\xbe", "luks"),
    (b"QED\0", "qed"),  # QEMU's old format, and Proxmox VE's archives: not served, but no disks
    (b"VMA\0", "vma"),
    (b"conectix", "vhd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x1f\x8b\x08", "gzip"),
)
_SKIPPABLE = b"\x2a\x4d\x18"
_VDI = (0xBEDA107F).to_bytes(4, "little")
FOOTER = 512
"""Bytes at the end of a VHD, and what is looked at of the beginning."""


def probe(path: str) -> str:
    """The format's short name, "raw" if no magic matches. Blocking; reads at most 1 KiB.

    Raises:
        DiskError: the file cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DiskError.from_os(path, error) from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return "raw"  # a device, or something that opening will explain
        return recognise(os.pread(fd, FOOTER, 0), os.pread(fd, 9, max(info.st_size - FOOTER, 0)))
    except OSError as error:
        raise DiskError.from_os(path, error) from error
    finally:
        os.close(fd)


def probe_file(file: ImageFile) -> str:
    """The same for a file that is open, or a part of one."""
    if file.device:
        return "raw"
    start = file.read_up_to(0, FOOTER)
    return recognise(start, file.read_up_to(max(file.size - FOOTER, 0), 9))


def recognise(start: bytes, footer: bytes) -> str:
    """What a disk that begins with ``start`` and whose last 512 bytes begin with ``footer`` is."""
    if start[:4] == b"QFI\xfb":
        return "qcow" if start[4:8] == (1).to_bytes(4, "big") else "qcow2"
    for magic, name in _AT_START:
        if start.startswith(magic):
            return name
    if start[1:4] == _SKIPPABLE and start[0] >> 4 == 5:  # pzstd's files begin so
        return "zstd"
    if start[64:68] == _VDI:
        return "vdi"
    if b"conectix" in {footer[:8], footer[1:]}:  # ancient footers have 511 bytes
        return "vhd"
    first = start[:100].partition(b"\0")[0]  # of a tar archive: its first member's name
    if first == b"ova.xml":
        return "xva"
    if start[257:262] == b"ustar" and first.lower().endswith(b".ovf"):
        return "ova"
    return "raw"
