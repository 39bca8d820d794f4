"""What every kind of repository is measured by: its first byte, and small reads.

The first byte counts from a client's connect to its data. Each round is a new server; that it
starts is not counted.
"""

import random
import time
from collections.abc import Callable

from conformance.benchmark.foreign.client import Reader
from conformance.benchmark.foreign.rows import OURS
from conformance.benchmark.report import BenchmarkError
from conformance.context import Context

__all__ = ["NAIVE", "NEAR", "READ", "first_byte_of", "rate_of", "served"]

READ = 4096
SECONDS = 3.0
NAIVE = "naive"
"""The column of a reader that decodes for each request and keeps nothing."""
NEAR = 64 << 20
"""What a guest that boots goes to and fro in."""


def first_byte_of(source: str, export: str) -> dict[str, float]:
    """A new server, and one read by a new client, in milliseconds."""
    with Context() as context:
        server = context.serve(source=source)
        start = time.perf_counter()
        with Reader(server.socket, export) as reader:
            data = reader.read(0, READ)
            took = time.perf_counter() - start
    if not any(data):
        raise BenchmarkError("the first block reads as zeroes")
    return {OURS: took * 1000}


def served(source: str, export: str, span: int) -> float:
    """Reads a second by a client of a new server, anywhere in the first ``span`` bytes."""
    with Context() as context:
        server = context.serve(source=source)
        with Reader(server.socket, export) as reader:
            return rate_of(lambda offset: reader.read(offset, READ), span)


def rate_of(read: Callable[[int], bytes], span: int) -> float:
    """Calls a second of ``read``, which gives READ bytes at an offset."""
    chance = random.Random(2)
    end = time.perf_counter() + SECONDS
    start, done = time.perf_counter(), 0
    while time.perf_counter() < end:
        data = read(chance.randrange(span // READ) * READ)
        if len(data) != READ:
            raise BenchmarkError(f"{len(data)} bytes instead of {READ}")
        done += 1
    return done / (time.perf_counter() - start)
