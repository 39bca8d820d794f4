"""Version objects: a JSON document each, a head and a list of blocks.

::

    {"metadata_version": "3.0.0", "versions": [{"uid": "vm-a1b2c3", "date": "...Z", "volume": "vm",
      "snapshot": "", "size": 23069184, "block_size": 4194304, "status": "valid", ..., "labels": {},
      "blocks": [{"uid": {"left": 1, "right": 1}, "idx": 0, "size": 4194304, "valid": true,
                  "checksum": "b7e48..."}, ...]}]}

A list of a large disk has tens of megabytes. For a listing the head alone is read (the blocks come
last); a map of the blocks is made of it piece by piece, 48 bytes for each block.

Blocks of zeroes have no uid (0.17 and before) or are not listed (later).
"""

import re
from array import array
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from nbdsrv.errors import CorruptImage, UnsupportedImage
from nbdsrv.repository.benji.objects import Objects, object_path

__all__ = ["BlockMap", "Head", "read_blocks", "read_head", "version_path"]

MAX_HEAD = 1 << 20
"""Bytes in front of the blocks: labels are what can be many."""
MAX_VERSION = 1 << 30
"""Bytes of a version object, unpacked; it is never in memory as a whole."""
MAX_BLOCK = 32 << 20
MIN_BLOCK = 512
"""What Benji's configuration allows."""
MAX_BLOCKS = 3 << 20
"""Blocks of a version: twelve tebibytes at Benji's four mebibytes; 144 MiB of memory."""
MAX_SIZE = 1 << 60
PIECE = 1 << 20
_BLOCKS = re.compile(rb',\s*"blocks"\s*:\s*\[')
_BETWEEN = b"},{"
"""Nothing but two blocks: what lies within one is followed by a name."""
_DIGEST = re.compile(r"[0-9a-f]{2,128}")


@dataclass(frozen=True, slots=True)
class Head:
    """A version without its blocks.

    Attributes:
        uid: its name.
        created: seconds since 1970.
        volume: what was backed up.
        snapshot: of what, or "".
        size: bytes of the disk.
        block_size: bytes.
        status: ``valid``, ``invalid`` or ``incomplete``.
        protected: from removal.
        labels: name to value.
        facts: what was counted when it was made.
    """

    uid: str
    created: float
    volume: str
    snapshot: str
    size: int
    block_size: int
    status: str
    protected: bool
    labels: Mapping[str, str]
    facts: Mapping[str, int]

    @property
    def blocks(self) -> int:
        """How many blocks the disk has, stored or not."""
        return -(-self.size // self.block_size)

    def block_length(self, index: int) -> int:
        """Bytes of a block."""
        return min(self.block_size, self.size - index * self.block_size)


@dataclass(slots=True)
class BlockMap:
    """The blocks that are stored, by index.

    Attributes:
        indexes: ascending.
        left: first half of the uid.
        right: second half.
        checksums: in binary, ``width`` bytes each.
        width: of a checksum.
        invalid: indexes of those Benji has found broken.
    """

    indexes: "array[int]" = field(default_factory=lambda: array("L"))
    left: "array[int]" = field(default_factory=lambda: array("Q"))
    right: "array[int]" = field(default_factory=lambda: array("Q"))
    checksums: bytearray = field(default_factory=bytearray)
    width: int = 0
    invalid: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.indexes)

    def find(self, index: int) -> int:
        """The row of a block, or where it would be."""
        return bisect_left(self.indexes, index)

    def key(self, row: int) -> str:
        """The name of its object."""
        return f"{self.left[row]:016x}-{self.right[row]:016x}"

    def checksum(self, row: int) -> bytes:
        """What its content must hash to."""
        return bytes(self.checksums[row * self.width : (row + 1) * self.width])


class _Uid(msgspec.Struct):
    left: int | None = None
    right: int | None = None


class _Block(msgspec.Struct):
    uid: _Uid
    size: int
    idx: int | None = None
    id: int | None = None
    valid: bool | int = True
    checksum: str | None = None


_decoder = msgspec.json.Decoder(list[_Block])


