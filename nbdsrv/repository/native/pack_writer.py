"""Packs being filled and put, and the numbers by which slots name them until they are.

::

    number   0     1     2     3                 slots hold numbers ...
    name     7f..  03..  -     -                 ... which have names once the pack is finished
                         |     open: add()
                         detached: put()

A pack has no name before its last byte is known, and a map's slots are written before that. So
slots hold numbers of this table, and the numbers of a page are made names when it is encoded.
"""

from dataclasses import dataclass

from nbdsrv.repository.native.entry import Body, Kind
from nbdsrv.repository.native.layout import meta_key, pack_key
from nbdsrv.repository.native.pack import Listed, Pack, PackKind
from nbdsrv.repository.native.sealing import Codec
from nbdsrv.repository.native.vault import Vault

__all__ = ["Filled", "PackWriter"]

MAX_ENTRIES = 1 << 14
"""Of a pack: chunks that compress to nothing must not make a directory that fills the memory."""


@dataclass(slots=True)
class Filled:
    """A pack that waits to be put."""

    number: int
    pack: Pack


class PackWriter:
    """The packs of one kind of one point. The caller holds a lock for all but ``put``.

    Attributes:
        names: of the packs by number; empty until one is there.
        new_bytes: of all entries so far, as they are stored.
        put_packs: how many have been put, and so have names; counted by who puts them.
    """

    def __init__(self, vault: Vault, kind: int, target: int) -> None:
        """``target``: bytes after which a pack is closed."""
        self._vault = vault
        self._kind = kind
        self._target = target
        self._key = pack_key if kind == PackKind.CHUNKS else meta_key
        self._numbers: dict[bytes, int] = {}
        self._open: Filled | None = None
        self.names: list[bytes] = []
        self._hurried = False
        self.new_bytes = 0
        self.put_packs = 0

    def number(self, name: bytes) -> int:
        """Of a pack that is there already."""
        found = self._numbers.get(name)
        if found is None:
            found = self._numbers[name] = len(self.names)
            self.names.append(name)
        return found

    def add(
        self, kind: Kind, codec: Codec, ulen: int, id_: bytes, body: Body
    ) -> tuple[int, Listed]:
        """Append an entry to the open pack; its number, and the row."""
        if self._open is None:
            vault = self._vault
            pack = Pack(self._kind, vault.repository, vault.sealing, vault.hashing)
            self._open = Filled(len(self.names), pack)
            self.names.append(b"")
        pack = self._open.pack
        before = pack.size
        row = pack.add(kind, codec, ulen, id_, body)
        self.new_bytes += pack.size - before
        return self._open.number, row

    @property
    def is_full(self) -> bool:
        """Has the open pack reached its size?"""
        if self._open is None:
            return False
        pack = self._open.pack
        return self._hurried or pack.size >= self._target or len(pack.listed) >= MAX_ENTRIES

    def full(self) -> Filled | None:
        """The open pack, detached, if it has reached its size."""
        return self.rest() if self.is_full else None

    def rest(self) -> Filled | None:
        """The open pack, detached, however small; None if there is none."""
        filled, self._open = self._open, None
        self._hurried = False
        return filled

    def hurry(self) -> None:
        """The open pack is full, whatever its size: too much waits for its name."""
        self._hurried = self._open is not None

    def put(self, filled: Filled) -> None:
        """Finish it and put it. Blocking, for any thread, without the lock.

        Raises:
            StoreError: it is not stored.
        """
        data = filled.pack.finish()
        self._vault.store.put_new(self._key(filled.pack.name), data)
        self.names[filled.number] = filled.pack.name
