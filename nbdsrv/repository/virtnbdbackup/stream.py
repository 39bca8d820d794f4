r"""The sparse stream a virtnbdbackup data file is: what it says of itself.

::

    meta 0000000000000000 0000000000000141\r\n {JSON} \r\n         which disk, checkpoint, parent
    data 0000000000200000 0000000000020000\r\n 131072 bytes \r\n   an extent, perhaps packed
    zero 0000000000220000 0000000000080000\r\n                     zeroes: in full backups only
    ...
    stop 0000000000000000 0000000000000000\r\n
    [298, {"175408": [140312, 35096]}]\r\n                          packed: how long each became
    comp 0000000000000000 0000000000000022\r\n

A frame is always 40 bytes, lengths are of what is unpacked. Stream version 1 packs nothing.

Source: virtnbdbackup's description of the format, and files of versions 1.9.15 and 2.x.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from nbdsrv.formats.image_file import ImageFile

__all__ = [
    "FRAME_LENGTH",
    "MAX_DISK",
    "TERMINATOR",
    "Frame",
    "Meta",
    "is_stream",
    "read_frame",
    "read_meta",
    "read_tail",
]

FRAME_LENGTH = 40
TERMINATOR = b"\r\n"
MAX_DISK = 1 << 60
"""Bytes of a disk; no image format goes beyond."""
MAX_META = 1 << 16
"""Bytes of the JSON of the meta frame; it has some 320."""
MAX_NAME = 200
"""Characters of a disk's or checkpoint's name; libvirt's own are shorter."""
_FRAME = re.compile(rb"(meta|data|zero|stop|comp) ([0-9a-f]{16}) ([0-9a-f]{16})\r\n")


class Frame(NamedTuple):
    """A frame's 40 bytes."""

    kind: bytes
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Meta:
    """What the meta frame says.

    Attributes:
        size: of the disk, bytes.
        data_size: of all extents, bytes, unpacked.
        date: as it was written: the backup host's local time.
        created: the same in seconds since 1970 if that host's time zone is ours; None: no date.
        disk: the libvirt target: ``vda``.
        checkpoint: that was made, or that an offline increment is since.
        parent: the checkpoint it is an increment since, or "".
        incremental: does it hold changes only?
        packed: is each extent an LZ4 frame?
        version: of the stream.
        end: position behind it.
    """

    size: int
    data_size: int
    date: str
    created: float | None
    disk: str
    disk_format: str
    checkpoint: str
    parent: str
    incremental: bool
    packed: bool
    version: int
    end: int


def is_stream(file: ImageFile) -> bool:
    """Does the file begin as a stream does? Otherwise it is a plain image. Blocking."""
    found = _FRAME.fullmatch(file.read_up_to(0, FRAME_LENGTH))
    return found is not None and found[1] == b"meta"


def read_frame(file: ImageFile, position: int) -> Frame:
    """The frame at ``position``. Blocking.

    Raises:
        CorruptImage: there is none.
    """
    return parse_frame(file, position, file.read(position, FRAME_LENGTH, "a frame"))


def parse_frame(file: ImageFile, position: int, raw: bytes) -> Frame:
    """The same of bytes that have been read.

    Raises:
        CorruptImage: they are no frame.
    """
    found = _FRAME.fullmatch(raw)
    if found is None:
        raise file.corrupt(position, "no frame of a sparse stream")
    return Frame(found[1], int(found[2], 16), int(found[3], 16))


def read_tail(file: ImageFile) -> Frame | None:
    """The last frame, by which a file that is complete is known; None if it has none. Blocking."""
    position = file.size - FRAME_LENGTH
    if position < 0:
        return None
    found = _FRAME.fullmatch(file.read(position, FRAME_LENGTH, "the last frame"))
    return Frame(found[1], int(found[2], 16), int(found[3], 16)) if found else None


def read_meta(file: ImageFile) -> Meta:
    """The meta frame. Blocking.

    Raises:
        CorruptImage: it is broken, or says what cannot be.
    """
    frame = read_frame(file, 0)
    if frame.kind != b"meta" or frame.start or not 2 <= frame.length <= MAX_META:
        raise file.corrupt(0, "no meta frame")
    raw = file.read(FRAME_LENGTH, frame.length + len(TERMINATOR), "the meta frame")
    if not raw.endswith(TERMINATOR):
        raise file.corrupt(FRAME_LENGTH + frame.length, "the meta frame does not end there")
    try:
        said = msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise file.corrupt(FRAME_LENGTH, f"the meta frame, {error}") from error
    return _Said(file, said).meta(FRAME_LENGTH + len(raw))


class _Said:
    """JSON under the names of any version: ``virtualSize``, earlier ``virtual-size``."""

    def __init__(self, file: ImageFile, said: dict[str, Any]) -> None:
        self._file = file
        self._said = {name.replace("-", "").lower(): value for name, value in said.items()}

    def meta(self, end: int) -> Meta:
        date = self._text("date", default="")
        compressed = self._said.get("compressed", False)
        if not isinstance(compressed, bool | int):
            raise self._bad("compressed")
        method = self._text("compressionmethod", default="lz4")
        if compressed and method != "lz4":
            raise self._file.corrupt(FRAME_LENGTH, f"packed by {method!r}, which nobody knows")
        version = self._number("streamversion", 1 << 16, default=1)
        if version not in {1, 2}:
            raise self._file.corrupt(FRAME_LENGTH, f"version {version} of the stream is not known")
        incremental = self._said.get("incremental", False)
        if not isinstance(incremental, bool):
            raise self._bad("incremental")
        return Meta(
            size=self._number("virtualsize", MAX_DISK),
            data_size=self._number("datasize", MAX_DISK),
            date=date,
            created=_seconds(date),
            disk=self._text("diskname"),
            disk_format=self._text("diskformat", default=""),
            checkpoint=self._text("checkpointname", default=""),
            parent=self._text("parentcheckpoint", default=""),
            incremental=incremental,
            packed=bool(compressed),
            version=version,
            end=end,
        )

    def _number(self, name: str, limit: int, default: int | None = None) -> int:
        value = self._said.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
            raise self._bad(name)
        return value

    def _text(self, name: str, default: str | None = None) -> str:
        value = self._said.get(name, default)
        if value is None or value is False:  # old versions have these for a checkpoint without name
            value = ""
        if not isinstance(value, str) or len(value) > MAX_NAME or not (value or default == ""):
            raise self._bad(name)
        if not value.isprintable() or "/" in value:
            raise self._bad(name)
        return value

    def _bad(self, name: str) -> Exception:
        value = repr(self._said.get(name))[:60]
        return self._file.corrupt(FRAME_LENGTH, f"the meta frame says {name} {value}")


def _seconds(date: str) -> float | None:
    try:
        return datetime.fromisoformat(date).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
