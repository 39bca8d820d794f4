"""VHD directories as Xen Orchestra lays them out, made for measuring.

::

    a disk of 1 TiB, a full point and 99 deltas of one block each     sparse
    a disk of 512 MiB, one full point, all of it text-like            dense
"""

import json
import random
import shutil
import struct
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import brotli  # type: ignore[import-untyped]

__all__ = ["BLOCK", "DENSE", "POINTS", "SPARSE", "blocks_of", "dense", "sparse"]

BLOCK = 2 << 20
SPARSE = 1 << 40
POINTS = 100
DENSE = 512 << 20
_VM = "5d3ab0a5-0000-4000-8000-000000000001"
_VDI = "cccccccc-0000-4000-8000-000000000003"
_JOB = "aaaaaaaa-0000-4000-8000-000000000001"
_WORDS = [f"word{number} " for number in range(4000)]


def sparse(cache: str) -> Path:
    """A repository of 100 points of a disk of 1 TiB."""
    return _made(Path(cache) / "xo-sparse", SPARSE, POINTS)


def dense(cache: str) -> Path:
    """A repository of one point of a disk that is all data."""
    return _made(Path(cache) / "xo-dense", DENSE, 1)


def blocks_of(root: Path) -> list[Path]:
    """The files of the blocks of a repository's only disk, in the disk's order."""
    (top,) = root.glob("xo-vm-backups/*/vdis/*/*/data/*/blocks")
    return sorted(top.glob("*/*"), key=lambda path: (int(path.parent.name), int(path.name)))


def _made(root: Path, size: int, points: int) -> Path:
    done = root / "done"
    if done.exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    chance = random.Random(1)
    parent: str | None = None
    for number in range(points):
        stamp = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=number)).strftime(
            "%Y%m%dT%H%M%SZ"
        )
        count = size // BLOCK
        blocks = range(count) if points == 1 else {0, chance.randrange(count)}
        if number:
            blocks = {chance.randrange(1, count)}
        _point(root, stamp, parent, size, {block: _text(chance) for block in blocks})
        parent = stamp
    done.touch()
    return root


def _text(chance: random.Random) -> bytes:
    """2 MiB that pack to about a third, as a file system with text does."""
    piece = "".join(chance.choices(_WORDS, k=8000)).encode()
    return (piece * (BLOCK // len(piece) + 1))[:BLOCK]


def _point(root: Path, stamp: str, parent: str | None, size: int, blocks: dict[int, bytes]) -> None:
    vm = root / "xo-vm-backups" / _VM
    directory = vm / "vdis" / _JOB / _VDI
    data = directory / "data" / f"{stamp}.vhd"
    data.mkdir(parents=True)
    entries = size // BLOCK
    table = bytearray(entries)
    for block, content in blocks.items():
        table[block // 8] |= 0x80 >> block % 8
        path = data / "blocks" / str(block // 1000) / str(block % 1000)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(brotli.compress(b"\xff" * 512 + content, quality=0))
    (data / "chunk-filters.json").write_text('["brotli"]')
    for name, part in (
        ("bat", bytes(table)),
        ("header", _header(entries, parent)),
        ("footer", _footer(size, stamp, 4 if parent else 3)),
    ):
        (data / name).write_bytes(brotli.compress(part, quality=0))
    (directory / f"{stamp}.alias.vhd").write_text(f"data/{stamp}.vhd")
    said = {
        "version": "2.0.0",
        "mode": "delta",
        "vm": {"uuid": _VM, "name_label": "vm"},
        "vdis": {"OpaqueRef:1": {"uuid": str(_id(stamp)), "name_label": "disk"}},
        "vhds": {"OpaqueRef:1": f"vdis/{_JOB}/{_VDI}/{stamp}.alias.vhd"},
    }
    (vm / f"{stamp}.json").write_text(json.dumps(said))


def _id(stamp: str) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_URL, stamp)


def _footer(size: int, stamp: str, kind: int) -> bytes:
    raw = bytearray(512)
    struct.pack_into(">8sIIQI4sI4s", raw, 0, b"conectix", 2, 1 << 16, 512, 0, b"xo  ", 0, b"Wi2k")
    struct.pack_into(">QQHBBI", raw, 40, size, size, 65535, 16, 255, kind)
    raw[68:84] = _id(stamp).bytes
    return _summed(raw, 64)


def _header(entries: int, parent: str | None) -> bytes:
    raw = bytearray(1024)
    none = (1 << 64) - 1
    struct.pack_into(">8sQQIII", raw, 0, b"cxsparse", none, 1536, 1 << 16, entries, BLOCK)
    if parent is not None:
        raw[40:56] = _id(parent).bytes
        name = f"{parent}.alias.vhd".encode("utf-16-be")
        raw[64 : 64 + len(name)] = name
    return _summed(raw, 36)


def _summed(raw: bytearray, at: int) -> bytes:
    struct.pack_into(">I", raw, at, ~sum(raw) & 0xFFFFFFFF)
    return bytes(raw)
