"""An independent writer of virtnbdbackup's directories, from the format's description alone.

::

    made = Backups(path, size)
    made.full()                  golden is what the disk was at each point:
    made.change(4096, b"x" * 512)
    made.increment()             made.golden["virtnbdbackup.1"]
"""

import json
import random
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import lz4.frame

__all__ = ["BEGIN", "Backups", "compressed", "frame", "random_disk", "stream"]

BEGIN = datetime(2026, 11, 20, 3, 0, tzinfo=UTC)
KIB = 1 << 10
Extent = tuple[int, int, bytes | None]
"""Start, length, content; None for zeroes."""


def frame(kind: str, start: int, length: int) -> bytes:
    return f"{kind} {start:016x} {length:016x}\r\n".encode()


def compressed(data: bytes, *, linked: bool = True, block_sums: bool = True) -> bytes:
    """As virtnbdbackup does it, unless told otherwise."""
    return lz4.frame.compress(
        data, content_checksum=True, block_checksum=block_sums, block_linked=linked
    )


def stream(
    meta: dict[str, object],
    extents: list[Extent],
    *,
    max_request: int = 32 << 20,
    linked: bool = True,
    block_sums: bool = True,
) -> bytes:
    """A whole file."""
    head = json.dumps(meta, indent=4).encode()
    parts = [frame("meta", 0, len(head)), head, b"\r\n"]
    trailer: list[object] = []
    for start, length, data in extents:
        if data is None:
            parts.append(frame("zero", start, length))
            continue
        parts.append(frame("data", start, length))
        if not meta["compressed"]:
            parts += [data, b"\r\n"]
            continue
        if length < max_request:
            packed = [compressed(data, linked=linked, block_sums=block_sums)]
            trailer.append(len(packed[0]))
        else:
            pieces = [data[at : at + max_request] for at in range(0, length, max_request)]
            packed = [compressed(each, linked=linked, block_sums=block_sums) for each in pieces]
            sizes = [len(each) for each in packed]
            trailer.append({str(sum(sizes)): sizes})
        parts += [*packed, b"\r\n"]
    parts.append(frame("stop", 0, 0))
    if meta["compressed"]:
        text = json.dumps(trailer).encode()
        parts += [text, b"\r\n", frame("comp", 0, len(text))]
    return b"".join(parts)


