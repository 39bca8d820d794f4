"""Is a pack what its name says, and is every entry in it what its id says? Blocking.

::

    level packs     bytes ── hash ── = name?   no ──┐
    level chunks    bytes ── hash ── = name?        ├── every entry: opened, its content hashed
                                     yes ───────────┘
"""

import errno as os_errno
from dataclasses import dataclass, field

from nbdsrv.repository.native.damage import is_outage
from nbdsrv.repository.native.entry import ENTRY_SIZE, Kind, open_entry
from nbdsrv.repository.native.layout import pack_of
from nbdsrv.repository.native.pack import (
    HEADER_SIZE,
    MAX_PACK,
    TRAILER_SIZE,
    Listed,
    parse_directory,
    parse_header,
    parse_trailer,
    scan,
)
from nbdsrv.repository.native.sealing import BrokenPayload
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.store import ObjectMissing, Stored, StoreError

__all__ = ["Examined", "examine"]


@dataclass(slots=True)
class Examined:
    """What is known of a pack now.

    Attributes:
        stored: the object.
        name: of the pack.
        length: bytes that were read.
        entries: that were opened.
        unreadable: none of it can be read.
        unread: why the store could not give it; that is no damage.
        broken: what is wrong with it; "" for nothing.
        parts: (offset, what is wrong) of each entry that is broken.
    """

    stored: Stored
    name: bytes
    length: int = 0
    entries: int = 0
    unreadable: bool = False
    unread: str = ""
    broken: str = ""
    parts: list[tuple[int, str]] = field(default_factory=list)


def examine(
    vault: Vault,
    stored: Stored,
    *,
    entries: bool,
    keyless: bool = False,
) -> Examined:
    """Read a pack and check it; for any thread.

    Args:
        vault: the repository.
        stored: the pack's object.
        entries: open every entry, though the pack's name be right.
        keyless: there is no key: entries are not opened in any case.
    """
    name = pack_of(stored.key)
    assert name is not None
    found = Examined(stored, name)
    try:
        data = vault.store.get(stored.key, MAX_PACK)
    except ObjectMissing:
        return found  # a collector has deleted it meanwhile
    except StoreError as error:
        if is_outage(error, vault.store) or error.errno not in {os_errno.EIO, os_errno.EFBIG}:
            found.unread = str(error)
        else:
            found.broken, found.unreadable = str(error), True
        return found
    found.length = len(data)
    right = vault.hashing.name_of(data) == name
    if not right:
        found.broken = "its bytes are not those that its name was made of"
    if (entries or not right) and not keyless:
        _open_all(vault, data, found)
    return found


def _open_all(vault: Vault, data: bytes, found: Examined) -> None:
    view = memoryview(data)
    try:
        header = parse_header(view[:HEADER_SIZE], vault.repository)
    except BrokenPayload as error:
        found.broken = f"its header: {error}"
        # Where nothing is encrypted, entries can do without it, and readers do.
        header = None
    if header is None and vault.sealing.id_key is not None:
        found.parts = [(row.offset, found.broken) for row in _rows(data, found)]
        return
    seal = vault.sealing.seal(header.salt if header is not None else b"")
    for row in _rows(data, found):
        found.entries += 1
        try:
            kind = Kind(row.kind)
            part = view[row.offset : row.offset + ENTRY_SIZE + row.clen]
            open_entry(seal, vault.hashing, row.offset, row.id, kind, part)
        except (BrokenPayload, ValueError) as error:
            found.parts.append((row.offset, str(error)))
            found.broken = found.broken or "an entry of it is broken"


def _rows(data: bytes, found: Examined) -> list[Listed]:
    """The entries, from the directory or, where that is lost, from their headers."""
    try:
        if len(data) < HEADER_SIZE + TRAILER_SIZE:
            raise BrokenPayload("it is too short for a pack")
        offset, _ = parse_trailer(data[-TRAILER_SIZE:], len(data))
        return parse_directory(memoryview(data)[offset:], offset)
    except BrokenPayload as error:
        found.broken = f"its directory: {error}"
        return list(scan(data))
