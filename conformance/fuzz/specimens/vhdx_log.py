"""A VHDX whose writer died: the last change stands only in the log.

::

    header   log guid != 0
    log      entry 1, sequence 7: 'desc' for the BAT's sector, 'zero' for another one
    BAT      as it was before: nothing present

A reader replays the log in memory; qemu replays it into a copy, and has to agree.
"""

import struct
from pathlib import Path

from conformance.fuzz.mending import mend_vhdx
from conformance.fuzz.specimen import KIB, MIB, Specimen, spread_content
from conformance.fuzz.specimens.hypervisors import Bench
from conformance.outcome import CheckFailedError
from conformance.process import run

__all__ = ["vhdx"]

SIZE = 3 * MIB
UNIT = 4096
SEQUENCE = 7
GUID = bytes(range(1, 17))
HEADERS = (64 * KIB, 128 * KIB)


def vhdx(directory: Path) -> list[Specimen]:
    """One entry with both kinds of descriptors."""
    bench = Bench(directory, spread_content(SIZE))
    bench.convert("vhdx", "clean.vhdx", "subformat=dynamic,block_size=1M,log_size=1M")
    data = bytearray((directory / "clean.vhdx").read_bytes())
    log = struct.unpack_from("<Q", data, HEADERS[0] + 72)[0]
    table = _table_position(data)
    changed = bytes(data[table : table + UNIT])
    data[table : table + UNIT] = bytes(UNIT)
    spare = len(data)
    data += b"\xee" * MIB  # zeroed by the log; nobody's block
    entry = _entry(len(data), [(table, changed)], [(spare, 64 * KIB)])
    data[log : log + len(entry)] = entry
    for at in HEADERS:
        data[at + 48 : at + 64] = GUID
    mend_vhdx(data)
    _prove(directory, bytes(data), bench.content)
    files = {"dirty.vhdx": bytes(data)}
    content = bench.content
    return [
        # qemu-img opens it read-only and then refuses: no second opinion.
        Specimen("vhdx", "dirty log", files, "vhdx:{}/dirty.vhdx", content, mend_vhdx, peer=False)
    ]


def _table_position(data: bytearray) -> int:
    """The BAT: the region whose kind begins with 2dc27766, in either order of the table."""
    for index in range(2):
        at = 192 * KIB + 16 + 32 * index
        if data[at : at + 4] == bytes.fromhex("6677c22d"):
            return int.from_bytes(data[at + 16 : at + 24], "little")
    raise CheckFailedError("qemu-img's VHDX has no BAT region")


def _entry(size: int, sectors: list[tuple[int, bytes]], zeroes: list[tuple[int, int]]) -> bytes:
    descriptors = b"".join(
        struct.pack("<4s4s8sQQ", b"desc", sector[-4:], sector[:8], where, SEQUENCE)
        for where, sector in sectors
    )
    descriptors += b"".join(
        struct.pack("<4sIQQQ", b"zero", 0, length, where, SEQUENCE) for where, length in zeroes
    )
    count = len(sectors) + len(zeroes)
    length = UNIT * (1 + len(sectors))
    header = struct.pack(
        "<4sIIIQII16sQQ", b"loge", 0, length, 0, SEQUENCE, count, 0, GUID, size, size
    )
    data = b"".join(
        struct.pack("<4sI", b"data", SEQUENCE >> 32)
        + sector[8:-4]
        + struct.pack("<I", SEQUENCE & 0xFFFFFFFF)
        for _, sector in sectors
    )
    return (header + descriptors).ljust(UNIT, b"\0") + data


def _prove(directory: Path, data: bytes, content: bytes) -> None:
    (directory / "replayed.vhdx").write_bytes(data)
    run(("qemu-img", "check", "-r", "all", "-f", "vhdx", "replayed.vhdx"), directory=directory)
    words = ("convert", "-f", "vhdx", "-O", "raw", "replayed.vhdx", "read.img")
    run(("qemu-img", *words), directory=directory)
    if (directory / "read.img").read_bytes() != content:
        raise CheckFailedError("qemu-img reads something else after replaying our log")
