"""What a served name opens.

::

    catalogue ── name ──> Export ── acquire() ──> Disk   opened when the first client asks,
        │                   │       release()            shared by all, closed behind the last
        │                   └── access                   who may, and how
        └── Collection ── name ──> Export                a whole repository: looked up when asked
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.errors import ConfigError, DiskError
from nbdsrv.export.access import EVERYBODY, Access, Grant, Peer
from protocol.constants import MAX_STRING, TransmissionFlag
from protocol.handshake.options import ExportInfo

__all__ = ["Catalogue", "Collection", "Export", "export_info", "is_name"]

log = logging.getLogger(__name__)

_FLAGS = {
    Ability.FLUSH: TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA,
    Ability.TRIM: TransmissionFlag.SEND_TRIM,
    Ability.ZERO: TransmissionFlag.SEND_WRITE_ZEROES,
    Ability.FAST_ZERO: TransmissionFlag.SEND_FAST_ZERO,
    Ability.MULTI_CONN: TransmissionFlag.CAN_MULTI_CONN,
    Ability.ROTATIONAL: TransmissionFlag.ROTATIONAL,
}
_CHANGING = Ability.WRITE | Ability.TRIM | Ability.ZERO | Ability.FAST_ZERO


@dataclass(slots=True, weakref_slot=True, eq=False)
class Export:
    """A name and how to open the Disk behind it.

    Attributes:
        tls_only: never served in plain text, nor shown there.
        access: who may use it; of what a collection has, the collection's.
        collection: where it was found, or None for one that the catalogue itself has.
    """

    name: str
    open: Callable[[], Awaitable[Disk]]
    description: str = ""
    tls_only: bool = False
    access: Access = EVERYBODY
    collection: "Collection | None" = None
    _disk: Disk | None = None
    _users: int = 0
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def disk(self) -> Disk | None:
        """What is open at the moment."""
        return self._disk

    @property
    def users(self) -> int:
        """Clients that hold it now, those in their handshake included."""
        return self._users

    @property
    def at_rest(self) -> bool:
        """Does nobody hold it, and is nothing being opened or closed?"""
        return not self._users and not self._lock.locked()

    async def settled(self) -> None:
        """Return when what is being opened or closed at the moment has been."""
        async with self._lock:
            pass

    async def acquire(self) -> Disk:
        """The shared Disk; pair with ``release``.

        Raises:
            DiskError: it cannot be opened.
        """
        async with self._lock:
            if self._disk is None:
                self._disk = await self.open()
            self._users += 1
            return self._disk

    async def release(self) -> None:
        """One user less; the last one closes."""
        async with self._lock:
            self._users -= 1
            if not self._users and self._disk is not None:
                disk, self._disk = self._disk, None
                await disk.close()


class Collection(ABC):
    """Exports that come and go by themselves. Belongs to one event loop.

    Attributes:
        name: for messages and ``--tls-export``.
        tls_only: as of each of its exports.
        access: likewise.
    """

    name: str
    tls_only: bool = False
    access: Access = EVERYBODY

    @abstractmethod
    async def find(self, name: str) -> Export | None:
        """The export a client means by ``name``: the same one while somebody uses it.

        Raises:
            DiskError: that cannot be found out.
        """

    @abstractmethod
    async def listed(self) -> Sequence[tuple[str, str]]:
        """(name, description) of all there are now.

        Raises:
            DiskError: that cannot be found out.
        """

    async def close(self) -> None:
        """Give back what it holds; exports in use stay open. Idempotent."""


class Catalogue:
    """All exports by name; a lone one is also the default export ``""``.

    Attributes:
        collections: asked, in this order, for names that are no export's.
    """

    def __init__(self) -> None:
        self._exports: dict[str, Export] = {}
        self.collections: list[Collection] = []
        self._found: WeakSet[Export] = WeakSet()

    def add(self, export: Export) -> None:
        """Raises ConfigError for a name that is taken or that the protocol cannot carry."""
        if export.name in self._exports:
            raise ConfigError(f"two exports are named {export.name!r}; use --export NAME=SOURCE")
        if not export.name.isascii() and _undecodable(export.name):
            raise ConfigError(f"export name {export.name!r} is not UTF-8; use --export NAME=SOURCE")
        if not is_name(export.name):
            raise ConfigError(f"export name {export.name[:40]!r}... is longer than {MAX_STRING}")
        self._exports[export.name] = export

    def __iter__(self) -> Iterator[Export]:
        return iter(self._exports.values())

    def __len__(self) -> int:
        return len(self._exports)

    async def find(self, name: str) -> Export | None:
        """The export a client means by ``name``.

        Raises:
            DiskError: a collection cannot find out.
        """
        lone = len(self._exports) == 1 and not self.collections
        if not name and lone and "" not in self._exports:
            return next(iter(self._exports.values()))
        found = self._exports.get(name)
        for collection in self.collections:
            if found is not None:
                break
            found = await collection.find(name)
            if found is not None:
                found.access, found.collection = collection.access, collection
                self._found.add(found)
        return found

    def in_use(self, collection: Collection) -> bool:
        """Does a client use any of its exports, though it may be served no more?"""
        return any(each.users for each in self._found if each.collection is collection)

    def become(self, other: "Catalogue") -> None:
        """Have what ``other`` has, from the next question on. Who holds an export keeps it."""
        self._exports = {export.name: export for export in other}
        self.collections = list(other.collections)

    def has(self, export: Export) -> bool:
        """Would a client still be given this one?"""
        if export.collection is not None:
            return export.collection in self.collections
        return self._exports.get(export.name) is export

    async def listed(self, *, secure: bool, peer: Peer | None = None) -> list[tuple[str, str]]:
        """(name, description) of what a client may know of.

        Without ``peer`` access rules do not count.

        A collection that cannot tell is left out, and the log says why.
        """
        names = [(e.name, e.description) for e in self if _shown(e, peer, secure=secure)]
        for collection in self.collections:
            if _shown(collection, peer, secure=secure):
                try:
                    names += await collection.listed()
                except DiskError as error:
                    log.warning("exports.unlisted collection=%r reason=%s", collection.name, error)
        return names


def _shown(what: Export | Collection, peer: Peer | None, *, secure: bool) -> bool:
    if what.tls_only and not secure:
        return False
    access = what.access
    return peer is None or not access.hidden or access.allows(peer) is not Grant.NONE


def is_name(name: str) -> bool:
    """Can the protocol carry it?"""
    fits = len(name.encode(errors="replace")) <= MAX_STRING and "\0" not in name
    return fits and (name.isascii() or not _undecodable(name))


def _undecodable(name: str) -> bool:
    """Does it hold bytes of a file name that were not UTF-8 (surrogates)?"""
    return name.encode(errors="ignore").decode() != name


def export_info(export: Export, disk: Disk, *, writable: bool = True) -> ExportInfo:
    """What the handshake tells of an export: exactly what its Disk can do.

    Without ``writable`` only what a read-only one can: this client's writes are answered by EPERM,
    whatever others may do with the same Disk.
    """
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_CACHE
    able = disk.abilities if writable else disk.abilities & ~_CHANGING
    if Ability.WRITE not in able:
        flags |= TransmissionFlag.READ_ONLY
    for ability, flag in _FLAGS.items():
        if ability in able:
            flags |= flag
    return ExportInfo(export.name, disk.size, flags, export.description, disk.block_sizes)
