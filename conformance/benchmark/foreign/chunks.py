"""PBS datastores and casync images: the first byte, and small reads.

The first byte counts from a client's connect to its data, as for Xen Orchestra: the listing of 100
points, the index of one (of PBS all of it is hashed), and one chunk.

The *naive* reader unpacks a chunk for each request and checks nothing; it has no client and no
server to cross. We check each chunk we unpack, and keep it.
"""

import struct
from bisect import bisect_right
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
from conformance.benchmark.foreign.rows import OURS, row
from conformance.benchmark.foreign.served import (
    NAIVE,
    NEAR,
    READ,
    first_byte_of,
    rate_of,
    served,
)

__all__ = [
    "casync_first_byte",
    "casync_near_reads",
    "casync_random_reads",
    "pbs_first_byte",
    "pbs_near_reads",
    "pbs_random_reads",
]

PBS_EXPORT = "vm/100/drive-scsi0@latest"
CASYNC_EXPORT = "vm1/disk@latest"
BLOB_HEADER = 12
INDEX_HEADER = 4096


@row("pbs: first byte, 1 TiB sparse, 100 points", "ms", bar=300)
def pbs_first_byte(cache: str) -> dict[str, float]:
    """A new server, and one read by a new client."""
    return first_byte_of(f"pbs:{pbs_sparse(cache)}", PBS_EXPORT)


@row("casync: first byte, 1 TiB sparse, 100 points", "ms", bar=300)
def casync_first_byte(cache: str) -> dict[str, float]:
    """The same."""
    return first_byte_of(f"casync:{casync_sparse(cache)}", CASYNC_EXPORT)


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
    ours = served(f"pbs:{root}", PBS_EXPORT, span)
    (index,) = root.glob("vm/100/*/*.fidx")
    digests = index.read_bytes()[INDEX_HEADER:]

    def naive(offset: int) -> bytes:
        number, skip = divmod(offset, PBS_CHUNK)
        name = digests[32 * number : 32 * number + 32].hex()
        raw = (root / ".chunks" / name[:4] / name).read_bytes()
        stream = zstandard.ZstdDecompressor().decompressobj()
        return stream.decompress(raw[BLOB_HEADER:])[skip : skip + READ]

    return {OURS: ours, NAIVE: rate_of(naive, span)}


def _casync(cache: str, span: int) -> dict[str, float]:
    root = casync_dense(cache)
    ours = served(f"casync:{root}", CASYNC_EXPORT, span)
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

    return {OURS: ours, NAIVE: rate_of(naive, span)}


def _unpacked(store: Path, name: str) -> bytes:
    raw = (store / name[:4] / f"{name}.cacnk").read_bytes()
    return zstandard.ZstdDecompressor().decompressobj().decompress(raw)
