"""What is counted about clients, at next to no cost, and how long they waited.

::

    Tally      one client: bytes, requests          ints; += where a batch ends, never per request
    Measures   one export: its clients' waits       two histograms, fed by the loop alone

    quick reads    those of one turn now and then are timed (``Transmission.watch``); the others
                   cost nothing
    all else       is timed always: it waits for a disk, a thread or a table anyway

Buckets are a quarter of an octave wide, so that a percentile is right to within a tenth.

A wait begins when the server receives the request and ends when the reply is ready to be sent. What
a request waits in its socket while others are served is the loop's lag, which is measured apart.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["BUCKETS", "Histogram", "Measures", "Tally", "bucket_end", "percentile", "weighted"]

BUCKETS = 4 * 37
"""Up to 2^37 ns, two minutes; longer waits count as that."""


def _bucket(ns: int) -> int:
    """Four to an octave: the exponent and the two bits below the first."""
    if ns < 4:
        return 0
    exponent = ns.bit_length()
    return min(((exponent - 1) << 2) | ((ns >> (exponent - 3)) & 3), BUCKETS - 1)


def bucket_end(bucket: int) -> float:
    """Seconds below which all waits of a bucket are."""
    exponent, quarter = bucket >> 2, bucket & 3
    return (1 << exponent) * (5 + quarter) / 4 / 1e9


class Histogram:
    """How often something took how long. Not thread-safe.

    Attributes:
        counts: by bucket.
        total_s: seconds of all together.
    """

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.total_s = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """One wait more, or as many of the same length."""
        self.counts[_bucket(int(seconds * 1e9))] += times
        self.total_s += seconds * times


@dataclass(slots=True)
class Tally:
    """What one client moved so far; monotonic.

    Attributes:
        received: bytes taken from its socket since the handshake, requests included.
        sent: bytes given to it, reply headers included.
        reads: READ requests answered or begun.
        quick: those of them that needed no waiting.
        writes: WRITE requests.
        others: all other requests.
        refused: requests answered by an error at once, whatever they were.
    """

    received: int = 0
    sent: int = 0
    reads: int = 0
    quick: int = 0
    writes: int = 0
    others: int = 0
    refused: int = 0

    def add(self, other: "Tally") -> None:
        """Take over what somebody who left has moved."""
        self.received += other.received
        self.sent += other.sent
        self.reads += other.reads
        self.quick += other.quick
        self.writes += other.writes
        self.others += other.others
        self.refused += other.refused

    @property
    def requests(self) -> int:
        """All of them."""
        return self.reads + self.writes + self.others


@dataclass(slots=True)
class Measures:
    """What is known of one export.

    Attributes:
        quick: waits of reads answered within a turn, those of some turns only.
        reads: waits of all other reads.
        writes: of writes.
        others: of all else.
        departed: what clients moved who have left.
        failed: requests that ended in an error of the disk.
        attached: clients that ever came.
    """

    quick: Histogram = field(default_factory=Histogram)
    reads: Histogram = field(default_factory=Histogram)
    writes: Histogram = field(default_factory=Histogram)
    others: Histogram = field(default_factory=Histogram)
    departed: Tally = field(default_factory=Tally)
    failed: int = 0
    attached: int = 0


def weighted(sampled: Sequence[int], of: int, others: Iterable[int]) -> list[float]:
    """Buckets of everything: a sample ``of`` so many, and what was counted one by one."""
    seen = sum(sampled)
    scale = of / seen if seen else 0.0
    return [count * scale + other for count, other in zip(sampled, others, strict=True)]


def percentile(counts: Sequence[float], share: float) -> float | None:
    """Seconds within which ``share`` (0 to 1) of all ended; None if there were none."""
    total = sum(counts)
    if total <= 0:
        return None
    wanted, seen = total * share, 0.0
    for bucket, count in enumerate(counts):
        if count and seen + count >= wanted:
            begin = bucket_end(bucket - 1) if bucket else 0.0
            within = max(0.0, wanted - seen) / count
            return begin + (bucket_end(bucket) - begin) * within
        seen += count
    return bucket_end(BUCKETS - 1)
