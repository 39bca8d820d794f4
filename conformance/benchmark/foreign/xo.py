"""Xen Orchestra's VHD directories: the first byte, and small reads.

The first byte counts from a client's connect to its data: the listing of 100 points, their chains,
the tables of all, and one block. Each round is a new server; that it starts is not counted.

The *naive* reader unpacks a block for each request, as whoever does not keep blocks must; it has
no client and no server to cross.
"""

import random
import time
from collections.abc import Callable

import brotli  # type: ignore[import-untyped]

from conformance.benchmark.foreign.client import Reader
from conformance.benchmark.foreign.rows import OURS, row
from conformance.benchmark.foreign.xo_made import BLOCK, DENSE, blocks_of, dense, sparse
from conformance.benchmark.report import BenchmarkError
from conformance.context import Context

__all__ = ["first_byte", "near_reads", "random_reads"]

READ = 4096
SECONDS = 3.0
NAIVE = "naive"
NEAR = 64 << 20
"""What a guest that boots goes to and fro in."""


@row("xo: first byte, 1 TiB sparse, 100 points", "ms", bar=300)
def first_byte(cache: str) -> dict[str, float]:
    """A new server, and one read by a new client."""
    root = sparse(cache)
    with Context() as context:
        server = context.serve(source=f"xo:{root}")
        start = time.perf_counter()
        with Reader(server.socket, "vm/disk@latest") as reader:
            data = reader.read(0, READ)
            took = time.perf_counter() - start
    if not any(data):
        raise BenchmarkError("the first block reads as zeroes")
    return {OURS: took * 1000}


@row("xo: 4 KiB random reads, brotli, all of 512 MiB", "IOPS")
def random_reads(cache: str) -> dict[str, float]:
    """More than is kept in memory: most reads unpack a block."""
    return _compared(cache, DENSE)


@row("xo: 4 KiB random reads, brotli, within 64 MiB", "IOPS")
def near_reads(cache: str) -> dict[str, float]:
    """A working set that is kept unpacked."""
    return _compared(cache, NEAR)


def _compared(cache: str, span: int) -> dict[str, float]:
    root = dense(cache)
    with Context() as context:
        server = context.serve(source=f"xo:{root}")
        with Reader(server.socket, "vm/disk@latest") as reader:
            ours = _rate(lambda offset: reader.read(offset, READ), span)
    files = blocks_of(root)

    def naive(offset: int) -> bytes:
        block, skip = divmod(offset, BLOCK)
        data = bytes(brotli.decompress(files[block].read_bytes()))
        return data[512 + skip : 512 + skip + READ]

    return {OURS: ours, NAIVE: _rate(naive, span)}


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
