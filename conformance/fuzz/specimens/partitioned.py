"""Disks with partition tables: by sfdisk, and a GPT of 4096-byte sectors, which sfdisk cannot make
before util-linux 2.40, by hand.
"""

import struct
import subprocess
from pathlib import Path

from conformance.fuzz.mending import mend_gpt
from conformance.fuzz.specimen import KIB, MIB, Specimen, guest_content
from conformance.process import find_program

__all__ = ["partition"]

SIZE = 3 * MIB
SPAN = 256 * KIB
"""Of a GPT's partitions, at 1 and 2 MiB."""

_MBR = """label: dos
unit: sectors
1 : start=64, size=128, type=83
2 : start=256, size=2048, type=5
5 : start=320, size=64, type=83
6 : start=512, size=64, type=83
7 : start=640, size=100, type=83
"""
_GPT = """label: gpt
unit: sectors
start=2048, size=512
start=4096, size=512
"""
_LINUX = bytes.fromhex("af3dc60f838472478e793d69d8477de4")


def partition(directory: Path) -> list[Specimen]:
    """MBR: a primary and a logical one; GPT with sectors of 512 and 4096 bytes."""
    made = [
        _by_sfdisk(directory, "mbr", _MBR, 1, 64 * 512, 128 * 512),
        _by_sfdisk(directory, "logical", _MBR, 7, 640 * 512, 100 * 512),
        _by_sfdisk(directory, "gpt", _GPT, 2, 2 * MIB, SPAN),
    ]
    disk = _disk(2 * MIB, SPAN)
    _write_gpt(disk, 4096, [(MIB, SPAN), (2 * MIB, SPAN)])
    return [*made, _specimen("gpt-4096", bytes(disk), 2, guest_content(SPAN))]


def _disk(start: int, length: int) -> bytearray:
    disk = bytearray(SIZE)
    disk[start : start + length] = guest_content(length)
    return disk


def _specimen(label: str, disk: bytes, number: int, inside: bytes) -> Specimen:
    source = f"raw:{{}}/{label}.img~p{number}"
    files = {f"{label}.img": disk}
    return Specimen("partition", label, files, source, inside, mend_gpt, known=inside)


def _by_sfdisk(
    directory: Path, label: str, table: str, number: int, start: int, length: int
) -> Specimen:
    path = directory / f"{label}.img"
    path.write_bytes(_disk(start, length))
    words = [find_program("sfdisk"), "--quiet", "--wipe", "never", str(path)]
    subprocess.run(words, input=table.encode(), check=True, capture_output=True, timeout=30)
    return _specimen(label, path.read_bytes(), number, guest_content(length))


def _write_gpt(disk: bytearray, sector: int, spans: list[tuple[int, int]]) -> None:
    """Protective MBR, both headers, both arrays of 128 entries; UEFI 2.10, 5.3."""
    last = len(disk) // sector - 1
    size, most = 128, 128
    array_sectors = size * most // sector
    entries = bytearray(size * most)
    for index, (start, length) in enumerate(spans):
        first, end = start // sector, (start + length) // sector - 1
        identity = bytes([index + 1]) * 16
        struct.pack_into("<16s16sQQ", entries, index * size, _LINUX, identity, first, end)
    disk[446:462] = b"\0\0\x02\0\xee\xff\xff\xff\x01\0\0\0" + last.to_bytes(4, "little")
    disk[510:512] = b"\x55\xaa"
    usable = (2 + array_sectors, last - array_sectors - 1)
    for here, there, array in ((1, last, 2), (last, 1, last - array_sectors)):
        header = struct.pack(
            "<8sIIIIQQQQ16sQIII",
            *(b"EFI PART", 0x10000, 92, 0, 0, here, there, *usable, b"d" * 16),
            *(array, most, size, 0),
        )
        disk[here * sector : here * sector + 92] = header
        disk[array * sector : array * sector + len(entries)] = entries
    mend_gpt(disk)
