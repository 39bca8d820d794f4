"""PBS datastores and casync images: the first byte, and small reads.

The first byte counts from a client's connect to its data, as for Xen Orchestra: the listing of 100
points, the index of one (of PBS all of it is hashed), and one chunk.

The *naive* reader unpacks a chunk for each request and checks nothing; it has no client and no
server to cross. We check each chunk we unpack, and keep it.
"""

import random
import struct
import time
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import zstandard

from conformance.benchmark.foreign.chunks_made import (
    DENSE,
    PBS_CHUNK,
    casync_dense,
    casync_sparse,
    pbs_dense,
    pbs_sparse,
)
from conformance.benchmark.foreign.client import Reader
from conformance.benchmark.foreign.rows import OURS, row
from conformance.benchmark.report import BenchmarkError
from conformance.context import Context

__all__ = [
    "casync_first_byte",
    "casync_near_reads",
    "casync_random_reads",
    "pbs_first_byte",
    "pbs_near_reads",
    "pbs_random_reads",
]

READ = 4096
SECONDS = 3.0
NAIVE = "naive"
NEAR = 64 << 20
PBS_EXPORT = "vm/100/drive-scsi0@latest"
CASYNC_EXPORT = "vm1/disk@latest"
BLOB_HEADER = 12
INDEX_HEADER = 4096


@row("pbs: first byte, 1 TiB sparse, 100 points", "ms", bar=300)
def pbs_first_byte(cache: str) -> dict[str, float]:
    """A new server, and one read by a new client."""
    return _first_byte(f"pbs:{pbs_sparse(cache)}", PBS_EXPORT)


@row("casync: first byte, 1 TiB sparse, 100 points", "ms", bar=300)
def casync_first_byte(cache: str) -> dict[str, float]:
    """The same."""
    return _first_byte(f"casync:{casync_sparse(cache)}", CASYNC_EXPORT)


def _first_byte(source: str, export: str) -> dict[str, float]:
    with Context() as context:
        server = context.serve(source=source)
        start = time.perf_counter()
        with Reader(server.socket, export) as reader:
            data = reader.read(0, READ)
            took = time.perf_counter() - start
    if not any(data):
        raise BenchmarkError("the first chunk reads as zeroes")
    return {OURS: took * 1000}


@row("pbs: 4 KiB random reads, zstd, all of 512 MiB", "IOPS")
def pbs_random_reads(cache: str) -> dict[str, float]:
    """More than is kept in memory: most reads unpack a chunk of 4 MiB."""
    return _pbs(cache, DENSE)


@row("pbs: 4 KiB random reads, zstd, within 64 MiB", "IOPS")
def pbs_near_reads(cache: str) -> dict[str, float]:
    """A working set that is kept unpacked."""
    return _pbs(cache, NEAR)


@row("casync: 4 KiB random reads, zstd, all of 512 MiB", "IOPS")
def casync_random_reads(cache: str) -> dict[str, float]:
    """Chunks of 64 KiB on average."""
    return _casync(cache, DENSE)


@row("casync: 4 KiB random reads, zstd, within 64 MiB", "IOPS")
def casync_near_reads(cache: str) -> dict[str, float]:
    """A working set that is kept unpacked."""
    return _casync(cache, NEAR)


def _pbs(cache: str, span: int) -> dict[str, float]:
    root = pbs_dense(cache)
    ours = _served(f"pbs:{root}", PBS_EXPORT, span)
    (index,) = root.glob("vm/100/*/*.fidx")
    digests = index.read_bytes()[INDEX_HEADER:]

    def naive(offset: int) -> bytes:
        number, skip = divmod(offset, PBS_CHUNK)
        name = digests[32 * number : 32 * number + 32].hex()
        raw = (root / ".chunks" / name[:4] / name).read_bytes()
        stream = zstandard.ZstdDecompressor().decompressobj()
        return stream.decompress(raw[BLOB_HEADER:])[skip : skip + READ]

    return {OURS: ours, NAIVE: _rate(naive, span)}


def _casync(cache: str, span: int) -> dict[str, float]:
    root = casync_dense(cache)
    ours = _served(f"casync:{root}", CASYNC_EXPORT, span)
    table = (root / "vm1.caibx").read_bytes()[64:-40]
    items = list(struct.iter_unpack("<Q32s", table))
    ends = [end for end, _ in items]

    def piece(offset: int) -> bytes:
        number = bisect_right(ends, offset)
        data = _unpacked(root / "default.castr", items[number][1].hex())
        begin = ends[number - 1] if number else 0
        return data[offset - begin : offset - begin + READ]

    def naive(offset: int) -> bytes:
        data = piece(offset)
        while len(data) < READ:  # chunks are of any length
            data += piece(offset + len(data))[: READ - len(data)]
        return data

    return {OURS: ours, NAIVE: _rate(naive, span)}


def _unpacked(store: Path, name: str) -> bytes:
    raw = (store / name[:4] / f"{name}.cacnk").read_bytes()
    return zstandard.ZstdDecompressor().decompressobj().decompress(raw)


def _served(source: str, export: str, span: int) -> float:
    with Context() as context:
        server = context.serve(source=source)
        with Reader(server.socket, export) as reader:
            return _rate(lambda offset: reader.read(offset, READ), span)


def _rate(read: Callable[[int], bytes], span: int) -> float:
    chance = random.Random(2)
    end = time.perf_counter() + SECONDS
    start, done = time.perf_counter(), 0
    while time.perf_counter() < end:
        data = read(chance.randrange(span // READ) * READ)
        if len(data) != READ:
            raise BenchmarkError(f"{len(data)} bytes instead of {READ}")
        done += 1
    return done / (time.perf_counter() - start)
