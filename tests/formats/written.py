"""Images that our writers have made, and what the real tools say of them."""

import asyncio
import json
import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdsrv.formats.writer import ImageWriter, Plan
from tests.formats.images import Image

__all__ = ["MIB", "WRITTEN", "qemu_img", "qemu_size", "same_as", "write"]

MIB = 1 << 20
WRITTEN = (
    Image("one-sector", 512, ((0, 512),)),
    Image("odd", 100_001, ((0, 4096), (65_536, 10))),
    Image("hole", 64 * MIB),
    Image("full", 4 * MIB, ((0, 4 * MIB),)),
    Image("tail", 70 * MIB + 3, ((0, 100), (5 * MIB + 1000, 3 * MIB), (70 * MIB - 5, 8))),
    Image("last-byte", 33 * MIB, ((33 * MIB - 1, 1),)),
)


def qemu_img(*arguments: str | Path) -> str:
    """Run it; what it printed. Skips where it is not installed, but not in CI."""
    if shutil.which("qemu-img") is None:
        assert os.environ.get("CI") != "true", "CI is expected to have qemu-img"
        pytest.skip("qemu-img is not installed")
    command = ["qemu-img", *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def qemu_size(path: Path, kind: str) -> int:
    """The size of the disk, as QEMU sees it."""
    facts = json.loads(qemu_img("info", "-f", kind, "--output=json", path))
    size = facts["virtual-size"]
    assert isinstance(size, int)
    return size


def same_as(golden: bytes, path: Path, kind: str) -> None:
    """QEMU reads ``golden`` from it, opened with nothing but its format's name."""
    raw = path.with_suffix(".golden")
    raw.write_bytes(golden)
    qemu_img("compare", "-f", "raw", "-F", kind, raw, path)
    raw.unlink()


async def write(writer: ImageWriter, image: Image) -> bytes:
    """Write ``image`` the way the engine does; returns its golden content.

    Data comes in pieces of some granules, not all of them in the order they were asked for where
    the writer does not mind.
    """
    golden = image.golden()
    unit = writer.granularity
    granules = sorted(
        {
            number
            for offset, length in image.data
            for number in range(offset // unit, -(-(offset + length) // unit))
        }
    )
    ranges = [(number * unit, min(unit, image.size - number * unit)) for number in granules]
    await writer.open(image.size)
    await writer.begin(Plan(image.size, lambda: iter(ranges)))
    pieces = _pieces(ranges)
    if not writer.ordered:
        random.Random(image.name).shuffle(pieces)
    work = [writer.data(at, memoryview(golden)[at : at + length]) for at, length in pieces]
    if writer.ordered:
        for each in work:
            await each
    else:
        await asyncio.gather(*work)
    await writer.finish()
    return golden


def _pieces(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours together, up to 2 MiB or one granule."""
    pieces: list[tuple[int, int]] = []
    for offset, length in ranges:
        if pieces and sum(pieces[-1]) == offset and pieces[-1][1] + length <= 2 * MIB:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + length)
        else:
            pieces.append((offset, length))
    return pieces
