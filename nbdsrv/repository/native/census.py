"""Everything that is in a repository, counted: all packs, and where each id lies. Blocking.

::

    list packs/ metas/        what may be garbage: it was there before the points were listed
    index/                    where ids lie, as backups have told
    directories               of the packs the index does not know: interrupted runs, lost segments
    list points/
    list packs/ metas/ again  what is there: a point that was just committed leads into new packs

The order matters. What a point of the listing refers to is in the last list, and a pack that a
segment names and the last list does not show has been deleted.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from heapq import merge
from itertools import groupby, islice

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.native.damage import damage_in, is_denied
from nbdsrv.repository.native.entry import Place
from nbdsrv.repository.native.index import (
    Index,
    Segment,
    encode_segment,
)
from nbdsrv.repository.native.layout import index_key, new_ulid, pack_of
from nbdsrv.repository.native.pack import MAX_PACK, Listed, scan
from nbdsrv.repository.native.segments import read_segments
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.store import ObjectMissing, Stored, StoreError

__all__ = ["THREADS", "Census", "Row", "encode_parts", "put_parts"]

Row = tuple[bytes, Place, int]
"""Id, place, kind."""

THREADS = 8
"""That wait for the store. Work on bytes shares the cores between them."""
MAX_ROWS = 4_000_000
"""Of a segment that is written: a TiB of chunks, 192 MiB."""
AT_ONCE = 1024
"""Directories that are fetched ahead of the one that is looked at."""


class Census:
    """What a repository holds. Not thread-safe, but ``index`` may be searched by many.

    Attributes:
        first: packs of the first listing, by name.
        packs: those of the last listing; before ``recount`` the first.
        index: all that segments and directories say.
        damage: packs whose directories cannot be read, and damaged segments, by key. Their entries
            were found by their headers as far as they are left.
        unreadable: keys of packs of which nothing can be read at all.
        unindexed: names of packs that no segment knows.
        blind: is there a segment that may not be read? Then it may know them.
    """

    def __init__(self, vault: Vault, unread: dict[str, None] | None = None) -> None:
        """Take it.

        Args:
            vault: the repository.
            unread: what may not be read is noted there, and left out. None: that is an error.

        Raises:
            StoreError: the store does not answer.
        """
        self._vault = vault
        self._unread = unread
        self.blind = False
        self.damage: dict[str, CorruptImage] = {}
        self.unreadable: set[str] = set()
        self.first = self._listed()
        self.packs = dict(self.first)
        self.index = Index()
        self.segments: list[tuple[str, Segment]] = []
        self._segment_keys: list[str] = []
        self._added: list[Row] = []
        self._load_segments()
        known = self.index.packs()
        self.unindexed = {name for name in self.first if name not in known}
        unknown = [self.first[name] for name in sorted(self.unindexed)]
        for stored, rows in self.directories(unknown):
            self._adopt(stored, rows)

    def recount(self) -> None:
        """List the packs again, once the points have been listed."""
        self.packs = self._listed()

    def directories(self, packs: Iterable[Stored]) -> Iterator[tuple[Stored, list[Listed]]]:
        """What packs say of themselves, in their order; those that are gone are left out.

        Raises:
            StoreError: the store does not answer.
        """
        rest = iter(packs)
        with ThreadPoolExecutor(THREADS, "nbdsrv-census") as threads:
            while part := list(islice(rest, AT_ONCE)):
                for stored, rows in zip(part, threads.map(self._directory, part), strict=True):
                    if rows is not None:
                        yield stored, rows

    def merged(self, without: set[bytes]) -> tuple[list[bytes], list[str]] | None:
        """One index in place of all segments, or None if it would be the same; after ``recount``.

        Args:
            without: names of the packs whose records are left out, beside those that are gone.

        Returns:
            The segments to put, and the keys of those to delete then.
        """
        left_out = {
            name for name in self.index.packs() if name in without or name not in self.packs
        }
        one = len(self._segment_keys) == 1 and len(self.segments) == 1
        if not left_out and not self._added and (one or not self._segment_keys):
            return None
        rows = self._rows(left_out)
        return encode_parts(rows, self._vault), list(self._segment_keys)

    def _rows(self, left_out: set[bytes]) -> Iterator[Row]:
        """All records by id, each once."""
        sources: list[Iterable[Row]] = [segment for _, segment in self.segments]
        self._added.sort()
        for _, same in groupby(merge(*sources, self._added, key=_id_of), key=_id_of):
            seen: list[Row] = []
            for row in same:
                if row[1].pack not in left_out and row not in seen:
                    seen.append(row)
                    yield row

    def _listed(self) -> dict[bytes, Stored]:
        found = {}
        for stored in self._vault.pack_objects():
            name = pack_of(stored.key)
            if name is not None:
                found[name] = stored
        return found

    def _load_segments(self) -> None:
        vault = self._vault
        for key, found in read_segments(vault.store, vault.repository, vault.hashing):
            if isinstance(found, ObjectMissing):
                continue
            if isinstance(found, Segment):
                self.segments.append((key, found))
                self.index.add_segment(found)
            elif self._denied(found):
                self.blind = True
                continue
            else:
                self.damage[key] = damage_in(vault.store, found)
            self._segment_keys.append(key)

    def _denied(self, error: DiskError) -> bool:
        if self._unread is None or not is_denied(error):
            return False
        self._unread[str(error)] = None
        return True

    def _adopt(self, stored: Stored, rows: list[Listed]) -> None:
        name = pack_of(stored.key)
        assert name is not None
        self.index.add_pack(name, rows)
        self._added += [(row.id, row.place(name), row.kind) for row in rows]

    def _directory(self, stored: Stored) -> list[Listed] | None:
        store = self._vault.store
        try:
            return self._vault.directory(stored)
        except ObjectMissing:
            return None
        except CorruptImage as error:
            self.damage[stored.key] = damage_in(store, error)
        except StoreError as error:
            if self._denied(error):
                return None
            raise
        try:
            return list(scan(store.get(stored.key, MAX_PACK)))
        except ObjectMissing:
            return None
        except StoreError as error:
            damage_in(store, error)
            self.unreadable.add(stored.key)
            return []


def encode_parts(rows: Iterable[Row], vault: Vault) -> list[bytes]:
    """Segments of these, each of a bounded size; as a rule it is one."""
    rest = iter(rows)
    parts = []
    while part := list(islice(rest, MAX_ROWS)):
        parts.append(encode_segment(part, vault.repository, vault.hashing))
    return parts


def put_parts(parts: Iterable[bytes], vault: Vault) -> None:
    """Put segments.

    Raises:
        StoreError: not all could be put.
    """
    for part in parts:
        vault.store.put_new(index_key(new_ulid()), part)


def _id_of(row: Row) -> bytes:
    return row[0]
