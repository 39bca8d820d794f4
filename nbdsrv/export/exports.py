"""What a served name opens.

::

    catalogue ── name ──> Export ── acquire() ──> Disk   opened when the first client asks,
                                    release()            shared by all, closed behind the last
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.errors import ConfigError
from protocol.constants import MAX_STRING, TransmissionFlag
from protocol.handshake.options import ExportInfo

__all__ = ["Catalogue", "Export", "export_info"]

log = logging.getLogger(__name__)

_FLAGS = {
    Ability.FLUSH: TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA,
    Ability.TRIM: TransmissionFlag.SEND_TRIM,
    Ability.ZERO: TransmissionFlag.SEND_WRITE_ZEROES,
    Ability.FAST_ZERO: TransmissionFlag.SEND_FAST_ZERO,
    Ability.MULTI_CONN: TransmissionFlag.CAN_MULTI_CONN,
    Ability.ROTATIONAL: TransmissionFlag.ROTATIONAL,
}


@dataclass(slots=True)
class Export:
    """A name and how to open the Disk behind it.

    Attributes:
        tls_only: never served in plain text, nor shown there.
    """

    name: str
    open: Callable[[], Awaitable[Disk]]
    description: str = ""
    tls_only: bool = False
    _disk: Disk | None = None
    _users: int = 0
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

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


class Catalogue:
    """All exports by name; a lone one is also the default export ``""``."""

    def __init__(self) -> None:
        self._exports: dict[str, Export] = {}

    def add(self, export: Export) -> None:
        """Raises ConfigError for a name that is taken or that the protocol cannot carry."""
        if export.name in self._exports:
            raise ConfigError(f"two exports are named {export.name!r}; use --export NAME=SOURCE")
        if len(export.name.encode(errors="replace")) > MAX_STRING or "\0" in export.name:
            raise ConfigError(f"export name {export.name[:40]!r}... is longer than {MAX_STRING}")
        if not export.name.isascii() and _undecodable(export.name):
            raise ConfigError(f"export name {export.name!r} is not UTF-8; use --export NAME=SOURCE")
        self._exports[export.name] = export

    def __iter__(self) -> Iterator[Export]:
        return iter(self._exports.values())

    def __len__(self) -> int:
        return len(self._exports)

    def find(self, name: str) -> Export | None:
        """The export a client means by ``name``."""
        if not name and "" not in self._exports and len(self._exports) == 1:
            return next(iter(self._exports.values()))
        return self._exports.get(name)

    def listed(self, *, secure: bool) -> Iterator[tuple[str, str]]:
        """(name, description) of what a client may know of."""
        for export in self:
            if secure or not export.tls_only:
                yield export.name, export.description


def _undecodable(name: str) -> bool:
    """Does it hold bytes of a file name that were not UTF-8 (surrogates)?"""
    return name.encode(errors="ignore").decode() != name


def export_info(export: Export, disk: Disk) -> ExportInfo:
    """What the handshake tells of an export: exactly what its Disk can do."""
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_CACHE
    if Ability.WRITE not in disk.abilities:
        flags |= TransmissionFlag.READ_ONLY
    for ability, flag in _FLAGS.items():
        if ability in disk.abilities:
            flags |= flag
    return ExportInfo(export.name, disk.size, flags, export.description, disk.block_sizes)
