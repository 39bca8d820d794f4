"""What is measured: every cell of the table, its load and its bar.

A *cell* is one load over one transport. Its name is what ``--cells`` matches::

    unix/randread-4k-qd16      transport / kind - block size - queue depth
    disk/randread-4k-qd16      the same over a Unix socket, nothing of it in memory
    tcp/copy-4conn             transport / nbdcopy, number of connections
    qcow2/read-2m-qd4          image, over a Unix socket / the same
    convert/qcow2-to-raw       nbdsrv copy beside qemu-img convert
    client/unix-4conn          nbdsrv copy beside nbdcopy, both from qemu-nbd to null:
    client/unix-library        nbdsrv.stream beside libnbd's Python module (in nbdcopy's column)

A *bar* is the ratio of medians, ours over the peer's, that a cell has to reach. TLS cells have
none, and those from the disk: all the time goes into the ciphers or the disk, they are there to be
seen.
"""

from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

__all__ = [
    "CELLS",
    "COMPRESSED",
    "DELAYED",
    "UNCOMPRESSED",
    "Cell",
    "Part",
    "Peer",
    "Transport",
    "select",
]


class Transport(StrEnum):
    UNIX = "unix"
    TCP = "tcp"
    TLS = "tls"


class Part(StrEnum):
    """What ``--part`` chooses; all but the last six make the table."""

    READS = "reads"
    WRITES = "writes"
    DISK = "disk"
    COPY = "copy"
    TLS = "tls"
    FORMATS = "formats"
    CONVERT = "convert"
    CLIENT = "client"
    COLD = "cold"
    IDLE = "idle"
    REPOSITORY = "repository"
    FOREIGN = "foreign"
    OVERLAY = "overlay"
    PROXY = "proxy"


class Peer(StrEnum):
    """The programs compared; a column of the table each. For ``CEILING`` see ``ceiling``.

    ``NBDCOPY`` is a client: ours is the other one, in the cells of ``Part.CLIENT``.
    """

    OURS = "nbdsrv"
    NBDKIT = "nbdkit"
    QEMU = "qemu-nbd"
    CEILING = "ceiling"
    NBDCOPY = "nbdcopy"

    def takes_part(self, part: Part, transport: Transport | None = None) -> bool:
        """The ceiling has one export, plain text and no limits, so not everything is for it."""
        if self is Peer.NBDCOPY or part is Part.CLIENT:
            return part is Part.CLIENT and self in {Peer.NBDCOPY, Peer.OURS}
        alone = part in {Part.READS, Part.DISK, Part.WRITES, Part.COPY}
        return self is not Peer.CEILING or (alone and transport is not Transport.TLS)


