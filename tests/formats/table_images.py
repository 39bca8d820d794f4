"""Images with a table of 1 MiB blocks (VDI, Parallels): their content, and what qemu makes of them.

::

    Image ── make ──> raw ── qemu-img convert ──> vdi, parallels
                                                     └── qemu-img map, convert ──> expectations
"""

import json
import subprocess
from pathlib import Path

from protocol.extents import ZERO
from tests.formats.images import Image

__all__ = ["CONTENTS", "converted", "mapped_by_qemu", "read_by_qemu", "states_only", "two_states"]

MIB = 1 << 20

CONTENTS = (
    Image("hole", 3 * MIB),
    Image("full", 2 * MIB, ((0, 2 * MIB),)),
    Image("scattered", 6 * MIB, ((MIB, 4096), (2 * MIB + 512, MIB), (5 * MIB, 512))),
    Image("odd-tail", 2 * MIB + 1536, ((MIB, 1), (2 * MIB + 1024, 512))),
    Image("odd-hole-tail", 2 * MIB + 512, ((MIB - 1, 2),)),
    Image("sector", 512, ((0, 512),)),
)


def qemu(*arguments: str) -> str:
    """Run a qemu tool; what it printed."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def converted(tmp_path: Path, image: Image, kind: str, *options: str) -> tuple[str, bytes]:
    """Path of the image in format ``kind``, and what it holds."""
    raw, path = str(tmp_path / f"{image.name}.raw"), str(tmp_path / f"{image.name}.{kind}")
    golden = image.make(raw)
    qemu("qemu-img", "convert", "-f", "raw", "-O", kind, *options, raw, path)
    return path, golden


def read_by_qemu(path: str, kind: str) -> bytes:
    """The whole content as qemu-img reads it."""
    raw = path + ".read"
    qemu("qemu-img", "convert", "-f", kind, "-O", "raw", path, raw)
    return Path(raw).read_bytes()


def mapped_by_qemu(path: str, kind: str) -> list[tuple[int, int, bool]]:
    """(offset, length, does it read as zeroes), neighbours merged."""
    answer = json.loads(qemu("qemu-img", "map", "--output=json", "-f", kind, path))
    return two_states([(e["start"], e["length"], e["zero"]) for e in answer])


def two_states(ranges: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    """Neighbours of the same state merged."""
    merged: list[tuple[int, int, bool]] = []
    for offset, length, zero in ranges:
        if merged and merged[-1][2] == zero:
            start, so_far, _ = merged.pop()
            merged.append((start, so_far + length, zero))
        else:
            merged.append((offset, length, zero))
    return merged


def states_only(states: bytes) -> list[tuple[int, int, bool]]:
    """The same of a state for every byte, as ``check_disk.extent_map`` gives them."""
    zeroes = states.translate(bytes(1 if state & ZERO else 0 for state in range(256)))
    found, at = [], 0
    while at < len(zeroes):
        end = zeroes.find(1 - zeroes[at], at)
        end = len(zeroes) if end < 0 else end
        found.append((at, end - at, bool(zeroes[at])))
        at = end
    return found
