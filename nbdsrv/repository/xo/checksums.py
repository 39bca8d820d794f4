"""The checksums that we keep beside a disk of Xen Orchestra's format, which has none of its own.

::

    vdis/<job>/<vdi>/20260102T020304Z.alias.vhd
                    /.<uuid of the disk>.nbdsrv        one for each disk that we have written

    | "nbdsrvck" | version, length | about, JSON | BLAKE3 | count x u32 | count x 16 bytes |
                     4        4      sealed        32       block numbers  BLAKE3 of 2 MiB
                                                            `------- sealed together -------'

All integers are little-endian. *About* holds the disk's uuid, its parent's, what the point knows of
the disk, and the BLAKE3 of the table. So a sum is bound to one disk and one block: blocks that were
exchanged are seen, within a disk and between disks.

Why there: Xen Orchestra lists and cleans files whose names end in ``.vhd``, ``.json``, and what is
below ``data/``; a name with a dot in front in this directory is let alone by all of its versions.
Why by uuid: a merge moves blocks of a child into the file of its parent, which then has the child's
uuid and name. Both files of sums stay, and what the child's does not have the parent's has: merged
disks are checked as well. What it costs: when Xen Orchestra deletes a disk its sums stay, up to
10 MiB a TiB, until our next backup of that disk removes them.
"""

import struct
import sys
import uuid as uuids
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any

import blake3
import msgspec

from nbdsrv.errors import CorruptImage, RepositoryError
from nbdsrv.repository.xo.sealing import Sealing
from nbdsrv.store.store import ObjectMissing
from nbdsrv.store.tree import Tree

__all__ = ["MAX_BLOCKS", "About", "ChecksumFile", "Sums", "checksum_name", "encode", "sum_of"]

BLOCK = 2 << 20
SUM = 16
"""Bytes of a sum: BLAKE3's first. To find two blocks with the same takes 2^64 attempts."""
MAX_BLOCKS = 12 << 20
"""Blocks of one disk's file: 24 TiB of data, 240 MiB of sums."""
MAX_ABOUT = 1 << 20
"""Bytes of JSON; labels take some hundred."""
MAX_CHAIN = 1024
"""Disks that are followed from child to parent."""

_MAGIC = b"nbdsrvck"
_VERSION = 1
_HEAD = struct.Struct("<8sII")
_HASH = 32
_PAGE = 1024


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a disk that we have written. Unknown fields of later versions are ignored.

    Attributes:
        uuid: of the disk, as in its footer.
        parent: uuid of the disk it lies upon; "" for a full one.
        name: in the point.
        size: bytes.
        point: stamp of the point it was written for.
        blocks: in the table.
        table: BLAKE3 of the table, hex.
        header: likewise of the VHD's header as it was written; a merge changes it.
        footer: of its footer.
        bat: of its bat: of a VHD directory the bitmap, of a file the table of sectors.
        mode: ``full``, ``incremental`` or ``scan``.
        reason: why that mode.
        cbt: who can tell what changes from here on, ``kind`` and ``id``; None if nobody can.
        labels: of the point.
        consistency: of the disks' content.
        read_bytes: that were read of the source.
        rechecked_bytes: said to be unchanged, and read all the same.
    """

    uuid: str
    name: str
    size: int
    point: str
    parent: str = ""
    blocks: int = 0
    table: str = ""
    header: str = ""
    footer: str = ""
    bat: str = ""
    mode: str = "full"
    reason: str = ""
    cbt: dict[str, str] | None = None
    labels: dict[str, str] = {}
    consistency: str = ""
    read_bytes: int = 0
    rechecked_bytes: int = 0


def checksum_name(uuid: str) -> str:
    """The name of the file, in the directory of the disk's VDI."""
    return f".{uuid}.nbdsrv"


def sum_of(data: bytes | bytearray | memoryview) -> bytes:
    """Of a block as it is on the disk: 2 MiB without its bitmap, the last one padded by zeroes."""
    return bytes(blake3.blake3(data).digest(SUM))


