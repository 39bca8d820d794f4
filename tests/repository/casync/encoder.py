"""Indexes and stores as desync and casync write them, from the description of the format alone.

For what the real casync does not make: chosen chunk boundaries, uncompressed stores, broken things.
Imports nothing of nbdsrv; little-endian.
"""

import gzip
import hashlib
import lzma
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import zstandard

__all__ = ["chunk_file", "content_id", "index", "put_chunk", "written"]

SHA512_256 = 0x2000000000000000
BASE = 0x9000000000000000


def content_id(data: bytes, digest: str = "sha512-256") -> bytes:
    return hashlib.new(digest.replace("-", "_"), data).digest()


def index(
    items: Sequence[tuple[int, bytes]],
    sizes: tuple[int, int, int],
    digest: str = "sha512-256",
) -> bytes:
    """``items``: (end, id) of each chunk."""
    flags = BASE | (SHA512_256 if digest == "sha512-256" else 0)
    head = struct.pack("<6Q", 48, 0x96824D9C7B129FF9, flags, *sizes)
    table = struct.pack("<2Q", 2**64 - 1, 0xE75B9E112F17417D)
    table += b"".join(struct.pack("<Q", end) + id_ for end, id_ in items)
    table += struct.pack("<5Q", 0, 0, 48, len(table) + 40, 0x4B4F050E5549ECD1)
    return head + table


def chunk_file(store: Path, id_: bytes, suffix: str = ".cacnk") -> Path:
    text = id_.hex()
    return store / text[:4] / (text + suffix)


def put_chunk(store: Path, data: bytes, how: str = "zstd", digest: str = "sha512-256") -> bytes:
    """Store a chunk; its id."""
    id_ = content_id(data, digest)
    pack: dict[str, Callable[[bytes], bytes]] = {
        "zstd": zstandard.ZstdCompressor().compress,
        "xz": lzma.compress,
        "gzip": gzip.compress,
        "none": bytes,
    }
    path = chunk_file(store, id_, "" if how == "none" else ".cacnk")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack[how](data))
    return id_


def written(
    path: Path,
    content: bytes,
    cuts: Sequence[int],
    *,
    sizes: tuple[int, int, int] = (1024, 4096, 16384),
    how: str = "zstd",
    digest: str = "sha512-256",
    store: str = "default.castr",
) -> Path:
    """An index of ``content`` cut at ``cuts`` (ends, ascending, the last is its length)."""
    items, start = [], 0
    for end in cuts:
        items.append((end, put_chunk(path.parent / store, content[start:end], how, digest)))
        start = end
    path.write_bytes(index(items, sizes, digest))
    return path