def random_disk(size: int, seed: int = 1) -> bytearray:
    """Runs of holes, of text and of noise."""
    chance = random.Random(seed)
    disk = bytearray()
    while len(disk) < size:
        length = chance.randrange(1, 300) * KIB
        kind = chance.randrange(3)
        if kind == 0:
            disk += bytes(length)
        elif kind == 1:
            disk += (b"%08x lines of text " % chance.randrange(1 << 32)) * (length // 22 + 1)
        else:
            disk += chance.randbytes(length)
    return disk[:size]


@dataclass
class Backups:
    """A directory, and the disk as it goes on.

    Attributes:
        directory: that is written to.
        disk: its content now.
        target: its name.
        packed: are files compressed?
        golden: content by point.
        written: the last file.
    """

    directory: Path
    disk: bytearray
    target: str = "vda"
    packed: int | bool = False
    version: int = 2
    max_request: int = 32 << 20
    linked: bool = True
    block_sums: bool = True
    golden: dict[str, bytes] = field(default_factory=dict)
    count: int = 0
    dirty: set[int] = field(default_factory=set)
    hours: int = 0
    granularity: int = 4096
    written: Path = Path()

    def change(self, offset: int, data: bytes) -> None:
        """The guest writes."""
        self.disk[offset : offset + len(data)] = data
        last = offset + len(data) - 1
        self.dirty |= set(range(offset // self.granularity, last // self.granularity + 1))

    def full(self, level: str = "full") -> str:
        """Everything; holes as zero frames."""
        self.count, self.dirty = 0, set()
        point = "copy" if level == "copy" else "virtnbdbackup.0"
        self._write(f"{level}.data", self._allocated(), "virtnbdbackup.0", "", incremental=False)
        return self._is(point)

    def increment(self) -> str:
        """What has changed since the last checkpoint; a checkpoint."""
        self.count += 1
        name, parent = f"virtnbdbackup.{self.count}", f"virtnbdbackup.{self.count - 1}"
        self._write(f"inc.{name}.data", self._changed(), name, parent, incremental=True)
        self.dirty = set()
        return self._is(name)

    def offline(self) -> str:
        """What has changed since the last checkpoint, of a domain that is shut off."""
        name = f"virtnbdbackup.{self.count}"
        self._write(f"inc.{name}.data", self._changed(), name, name, incremental=True)
        return self._is(f"{name}+offline")

    def difference(self) -> str:
        """The same of one that runs; the checkpoint it names does not come to be."""
        name, parent = f"virtnbdbackup.{self.count + 1}", f"virtnbdbackup.{self.count}"
        mark = int((BEGIN + timedelta(hours=self.hours)).timestamp())
        self._write(f"diff.{mark}.data", self._changed(), name, parent, incremental=True)
        return self._is(f"diff.{mark}")

    def raw(self, level: str = "copy") -> None:
        """The image as it is."""
        self.written = self.directory / f"{self.target}.{level}.data"
        self.written.write_bytes(self.disk)

    def checksum(self) -> None:
        """The sum beside the last file."""
        beside = Path(f"{self.written}.chksum")
        beside.write_text(str(zlib.adler32(self.written.read_bytes())))

    def log(self, version: str, options: str = "") -> None:
        """What the tool says of the last backup."""
        began = BEGIN + timedelta(hours=self.hours - 1, seconds=-1)
        local = began.astimezone()
        name = f"backup.inc.{local:%m%d%Y%H%M%S}.log"
        text = f"INFO: Version: {version} Arguments: virtnbdbackup -d vm -l inc {options}\n"
        text += f"INFO: Write data to target file: [/somewhere/{self.written.name}.partial].\n"
        (self.directory / name).write_text(text)

    def _is(self, point: str) -> str:
        self.golden[point] = bytes(self.disk)
        return point

    def _write(
        self, name: str, extents: list[Extent], checkpoint: str, parent: str, *, incremental: bool
    ) -> None:
        date = (BEGIN + timedelta(hours=self.hours)).astimezone().replace(tzinfo=None)
        self.hours += 1
        meta = {
            "virtualSize": len(self.disk),
            "dataSize": sum(length for _, length, data in extents if data is not None),
            "date": date.isoformat(),
            "diskName": self.target,
            "diskFormat": "qcow2",
            "checkpointName": checkpoint,
            "compressed": self.packed,
            "compressionMethod": "lz4",
            "parentCheckpoint": parent,
            "incremental": incremental,
            "streamVersion": self.version,
        }
        self.written = self.directory / f"{self.target}.{name}"
        self.written.write_bytes(
            stream(
                meta,
                extents,
                max_request=self.max_request,
                linked=self.linked,
                block_sums=self.block_sums,
            )
        )

    def _allocated(self) -> list[Extent]:
        """Runs of granules with and without data."""
        found: list[Extent] = []
        for at in range(0, len(self.disk), self.granularity):
            piece = bytes(self.disk[at : at + self.granularity])
            data = piece if any(piece) else None
            if found and (found[-1][2] is None) == (data is None):
                start, length, before = found[-1]
                joined = before + piece if before is not None else None
                found[-1] = start, length + len(piece), joined
            else:
                found.append((at, len(piece), data))
        return found

    def _changed(self) -> list[Extent]:
        """Runs of dirty granules: zeroes are data in them, as up to 2.20."""
        found: list[Extent] = []
        for granule in sorted(self.dirty):
            at = granule * self.granularity
            piece = bytes(self.disk[at : at + self.granularity])
            if found and found[-1][0] + found[-1][1] == at:
                start, length, before = found[-1]
                assert before is not None
                found[-1] = start, length + len(piece), before + piece
            else:
                found.append((at, len(piece), piece))
        return found
