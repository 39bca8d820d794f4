"""What is measured: every cell of the table, its load and its bar.

A *cell* is one load over one transport. Its name is what ``--cells`` matches::

    unix/randread-4k-qd16      transport / kind - block size - queue depth
    tcp/copy-4conn             transport / nbdcopy, number of connections

A *bar* is the ratio of medians, ours over the peer's, that a cell has to reach. TLS cells have
none: all the time goes into the ciphers, they are there to be seen.
"""

from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

__all__ = ["CELLS", "Cell", "Part", "Peer", "Transport", "select"]


class Transport(StrEnum):
    UNIX = "unix"
    TCP = "tcp"
    TLS = "tls"


class Part(StrEnum):
    """What ``--part`` chooses; the first four make the table."""

    READS = "reads"
    WRITES = "writes"
    COPY = "copy"
    TLS = "tls"
    COLD = "cold"
    IDLE = "idle"


class Peer(StrEnum):
    """The programs compared; a column of the table each. For the last see ``ceiling``."""

    OURS = "nbdsrv"
    NBDKIT = "nbdkit"
    QEMU = "qemu-nbd"
    CEILING = "ceiling"

    def takes_part(self, part: Part, transport: Transport | None = None) -> bool:
        """The ceiling has one export, plain text and no limits, so not everything is for it."""
        alone = part in {Part.READS, Part.WRITES, Part.COPY}
        return self is not Peer.CEILING or (alone and transport is not Transport.TLS)


@dataclass(frozen=True, slots=True)
class Cell:
    """One load over one transport.

    ``rw`` is fio's name of the pattern, or ``copy`` for nbdcopy to ``null:``; ``depth`` is
    fio's queue depth, or nbdcopy's number of connections.
    """

    part: Part
    transport: Transport
    rw: str
    block: str
    depth: int

    @property
    def name(self) -> str:
        if self.rw == "copy":
            return f"{self.transport}/copy-{self.depth}conn"
        return f"{self.transport}/{self.rw}-{self.block}-qd{self.depth}"

    @property
    def title(self) -> str:
        """The cell in words, as the README's table shows it."""
        if self.rw == "copy":
            plural = "" if self.depth == 1 else "s"
            return f"{self.transport}: nbdcopy to null, {self.depth} connection{plural}"
        size = self.block.replace("k", " KiB").replace("m", " MiB")
        order = "random" if self.rw.startswith("rand") else "sequential"
        verb = "write" if self.writes else "read"
        return f"{self.transport}: {size} {order} {verb}, depth {self.depth}"

    @property
    def writes(self) -> bool:
        return self.rw.endswith("write")

    @property
    def unit(self) -> str:
        """``IOPS`` for 4 KiB requests, ``MB/s`` (10**6) for all others."""
        return "IOPS" if self.block == "4k" else "MB/s"

    def bar(self, peer: Peer) -> float | None:
        """The ratio ours / ``peer`` this cell has to reach; None where there is no bar."""
        if self.transport is Transport.TLS:
            return None
        if self.writes:
            return 1.0 if peer is Peer.NBDKIT else None
        if self.transport is Transport.UNIX:
            return {Peer.NBDKIT: 1.5, Peer.QEMU: 3.0}.get(peer)
        return 1.2 if peer is Peer.NBDKIT else None


READS = [
    ("randread", "4k", 1),
    ("randread", "4k", 4),
    ("randread", "4k", 16),
    ("randread", "4k", 64),
    ("randread", "64k", 16),
    ("read", "256k", 8),
    ("read", "2m", 4),
]
WRITES = [("randwrite", "4k", 1), ("randwrite", "4k", 16), ("write", "256k", 8)]
COPIES = [("copy", "", 1), ("copy", "", 4)]
ENCRYPTED = [("randread", "4k", 16), ("read", "256k", 8), ("copy", "", 1)]

PLAIN = (Transport.UNIX, Transport.TCP)

CELLS = [
    *(Cell(Part.READS, over, *load) for over in PLAIN for load in READS),
    *(Cell(Part.COPY, over, *load) for over in PLAIN for load in COPIES),
    *(Cell(Part.WRITES, over, *load) for over in PLAIN for load in WRITES),
    *(Cell(Part.TLS, Transport.TLS, *load) for load in ENCRYPTED),
]


def select(parts: set[Part], pattern: str) -> list[Cell]:
    """The cells of ``parts`` whose name contains the glob ``pattern``, in the table's order."""
    return [c for c in CELLS if c.part in parts and fnmatchcase(c.name, f"*{pattern}*")]
