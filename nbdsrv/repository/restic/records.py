"""The JSON documents of a restic repository, and their bounds.

::

    config               version, id
    keys/<id>            N, r, p, salt, data            not sealed itself; holds a sealed key
    snapshots/<id>       time, tree, hostname, paths, tags
    index/<id>           supersedes[], packs[{id, blobs[{id, type, offset, length, ...}]}]
    blob of type tree    nodes[{name, type, size, subtree | content[]}]

Unknown fields are ignored, as restic does: each of its versions adds some.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, TypeVar

import msgspec

from nbdsrv.repository.pieces import ID_SIZE
from nbdsrv.repository.restic.sealed import Broken

__all__ = [
    "MAX_BLOB",
    "MAX_PACK",
    "BlobEntry",
    "ConfigRecord",
    "FileNode",
    "IndexRecord",
    "KeyRecord",
    "MasterRecord",
    "PackEntry",
    "SnapshotRecord",
    "TreeNode",
    "content_ids",
    "decoded",
    "unquoted",
]

MAX_PACK = 1 << 32
"""Bytes of a pack: offsets in its header have 32 bits."""
MAX_BLOB = 512 << 20
"""Bytes of a blob. Pieces of files have at most 8 MiB; a tree has 67 bytes for each piece of each
file of its directory, so this is sparse images of 4 TiB side by side, or full ones of 8."""

Id = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Bounded = Annotated[int, msgspec.Meta(ge=0, lt=MAX_PACK)]
Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
T = TypeVar("T")


class ConfigRecord(msgspec.Struct, frozen=True):
    """The repository."""

    version: int
    id: Id


class KeyRecord(msgspec.Struct, frozen=True):
    """One of the repository's passwords; ``salt`` and ``data`` are base64."""

    kdf: str
    N: int
    r: int
    p: int
    salt: bytes
    data: bytes
    username: str = ""
    hostname: str = ""


class _Mac(msgspec.Struct, frozen=True):
    k: bytes
    r: bytes


class MasterRecord(msgspec.Struct, frozen=True):
    """The key of everything else."""

    mac: _Mac
    encrypt: bytes


class SnapshotRecord(msgspec.Struct, frozen=True):
    """One snapshot."""

    time: str
    tree: Id | None = None
    parent: Id | None = None
    paths: list[str] | None = None
    hostname: str = ""
    username: str = ""
    tags: list[str] | None = None
    program_version: str = ""

    @property
    def created(self) -> float:
        """Seconds since 1970.

        Raises:
            Broken: its time is none of the calendar.
        """
        try:
            moment = datetime.fromisoformat(self.time)
            if moment.tzinfo is None or not 1970 <= moment.year < 9999:
                raise Broken(f"its time, {self.time[:60]!r}, is none")
            return moment.timestamp()
        except (ValueError, OverflowError) as error:
            raise Broken(f"its time, {self.time[:60]!r}, is none") from error


class BlobEntry(msgspec.Struct, frozen=True, gc=False):
    """Where a blob lies in its pack; ``length`` as it is sealed."""

    id: Id
    type: str
    offset: Bounded
    length: Annotated[int, msgspec.Meta(ge=32, lt=MAX_PACK)]
    uncompressed_length: Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOB)] = 0


class PackEntry(msgspec.Struct, frozen=True, gc=False):
    """One pack in an index."""

    id: Id
    blobs: list[BlobEntry]


class IndexRecord(msgspec.Struct, frozen=True):
    """One file of the index."""

    packs: list[PackEntry] | None = None
    supersedes: list[Id] | None = None


class TreeNode(msgspec.Struct, frozen=True, gc=False):
    """One entry of a directory, without what its file is made of."""

    name: str
    type: str
    size: Size = 0
    mtime: str = ""
    subtree: Id | None = None


class FileNode(msgspec.Struct, frozen=True):
    """One entry of a directory, with what its file is made of, not looked at yet."""

    name: str
    type: str
    size: Size = 0
    content: msgspec.Raw = msgspec.Raw(b"null")


def decoded(data: bytes, type_: type[T]) -> T:
    """A document.

    Raises:
        Broken: it is none of that kind.
    """
    try:
        return msgspec.json.decode(data, type=type_)
    except RecursionError as error:
        raise Broken("nested too deeply") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise Broken(str(error)) from error


_STRIDE = 67
"""Bytes of an id in JSON, quotes and comma included."""
_AT_ONCE = 1 << 14


def content_ids(raw: memoryview) -> bytes:
    """The ids of a file's pieces, 32 bytes each, one behind the other.

    Raises:
        Broken: it is no list of ids.
    """
    if len(raw) <= 4 and bytes(raw) in {b"null", b"[]"}:
        return b""
    count, rest = divmod(len(raw) - 1, _STRIDE)
    if bytes(raw[:1]) != b"[" or bytes(raw[-1:]) != b"]" or rest:
        spare: Sequence[Id] = decoded(bytes(raw), list[Id])  # with blanks, as nobody writes it
        return b"".join(map(bytes.fromhex, spare))
    found = bytearray()
    for first in range(0, count, _AT_ONCE):
        last = min(first + _AT_ONCE, count)
        part = bytes(raw[1 + first * _STRIDE : last * _STRIDE])
        # A quarter of the time of a regular expression; the JSON is sound, or it had not come here.
        letters = part.translate(None, b'",')
        try:
            ids = bytes.fromhex(letters.decode())
        except ValueError as error:
            raise Broken(f"what a file is made of is no list of ids: {error}") from error
        if len(ids) != (last - first) * ID_SIZE:
            raise Broken("what a file is made of is no list of ids")
        found += ids
    return bytes(found)


_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|(.))", re.DOTALL)
_SIMPLE = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11}


def unquoted(name: str) -> str:
    r"""A file's name as it is: restic writes it the way Go quotes strings.

    Bytes that are no UTF-8 stay visible as ``\xNN``.
    """
    if "\\" not in name:
        return name

    def plain(match: re.Match[str]) -> bytes:
        byte, short, long, simple = match.groups()
        if byte is not None:
            return bytes([int(byte, 16)])
        if simple is not None:
            return bytes([_SIMPLE[simple]]) if simple in _SIMPLE else simple.encode()
        point = int(short or long, 16)
        return chr(point).encode(errors="replace") if point <= 0x10FFFF else b"?"

    found, at = b"", 0
    for match in _ESCAPE.finditer(name):
        found += name[at : match.start()].encode(errors="replace") + plain(match)
        at = match.end()
    found += name[at:].encode(errors="replace")
    return found.decode(errors="backslashreplace")
