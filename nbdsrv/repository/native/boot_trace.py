"""Boot traces: what of a VM's disk was read first when it last booted off a point.

::

    traces/<group>/<disk>.tr     a pack of one entry: what ``overlay.trace`` makes of it

One for a disk, whatever its points; replaced by the next boot. It is help for readers and nothing
else: no point refers to it, and one that is missing or damaged costs a moment. The collector
deletes those of groups that have no points any more, and those that cannot be read.
"""

from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import quote, unquote

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.native.damage import damage_in
from nbdsrv.repository.native.entry import Kind, open_entry
from nbdsrv.repository.native.layout import MAX_GROUP, POINTS, point_prefix
from nbdsrv.repository.native.pack import (
    HEADER_SIZE,
    Pack,
    PackKind,
    parse_directory,
    parse_header,
    parse_trailer,
)
from nbdsrv.repository.native.sealing import BrokenPayload, compress
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.store import ObjectMissing, StoreError

__all__ = ["TRACES", "load_trace", "put_trace", "trace_key", "useless_traces"]

TRACES = "traces/"
MAX_OBJECT = 2 << 20
"""Bytes of a trace's object."""


def trace_key(group: str, disk: str) -> str:
    """Of the trace of a disk.

    Raises:
        ValueError: no such names.
    """
    name = quote(disk, safe="").replace("~", "%7E")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if not 0 < len(name) <= MAX_GROUP:
        raise ValueError(f"a disk's name has 1 to {MAX_GROUP} bytes, this one {len(name)}")
    return f"{TRACES}{point_prefix(group).removeprefix(POINTS)}{name}.tr"


def load_trace(vault: Vault, group: str, disk: str) -> bytes | None:
    """The trace of a disk, or None. Blocking.

    Raises:
        CorruptImage: it is damaged.
        StoreError: the store does not answer.
    """
    try:
        key = trace_key(group, disk)
        return _decoded(vault, key, vault.store.get(key, MAX_OBJECT))
    except (ObjectMissing, ValueError):
        return None


def put_trace(vault: Vault, group: str, disk: str, content: bytes) -> None:
    """Keep it, in place of the one before. Blocking.

    Raises:
        StoreError: the repository cannot be written; or no object can have that name.
    """
    try:
        key = trace_key(group, disk)
    except ValueError as error:
        raise StoreError(f"{vault.name}: {error}") from error
    hashing = vault.hashing
    pack = Pack(PackKind.TRACE, vault.repository, vault.sealing, hashing)
    codec, body = compress(content)
    pack.add(Kind.BLOB, codec, len(content), hashing.id_of(content), body)
    vault.store.put(key, pack.finish())


def _decoded(vault: Vault, key: str, data: bytes) -> bytes:
    try:
        header = parse_header(data, vault.repository)
        offset, _ = parse_trailer(data, len(data))
        rows = parse_directory(memoryview(data)[offset:], offset)
        if len(rows) != 1 or header.kind != PackKind.TRACE:
            raise BrokenPayload("no boot trace")
        entry = memoryview(data)[HEADER_SIZE:offset]
        seal = vault.sealing.seal(header.salt)
        return bytes(open_entry(seal, vault.hashing, rows[0].offset, rows[0].id, Kind.BLOB, entry))
    except (BrokenPayload, ValueError) as error:
        raise CorruptImage(f"corrupt repository: {key}: {error}") from error


def useless_traces(vault: Vault) -> Iterator[tuple[str, str]]:
    """Keys of traces that help nobody, and why. Blocking.

    Raises:
        StoreError: they cannot be listed.
    """
    groups = set(vault.groups())
    for stored in vault.store.list(TRACES):
        parts = stored.key.split("/")
        if len(parts) != 3 or not parts[2].endswith(".tr"):
            continue  # somebody else's
        group, disk = unquote(parts[1]), unquote(parts[2].removesuffix(".tr"))
        if group not in groups:
            yield stored.key, f"{group!r} has no points any more"
            continue
        try:
            if trace_key(group, disk) == stored.key:
                load_trace(vault, group, disk)
        except ValueError as error:
            yield stored.key, str(error)
        except DiskError as error:
            with suppress(StoreError):  # it was not to be had now: no reason to look no further
                yield stored.key, str(damage_in(vault.store, error))
