"""VMDK images: qemu-img makes what it can, the rest is laid out here byte by byte.

::

    golden   |data|hole|zeroes|data ... unaligned pieces ...|odd tail|
                |
    qemu-img convert / qemu-io ──> image.vmdk ──> qemu-img convert -O raw, qemu-img map
"""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nbdsrv.disk.disk import Disk
from protocol.extents import DATA, ZERO

__all__ = ["GOLDEN", "MIB", "golden", "qemu_img", "qemu_io", "qemu_map", "qemu_raw", "raw_file"]

MIB = 1 << 20
SUBFORMATS = (
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
)
"""All that qemu-img creates."""


def need(program: str) -> None:
    """Skip on a developer's machine without the program; CI must not skip."""
    if shutil.which(program) is None:
        assert os.environ.get("CI") != "true", f"CI is expected to have {program}"
        pytest.skip(f"{program} is not installed")


def qemu_img(*arguments: object) -> str:
    need("qemu-img")
    command = ["qemu-img", *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def qemu_io(path: Path, *commands: str, kind: str = "vmdk") -> None:
    need("qemu-io")
    given = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", kind, *given, str(path)], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done


def qemu_raw(path: Path, kind: str = "vmdk") -> bytes:
    """The content as qemu-img reads it."""
    raw = path.with_name(path.name + ".qemu-raw")
    qemu_img("convert", "-f", kind, "-O", "raw", path, raw)
    content = raw.read_bytes()
    raw.unlink()
    return content


def qemu_map(path: Path) -> list[tuple[int, int, bool, bool]]:
    """(start, length, data, zero) as qemu-img sees it, equal neighbours merged."""
    found: list[dict[str, Any]] = json.loads(qemu_img("map", "--output=json", "-f", "vmdk", path))
    merged: list[tuple[int, int, bool, bool]] = []
    for extent in found:
        start, length, data, zero = (extent[key] for key in ("start", "length", "data", "zero"))
        if merged and merged[-1][2:] == (data, zero):
            length += start - merged[-1][0]
            start = merged.pop()[0]
        merged.append((start, length, data, zero))
    return merged


def golden(size: int, seed: int = 1) -> bytes:
    """Random data, compressible data, zeroes written and never written, down to the odd tail."""
    chance = random.Random(seed)
    content = bytearray(size)
    at = 0
    while at < size:
        length = min(chance.choice((512, 4096, 65536, 200_000, 300_032)), size - at)
        kind = chance.randrange(4)
        if kind == 0:
            content[at : at + length] = chance.randbytes(length)
        elif kind == 1:
            content[at : at + length] = (chance.randbytes(64) * (length // 64 + 1))[:length]
        at += length
    content[-512:] = chance.randbytes(512)
    return bytes(content)


GOLDEN = golden(5 * MIB + 3 * 512)


def raw_file(path: Path, content: bytes) -> Path:
    """``content`` as a sparse raw file."""
    with open(path, "wb") as file:
        for at in range(0, len(content), 4096):
            piece = content[at : at + 4096]
            if piece.strip(b"\0"):
                file.seek(at)
                file.write(piece)
        file.truncate(len(content))
    return path


async def extents_of(disk: Disk) -> list[tuple[int, int, bool, bool]]:
    """Our map in the shape of ``qemu_map``."""
    merged: list[tuple[int, int, bool, bool]] = []
    at = 0
    while at < disk.size:
        for extent in await disk.extents(at, disk.size - at):
            state = (extent.flags == DATA, bool(extent.flags & ZERO))
            start = merged.pop()[0] if merged and merged[-1][2:] == state else at
            at += extent.length
            merged.append((start, at - start, *state))
    return merged