@dataclass(frozen=True, slots=True)
class Cell:
    """One load over one transport.

    ``rw`` is fio's name of the pattern, or ``copy`` for nbdcopy to ``null:``; ``depth`` is
    fio's queue depth, or nbdcopy's number of connections. ``image`` is what is served, see
    ``formats``, or "" for a raw image; of a conversion (``rw`` is ``convert``), from what to what.
    """

    part: Part
    transport: Transport
    rw: str
    block: str
    depth: int
    image: str = ""

    @property
    def name(self) -> str:
        if self.rw == "convert":
            return f"convert/{self.image.replace(' ', '-')}"
        if self.rw == "client":
            return f"client/{self.image or self.transport}-{self.depth}conn"
        if self.rw == "library":
            return f"client/{self.transport}-library"
        where = self._where
        if self.rw == "copy":
            return f"{where}/copy-{self.depth}conn"
        return f"{where}/{self.rw}-{self.block}-qd{self.depth}"

    @property
    def title(self) -> str:
        """The cell in words, as the README's table shows it."""
        if self.rw == "convert":
            return f"copy / qemu-img convert: {self.image}"
        if self.rw == "client":
            way = f"{self.transport} + 50 ms" if self.image == DELAYED else self.transport
            plural = "" if self.depth == 1 else "s"
            return f"client, {way}: qemu-nbd to null, {self.depth} connection{plural}"
        if self.rw == "library":
            return f"client library, {self.transport}: beside libnbd's for Python, 1 connection"
        where = self._where
        if self.rw == "copy":
            plural = "" if self.depth == 1 else "s"
            return f"{where}: nbdcopy to null, {self.depth} connection{plural}"
        size = self.block.replace("k", " KiB").replace("m", " MiB")
        order = "random" if self.rw.startswith("rand") else "sequential"
        verb = "write" if self.writes else "read"
        return f"{where}: {size} {order} {verb}, depth {self.depth}"

    @property
    def _where(self) -> str:
        return "disk" if self.cold else self.image or self.transport

    @property
    def cold(self) -> bool:
        """Is nothing of the image to be in memory?"""
        return self.part is Part.DISK

    @property
    def writes(self) -> bool:
        return self.rw.endswith("write")

    @property
    def unit(self) -> str:
        """``IOPS`` for 4 KiB requests, ``MB/s`` (10**6) for all others."""
        return "IOPS" if self.block == "4k" else "MB/s"

    def takes(self, peer: Peer) -> bool:
        """Is this cell for ``peer``? The ceiling serves what lies in a file as it is."""
        if not self.image or self.part is Part.CLIENT or peer is Peer.NBDCOPY:
            return peer.takes_part(self.part, self.transport)
        plain = self.rw != "convert" and self.image not in COMPRESSED
        return peer in {Peer.OURS, Peer.QEMU} or (peer is Peer.CEILING and plain)

    def bar(self, peer: Peer) -> float | None:
        """The ratio ours / ``peer`` this cell has to reach; None where there is no bar."""
        if self.part is Part.CLIENT:
            return 1.0 if peer is Peer.NBDCOPY else None
        if self.image:
            return self._bar_of_image() if peer is Peer.QEMU else None
        if self.transport is Transport.TLS or self.cold:
            return None
        if self.writes:
            return 1.0 if peer is Peer.NBDKIT else None
        if self.transport is Transport.UNIX:
            return {Peer.NBDKIT: 1.5, Peer.QEMU: 3.0}.get(peer)
        return 1.2 if peer is Peer.NBDKIT else None

    def _bar_of_image(self) -> float:
        if self.rw == "convert":
            return 1.0
        if self.image not in COMPRESSED:
            return 3.0
        return 1.5 if self.rw == "copy" else 2.0


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
FROM_DISK = [("randread", "4k", 1), ("randread", "4k", 16), ("randread", "64k", 16)]
COPIES = [("copy", "", 1), ("copy", "", 4)]
UNCOMPRESSED = ("qcow2", "vhd", "vhdx", "vmdk")
COMPRESSED = ("qcow2-zlib", "qcow2-zstd", "vmdk-stream")
COMPRESSED_READS = [("randread", "4k", 1), ("randread", "4k", 16), ("copy", "", 1)]
CONVERSIONS = ("qcow2 to raw", "raw to qcow2-zlib", "raw to qcow2-zstd")
ENCRYPTED = [("randread", "4k", 16), ("read", "256k", 8), ("copy", "", 1)]

DELAYED = "delayed"
"""A way to the server that takes 50 ms longer."""

PLAIN = (Transport.UNIX, Transport.TCP)

CELLS = [
    *(Cell(Part.READS, over, *load) for over in PLAIN for load in READS),
    *(Cell(Part.DISK, Transport.UNIX, *load) for load in FROM_DISK),
    *(Cell(Part.COPY, over, *load) for over in PLAIN for load in COPIES),
    *(Cell(Part.WRITES, over, *load) for over in PLAIN for load in WRITES),
    *(Cell(Part.TLS, Transport.TLS, *load) for load in ENCRYPTED),
    *(
        Cell(Part.FORMATS, Transport.UNIX, *load, image)
        for image in UNCOMPRESSED
        for load in [*READS, ("copy", "", 1)]
    ),
    *(
        Cell(Part.FORMATS, Transport.UNIX, *load, image)
        for image in COMPRESSED
        for load in COMPRESSED_READS
    ),
    *(Cell(Part.CONVERT, Transport.UNIX, "convert", "", 0, way) for way in CONVERSIONS),
    *(Cell(Part.CLIENT, over, "client", "", count) for over in PLAIN for count in (1, 4)),
    *(Cell(Part.CLIENT, Transport.UNIX, "client", "", count, DELAYED) for count in (1, 4)),
    *(Cell(Part.CLIENT, over, "library", "", 1) for over in PLAIN),
]


def select(parts: set[Part], pattern: str) -> list[Cell]:
    """The cells of ``parts`` whose name contains the glob ``pattern``, in the table's order."""
    return [c for c in CELLS if c.part in parts and fnmatchcase(c.name, f"*{pattern}*")]
