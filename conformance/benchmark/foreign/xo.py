"""Xen Orchestra's VHD directories: the first byte, and small reads.

The first byte counts from a client's connect to its data: the listing of 100 points, their chains,
the tables of all, and one block. Each round is a new server; that it starts is not counted.

The *naive* reader unpacks a block for each request, as whoever does not keep blocks must; it has
no client and no server to cross.
"""

import brotli  # type: ignore[import-untyped]

from conformance.benchmark.foreign.rows import OURS, row
from conformance.benchmark.foreign.served import (
    NAIVE,
    NEAR,
    READ,
    first_byte_of,
    rate_of,
    served,
)
from conformance.benchmark.foreign.xo_made import BLOCK, DENSE, blocks_of, dense, sparse

__all__ = ["first_byte", "near_reads", "random_reads"]

EXPORT = "vm/disk@latest"


@row("xo: first byte, 1 TiB sparse, 100 points", "ms", bar=300)
def first_byte(cache: str) -> dict[str, float]:
    """A new server, and one read by a new client."""
    return first_byte_of(f"xo:{sparse(cache)}", EXPORT)


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
    ours = served(f"xo:{root}", EXPORT, span)
    files = blocks_of(root)

    def naive(offset: int) -> bytes:
        block, skip = divmod(offset, BLOCK)
        data = bytes(brotli.decompress(files[block].read_bytes()))
        return data[512 + skip : 512 + skip + READ]

    return {OURS: ours, NAIVE: rate_of(naive, span)}