def read_head(objects: Objects, path: str, uid: str) -> Head:
    """The head of a version; reads no more of the object than it takes. Blocking.

    Raises:
        CorruptImage: it is broken, or the version of another name.
        RepositoryError, ConfigError: the key is missing or wrong.
    """
    _, reader = objects.stream(path, MAX_VERSION)
    raw = b""
    found = None
    while found is None and len(raw) < MAX_HEAD:
        data = reader.read(1 << 14)
        if not data:
            break
        raw += data
        found = _BLOCKS.search(raw)
    if found is None:
        raise objects.corrupt(path, _nonsense(raw))
    try:
        said = msgspec.json.decode(raw[: found.start()] + b"}]}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise objects.corrupt(path, _nonsense(raw)) from error
    try:
        return _head(said, uid)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise objects.corrupt(path, f"the version, {error!r:.100}") from error


def _nonsense(raw: bytes) -> str:
    if raw[:1] == b"{":
        return "no version, or one with too many labels"
    return "it does not unpack to a version; is the key the right one?"


def _head(said: dict[str, Any], uid: str) -> Head:
    version = said.get("metadata_version")
    major = version.partition(".")[0] if isinstance(version, str) else ""
    if major not in {"1", "2", "3"}:
        raise UnsupportedImage(f"{uid}: a version with metadata of version {version!r:.20}")
    (row,) = said["versions"]
    size, block_size = row["size"], row["block_size"]
    if not _fits(block_size, MIN_BLOCK, MAX_BLOCK) or not _fits(size, 0, MAX_SIZE):
        raise ValueError(f"{size!r:.40} bytes in blocks of {block_size!r:.40}")
    if -(-size // block_size) > MAX_BLOCKS:
        raise ValueError(f"{size} bytes are more than {MAX_BLOCKS} blocks")
    own = row["uid"]
    if isinstance(own, int):
        own = f"V{own:010d}"
    if own != uid:
        raise ValueError(f"it is that of {own!r:.80}")
    created = datetime.fromisoformat(row["date"].removesuffix("Z")).replace(tzinfo=UTC).timestamp()
    volume = row["name"] if major == "1" else row["volume"]
    snapshot = row.get("snapshot_name" if major == "1" else "snapshot") or ""
    for text in (volume, snapshot, row["status"]):
        if not isinstance(text, str) or len(text) > 255 or not text.isprintable():
            raise ValueError(f"a name {text!r:.80}")
    if not volume:
        raise ValueError("a volume without name")
    counted = ("bytes_read", "bytes_written", "bytes_deduplicated", "bytes_dedup", "bytes_sparse")
    facts = {name: row[name] for name in counted if isinstance(row.get(name), int)}
    return Head(
        uid,
        created,
        volume,
        snapshot,
        size,
        block_size,
        row["status"],
        bool(row.get("protected")),
        _labels(row.get("labels")),
        facts,
    )


def _labels(said: Any) -> Mapping[str, str]:
    if isinstance(said, list):  # before metadata 2
        said = {each["name"]: each["value"] for each in said if isinstance(each, dict)}
    return {str(name): str(value) for name, value in (said or {}).items()}


def _fits(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def read_blocks(objects: Objects, path: str, head: Head) -> BlockMap:
    """The blocks of a version, piece by piece. Blocking.

    Raises:
        CorruptImage: the list is broken, or not that of such a disk.
    """
    reading = _Reading(objects, path, head)
    _, reader = objects.stream(path, MAX_VERSION)
    raw = b""
    begun = False
    while data := reader.read(PIECE):
        raw += data
        if not begun:
            found = _BLOCKS.search(raw)
            if found is None:
                if len(raw) > MAX_HEAD + PIECE:
                    raise objects.corrupt(path, "no list of blocks")
                continue
            raw, begun = raw[found.end() :], True
        cut = raw.rfind(_BETWEEN)
        if cut >= 0:
            reading.add(raw[: cut + 1])
            raw = raw[cut + 2 :]
        elif len(raw) > 4 * PIECE:
            raise objects.corrupt(path, "a list of blocks without blocks")
    end = raw.rfind(b"]}]}") if begun else -1
    if end < 0:
        raise objects.corrupt(path, "the list of blocks has no end")
    reading.add(raw[:end])
    return reading.blocks


class _Reading:
    def __init__(self, objects: Objects, path: str, head: Head) -> None:
        self.blocks = BlockMap()
        self._objects = objects
        self._path = path
        self._head = head
        self._last = -1

    def add(self, rows: bytes) -> None:
        try:
            for each in _decoder.decode(b"[" + rows + b"]"):
                self._add(each)
        except (msgspec.DecodeError, RecursionError) as error:
            raise self._bad(str(error)) from error

    def _add(self, each: _Block) -> None:
        index = each.idx if each.idx is not None else each.id
        if index is None or not self._last < index < self._head.blocks:
            raise self._bad(f"block {index} behind {self._last} of {self._head.blocks}")
        self._last = index
        if each.size != self._head.block_length(index):
            raise self._bad(f"block {index} of {each.size} bytes")
        left, right = each.uid.left, each.uid.right
        if left is None and right is None:
            return
        if not (_fits(left, 0, (1 << 64) - 1) and _fits(right, 0, (1 << 64) - 1)):
            raise self._bad(f"block {index} with a uid of {left!r:.30}, {right!r:.30}")
        checksum = each.checksum or ""
        if not _DIGEST.fullmatch(checksum) or len(checksum) % 2:
            raise self._bad(f"block {index} without a checksum")
        blocks = self.blocks
        blocks.width = blocks.width or len(checksum) // 2
        if len(checksum) // 2 != blocks.width:
            raise self._bad(f"block {index} with a checksum of {len(checksum) // 2} bytes")
        assert left is not None
        assert right is not None
        blocks.indexes.append(index)
        blocks.left.append(left)
        blocks.right.append(right)
        blocks.checksums += bytes.fromhex(checksum)
        if not each.valid:
            blocks.invalid.add(index)

    def _bad(self, text: str) -> CorruptImage:
        return self._objects.corrupt(self._path, f"the list of blocks, {text}")


def version_path(uid: str) -> str:
    """Where a version's object lies."""
    return object_path("versions", uid)
