"""Moving what is needed out of packs that are mostly not. Blocking.

::

    old    |..|live|....|live|........|          less than half of it is referred to
                  └──────┬──┘
    new    |live|live| from the next pack ...    verified on the way, sealed anew
    index  a segment for the new packs           durable before the old ones are condemned

Maps go on naming the old place, which is a hint; the index leads to the new one.
"""

import errno as os_errno
from array import array
from collections.abc import Iterator, Mapping

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.native.census import Row, encode_parts, put_parts
from nbdsrv.repository.native.entry import ENTRY_SIZE, Body, Kind, opened_entry
from nbdsrv.repository.native.layout import meta_key, pack_key
from nbdsrv.repository.native.pack import (
    HEADER_SIZE,
    MAX_PACK,
    Listed,
    Pack,
    PackKind,
    parse_header,
)
from nbdsrv.repository.native.sealing import BrokenPayload, Codec, Seal
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.store import Data, ObjectMissing, Stored, StoreError

__all__ = ["repack"]

Moved = tuple[Kind, Codec, int, bytes, Body]
"""Kind, codec, bytes of the content, id, body."""


def repack(
    vault: Vault, packs: Mapping[bytes, tuple[Stored, "array[int]"]]
) -> tuple[set[bytes], int, list[CorruptImage]]:
    """Copy what is live in these packs into new ones, and index those.

    Args:
        vault: the repository.
        packs: by name: the object, and its live entries as ``mark.Live.rows`` has them.

    Returns:
        Names of the packs that are not needed any more, bytes of the new ones, and what was
        found damaged: such packs stay as they are.

    Raises:
        StoreError: the store does not answer. What was put so far is garbage.
    """
    writer = _Writer(vault)
    done: set[bytes] = set()
    damage: list[CorruptImage] = []
    for name, (stored, rows) in sorted(packs.items()):
        try:
            moved = list(_entries(vault, stored, rows))
        except ObjectMissing:
            continue  # another collector was faster
        except CorruptImage as error:
            damage.append(error)
            continue
        for entry in moved:
            writer.add(*entry)
        done.add(name)
    writer.finish()
    put_parts(encode_parts(writer.rows, vault), vault)
    return done, writer.bytes, damage


def _entries(vault: Vault, stored: Stored, rows: "array[int]") -> Iterator[Moved]:
    """The live entries of one pack, each proven.

    Raises:
        CorruptImage: one of them is damaged, or the directory does not name it.
    """
    listed = {row.offset: row for row in vault.directory(stored)}
    try:
        data = memoryview(vault.store.get(stored.key, MAX_PACK))
    except StoreError as error:
        if error.errno != os_errno.EIO:
            raise
        raise CorruptImage(f"corrupt repository: {error}") from error
    try:
        seal = vault.sealing.seal(parse_header(data[:HEADER_SIZE], vault.repository).salt)
        for offset in (row >> 32 for row in rows):
            row = listed.get(offset)
            if row is None:
                raise BrokenPayload(f"no entry begins at {offset}")
            yield _moved(vault, seal, row, data[offset : offset + ENTRY_SIZE + row.clen])
    except BrokenPayload as error:
        raise CorruptImage(f"corrupt repository: {stored.key}: {error}") from error


def _moved(vault: Vault, seal: Seal, row: Listed, data: Data) -> Moved:
    if row.kind not in {Kind.CHUNK, Kind.PAGE, Kind.ROOT, Kind.BLOB}:
        raise BrokenPayload(f"at {row.offset}: an entry of kind {row.kind}")
    kind = Kind(row.kind)
    try:
        entry, _, body = opened_entry(seal, vault.hashing, row.offset, row.id, kind, data)
    except BrokenPayload as error:
        raise BrokenPayload(f"at {row.offset}: {error}") from error
    return kind, Codec(entry.codec), entry.ulen, row.id, body


class _Writer:
    """New packs of both kinds, in the order in which they fill.

    Attributes:
        rows: where everything is now.
        bytes: of the new packs.
    """

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._open: dict[int, Pack] = {}
        self._moved: set[tuple[int, bytes]] = set()
        self.rows: list[Row] = []
        self.bytes = 0

    def add(self, kind: Kind, codec: Codec, ulen: int, id_: bytes, body: Body) -> None:
        if (kind, id_) in self._moved:
            return  # two writers had stored it
        self._moved.add((kind, id_))
        which = PackKind.CHUNKS if kind == Kind.CHUNK else PackKind.METAS
        pack = self._open.get(which)
        if pack is None:
            vault = self._vault
            pack = Pack(which, vault.repository, vault.sealing, vault.hashing)
            self._open[which] = pack
        pack.add(kind, codec, ulen, id_, body)
        if pack.size >= self._vault.config.pack_target:
            self._put(which)

    def finish(self) -> None:
        for which in list(self._open):
            self._put(which)

    def _put(self, which: int) -> None:
        pack = self._open.pop(which)
        data = pack.finish()
        key = pack_key(pack.name) if which == PackKind.CHUNKS else meta_key(pack.name)
        self._vault.store.put_new(key, data)
        self.bytes += len(data)
        self.rows += [(row.id, row.place(pack.name), row.kind) for row in pack.listed]