class Sums:
    """Block -> sum, while it is being made. Takes some 16 bytes a block. Not thread-safe."""

    def __init__(self) -> None:
        self._pages: dict[int, tuple[bytearray, bytearray]] = {}

    def put(self, block: int, value: bytes) -> None:
        """Replaces the one before."""
        number, index = divmod(block, _PAGE)
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = (bytearray(_PAGE), bytearray(_PAGE * SUM))
        page[0][index] = 1
        page[1][index * SUM : (index + 1) * SUM] = value

    def drop(self, block: int) -> None:
        """As if it had never been put."""
        page = self._pages.get(block // _PAGE)
        if page is not None:
            page[0][block % _PAGE] = 0

    def get(self, block: int) -> bytes | None:
        """The sum of a block, if there is one."""
        number, index = divmod(block, _PAGE)
        page = self._pages.get(number)
        if page is None or not page[0][index]:
            return None
        return bytes(page[1][index * SUM : (index + 1) * SUM])

    def blocks(self, first: int, stop: int) -> Iterator[int]:
        """Those of [first, stop) that have one, ascending."""
        for number in sorted(self._pages):
            base = number * _PAGE
            if base + _PAGE <= first or base >= stop:
                continue
            here = self._pages[number][0]
            index = here.find(1, max(0, first - base))
            while 0 <= index < stop - base:
                yield base + index
                index = here.find(1, index + 1)

    def __len__(self) -> int:
        return sum(page[0].count(1) for page in self._pages.values())

    def table(self) -> bytes:
        """As it is stored."""
        numbers = array("I", self.blocks(0, 1 << 32))
        if sys.byteorder != "little":
            numbers.byteswap()
        parts = [numbers.tobytes()]
        for number in sorted(self._pages):
            here, sums = self._pages[number]
            if here.count(1) == _PAGE:
                parts.append(bytes(sums))
                continue
            parts += [
                bytes(sums[index * SUM : (index + 1) * SUM])
                for index in range(_PAGE)
                if here[index]
            ]
        return b"".join(parts)


def encode(about: About, sums: Sums, sealing: Sealing) -> bytes:
    """The file's content.

    Raises:
        RepositoryError: it has more blocks than such a file can have.
    """
    table = sums.table()
    count = len(table) // (4 + SUM)
    if count > MAX_BLOCKS:
        text = f"disk {about.name!r}: {count} blocks of 2 MiB, more than the {MAX_BLOCKS}"
        raise RepositoryError(f"{text} that have checksums in a Xen Orchestra repository")
    digest = blake3.blake3(table).hexdigest()
    content = msgspec.json.encode(msgspec.structs.replace(about, blocks=count, table=digest))
    if len(content) > MAX_ABOUT:
        raise RepositoryError(f"disk {about.name!r}: labels of {len(content)} bytes")
    sealed = sealing.seal(content)
    head = _HEAD.pack(_MAGIC, _VERSION, len(sealed))
    return head + sealed + bytes(blake3.blake3(head + sealed).digest()) + sealing.seal(table)


class ChecksumFile:
    """The sums of one disk, and of those it once lay upon. Immutable once loaded; thread-safe.

    Attributes:
        about: the disk.
    """

    def __init__(self, tree: Tree, directory: str, sealing: Sealing, about: About, at: int) -> None:
        """Use ``load``."""
        self.about = about
        self._tree = tree
        self._directory = directory
        self._sealing = sealing
        self._at = at
        self._numbers: array[int] | None = None
        self._sums = b""
        self._parents: list[ChecksumFile] | None = None

    @classmethod
    def load(cls, tree: Tree, directory: str, uuid: str, sealing: Sealing) -> "ChecksumFile | None":
        """The sums of the disk with that uuid; None if it is none of ours. Blocking.

        Reads what is *about* the disk; the table is read when the first block is asked for.

        Args:
            tree: the repository.
            directory: where the disk (its alias, or its file) lies.
            uuid: in the disk's footer, as text.
            sealing: of the repository.

        Raises:
            CorruptImage: the file is damaged.
            StoreError: it cannot be read.
        """
        try:
            name = checksum_name(str(uuids.UUID(uuid)))
        except ValueError:
            return None
        path = f"{directory}/{name}" if directory else name
        try:
            head = tree.read_range(path, 0, _HEAD.size)
            magic, version, length = _HEAD.unpack(head)
            where = tree.full(path)
            if magic != _MAGIC or version != _VERSION or not length <= MAX_ABOUT + 64:
                raise _corrupt(where, 0, f"no checksums of version {_VERSION}")
            body = tree.read_range(path, _HEAD.size, length + _HASH)
        except ObjectMissing:
            return None
        sealed, digest = body[:length], body[length:]
        if blake3.blake3(head + sealed).digest() != digest:
            raise _corrupt(where, 0, "what it says of its disk was changed")
        try:
            about = msgspec.json.decode(sealing.open(sealed, where), type=About)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _corrupt(where, _HEAD.size, str(error)) from error
        if about.uuid != str(uuids.UUID(uuid)) or not 0 <= about.blocks <= MAX_BLOCKS:
            raise _corrupt(where, _HEAD.size, f"it is of the disk {about.uuid[:40]}")
        return cls(tree, directory, sealing, about, _HEAD.size + length + _HASH)

    @property
    def path(self) -> str:
        """In the repository."""
        name = checksum_name(self.about.uuid)
        return f"{self._directory}/{name}" if self._directory else name

    def check(self, block: int, data: bytes | bytearray | memoryview) -> bool | None:
        """Is that what was stored? None: nobody knows. Blocking.

        A block that this disk did not have when it was written is looked for in its parents:
        a merge has brought it here.

        Args:
            block: its number.
            data: 2 MiB without the bitmap; the last one padded by zeroes.

        Raises:
            CorruptImage: the checksums are damaged.
            StoreError: they cannot be read.
        """
        known = self.known(block)
        return None if known is None else known == sum_of(data)

    def known(self, block: int) -> bytes | None:
        """The sum of a block of the disk as it is seen through its parents. Blocking."""
        found = self.own(block)  # first: that its parents' sums are damaged need not matter
        if found is not None:
            return found
        for each in self.chain()[1:]:
            found = each.own(block)
            if found is not None:
                return found
        return None

    def chain(self) -> "list[ChecksumFile]":
        """This and its parents as far as there are sums of them, from new to old. Blocking."""
        if self._parents is None:
            found: list[ChecksumFile] = []
            seen = {self.about.uuid}
            at: ChecksumFile | None = self
            while at is not None and at.about.parent and len(found) < MAX_CHAIN:
                if at.about.parent in seen:
                    raise _corrupt(self._tree.full(at.path), 0, "a disk is its own ancestor")
                seen.add(at.about.parent)
                parent = at.about.parent
                at = ChecksumFile.load(self._tree, self._directory, parent, self._sealing)
                if at is not None:
                    found.append(at)
            self._parents = found
        return [self, *self._parents]

    @property
    def complete(self) -> bool:
        """Are there sums of all of its parents? Blocking."""
        return not self.chain()[-1].about.parent

    def own(self, block: int) -> bytes | None:
        """The sum of a block that this disk itself had. Blocking."""
        numbers = self._table()
        index = bisect_left(numbers, block)
        if index == len(numbers) or numbers[index] != block:
            return None
        return self._sums[index * SUM : (index + 1) * SUM]

    def rows(self) -> Iterator[tuple[int, bytes]]:
        """(block, sum) of its own, ascending. Blocking."""
        for index, block in enumerate(self._table()):
            yield block, self._sums[index * SUM : (index + 1) * SUM]

    def as_written(self, parts: Mapping[str, bytes]) -> bool:
        """Are ``header``, ``footer`` and ``bat`` (plain) those of the day? Not after a merge."""
        facts: dict[str, Any] = msgspec.to_builtins(self.about)
        return all(
            blake3.blake3(part).hexdigest() == facts.get(name) for name, part in parts.items()
        )

    def _table(self) -> "array[int]":
        if self._numbers is not None:
            return self._numbers
        where, count = self._tree.full(self.path), self.about.blocks
        numbers: array[int] = array("I")
        length = count * (4 + SUM)
        if count:
            sealed = self._tree.read_range(self.path, self._at, length + self._sealing.overhead)
            table = self._sealing.open(sealed, where)
            if len(table) != length or blake3.blake3(table).hexdigest() != self.about.table:
                raise _corrupt(where, self._at, "the table of checksums was changed")
            numbers.frombytes(table[: 4 * count])
            if sys.byteorder != "little":
                numbers.byteswap()
            self._sums = table[4 * count :]
        self._numbers = numbers  # last: another thread looks at it first
        return numbers


def _corrupt(where: str, offset: int, what: str) -> CorruptImage:
    return CorruptImage(f"corrupt repository: {where} at {offset}: {what}")
