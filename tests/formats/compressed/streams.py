"""Compressed disks, made by the tools people use.

::

    golden ── gzip, pigz, bgzip, xz, zstd, or by hand ──> disk.img.gz ...

What a stream is cut into differs: that is what each entry of STREAMS is about.
"""

import gzip
import lzma
import random
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import zstandard

__all__ = ["STREAMS", "Stream", "disk_content", "piped", "seek_table", "zstd_frames"]

KIB, MIB = 1 << 10, 1 << 20


def disk_content(size: int) -> bytes:
    """Random, compressible and zero ranges by turns; the same for the same size."""
    chance = random.Random(size)
    content = bytearray()
    while len(content) < size:
        length = chance.choice((4 * KIB, 100 * KIB, 300 * KIB, 700 * KIB))
        kind = chance.randrange(3)
        if kind == 0:
            content += chance.randbytes(length)
        elif kind == 1:
            content += (chance.randbytes(600) + bytes(2000)) * (length // 2600 + 1)
        else:
            content += bytes(length)
    return bytes(content[:size])


def piped(data: bytes, *command: str) -> bytes:
    """What a program makes of ``data``."""
    done = subprocess.run(command, input=data, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def seek_table(frames: list[tuple[int, int]], *, checksums: bool = False) -> bytes:
    """A table of (stored, unpacked) sizes, as zstd's seekable format has it."""
    extra = b"\0\0\0\0" if checksums else b""
    entries = b"".join(struct.pack("<II", *frame) + extra for frame in frames)
    footer = struct.pack("<IBI", len(frames), 0x80 if checksums else 0, 0x8F92EAB1)
    return struct.pack("<II", 0x184D2A5E, len(entries) + len(footer)) + entries + footer


def zstd_frames(data: bytes, length: int, *, sizes: bool = True) -> list[bytes]:
    """Frames of ``length`` bytes each; without ``sizes`` they do not tell it."""
    compressor = zstandard.ZstdCompressor(write_content_size=sizes, write_checksum=True)
    return [compressor.compress(data[at : at + length]) for at in range(0, len(data), length)]


def _seekable(data: bytes, *, checksums: bool) -> bytes:
    frames = zstd_frames(data, 200_000, sizes=checksums)
    lengths = [len(data[at : at + 200_000]) for at in range(0, len(data), 200_000)]
    table = seek_table(list(zip(map(len, frames), lengths, strict=True)), checksums=checksums)
    return b"".join(frames) + table


def _skippable(data: bytes) -> bytes:
    note = struct.pack("<II", 0x184D2A53, 5) + b"note!"
    return note + b"".join(frame + note for frame in zstd_frames(data, 300_000))


def _halves(data: bytes) -> tuple[bytes, bytes]:
    return data[: len(data) // 3], data[len(data) // 3 :]


def _two(data: bytes, compress: Callable[[bytes], bytes], between: bytes = b"") -> bytes:
    first, second = _halves(data)
    return compress(first) + between + compress(second)


@dataclass(frozen=True)
class Stream:
    """How a disk may be compressed, and what its index is made from then."""

    name: str
    kind: str
    index: str
    compress: Callable[[bytes], bytes]


STREAMS = (
    Stream("gzip", "gzip", "checkpoints", lambda d: piped(d, "gzip", "-c")),
    Stream("gzip-1", "gzip", "checkpoints", lambda d: piped(d, "gzip", "-1c")),
    Stream("pigz", "gzip", "checkpoints", lambda d: piped(d, "pigz", "-c", "-p2", "-b128")),
    Stream("gzip-stored", "gzip", "checkpoints", lambda d: gzip.compress(d, 0)),
    Stream("gzip-members", "gzip", "checkpoints", lambda d: _two(d, gzip.compress)),
    Stream("gzip-padded", "gzip", "checkpoints", lambda d: gzip.compress(d) + bytes(1000)),
    Stream("gzip-empty-member", "gzip", "checkpoints", lambda d: gzip.compress(b"") * 2 + gzip.compress(d)),  # noqa: E501
    Stream("bgzip", "gzip", "bgzf", lambda d: piped(d, "bgzip", "-c")),
    Stream("bgzip-and-gzip", "gzip", "checkpoints", lambda d: _two(d, lambda p: piped(p, "bgzip", "-c")) + gzip.compress(b"")),  # noqa: E501
    Stream("xz-blocks", "xz", "xz", lambda d: piped(d, "xz", "-c", "-1", "--block-size=300000")),
    Stream("xz-sha256", "xz", "xz", lambda d: piped(d, "xz", "-c", "-1", "-Csha256")),
    Stream("xz-unchecked", "xz", "xz", lambda d: lzma.compress(d, check=lzma.CHECK_NONE)),
    Stream("xz-crc32-x86", "xz", "xz", lambda d: piped(d, "xz", "-c", "-Ccrc32", "--x86", "--lzma2=preset=1")),  # noqa: E501
    Stream("xz-delta-blocks", "xz", "xz", lambda d: piped(d, "xz", "-c", "--block-size=1MiB", "--delta=dist=4", "--lzma2=preset=1")),  # noqa: E501
    Stream("xz-streams", "xz", "xz", lambda d: _two(d, lzma.compress, bytes(8)) + bytes(4)),
    Stream("xz-empty-stream", "xz", "xz", lambda d: lzma.compress(b"") + lzma.compress(d)),
    Stream("zstd", "zstd", "none", lambda d: piped(d, "zstd", "-c", "--no-check")),
    Stream("zstd-frames", "zstd", "frames", lambda d: b"".join(zstd_frames(d, 333_333))),
    Stream("zstd-skippable", "zstd", "frames", _skippable),
    Stream("zstd-seekable", "zstd", "seek table", lambda d: _seekable(d, checksums=True)),
    Stream("zstd-seekable-only", "zstd", "seek table", lambda d: _seekable(d, checksums=False)),
    Stream("zstd-without-sizes", "zstd", "none", lambda d: b"".join(zstd_frames(d, 500_000, sizes=False))),  # noqa: E501
)  # fmt: skip
