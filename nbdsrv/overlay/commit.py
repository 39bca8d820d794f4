"""A new restore point of what an overlay shows, told in terms of the point it is over.

::

    served:   frozen.sock ── NBD, export "frozen" ──┐     what is dirty is read, and a sample
    not:      base + Overlay, opened here ── freeze ┴──>  of the rest; the parent is the base's
                                                          point, even if newer ones exist
The overlay goes on as it was. Whoever is killed in between leaves no point and a thawed overlay.
"""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import quote

from nbdsrv.backup.parent import Parent
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, PointMissing
from nbdsrv.export.grammar import Kind
from nbdsrv.export.opener import open_source
from nbdsrv.overlay.description import Description
from nbdsrv.overlay.door import FROZEN, MAX_PATH
from nbdsrv.overlay.layered import DIRTY_CONTEXT
from nbdsrv.overlay.opening import reopen_overlay
from nbdsrv.overlay.place import SOCKET_NAME, in_use, read_description
from nbdsrv.overlay.source import base_source
from nbdsrv.repository.destination import Destination
from nbdsrv.source.nbd import open_nbd
from nbdsrv.store.store import ObjectMissing
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH

__all__ = ["CHANGED", "described", "frozen_disk", "parent_of"]


def described(path: str) -> Description:
    """What the overlay at ``path`` says of itself. Blocking.

    Raises:
        DiskError: there is none, or it cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise DiskError.from_os(f"overlay {path}", error) from error
    try:
        found = read_description(path, fd)
    finally:
        os.close(fd)
    if found is None:
        raise PointMissing(f"{path}: is no overlay; `nbdsrv overlay ls DIR` shows them")
    return found


@asynccontextmanager
async def frozen_disk(path: str, workers: Workers, contexts: Sequence[str]) -> AsyncIterator[Disk]:
    """This moment of the overlay at ``path``, until the end of the block.

    Raises:
        DiskError: it cannot be opened, or somebody else is reading a moment of it.
    """
    if await workers.look_up(in_use, path):
        async with _served(path, workers, contexts) as disk:
            yield disk
        return
    found = await workers.look_up(described, path)
    base = await open_source(base_source(found), workers)
    whole = "of_point" not in found.base and "part" not in found.base
    overlay = await reopen_overlay(base, path, whole=whole)
    try:
        frozen = await overlay.freeze()
        try:
            yield frozen
        finally:
            await frozen.close()
    finally:
        await overlay.close()


@asynccontextmanager
async def _served(path: str, workers: Workers, contexts: Sequence[str]) -> AsyncIterator[Disk]:
    """By way of the server that has it."""
    socket, directory = os.path.join(path, SOCKET_NAME), -1
    if not await workers.look_up(os.path.exists, socket):
        text = f"overlay {path} is in use, and there is no {SOCKET_NAME} to read a moment of it by"
        raise DiskError(
            f"{text}: commit when nobody has it (is DIR a file system without sockets?)"
        )
    if len(os.fsencode(socket)) > MAX_PATH:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        directory = await workers.look_up(os.open, path, flags)
        socket = f"/proc/self/fd/{directory}/{SOCKET_NAME}"
    try:
        uri = f"nbd+unix:///{FROZEN}?socket={quote(os.fsencode(socket), safe='/')}"
        wanted = (ALLOCATION, ALLOCATION_DEPTH, *contexts)
        disk = await open_nbd(uri, workers, contexts=wanted, frozen=True)
        try:
            yield disk
        finally:
            await disk.close()
    finally:
        if directory >= 0:
            os.close(directory)


def parent_of(destination: Destination, found: Description, group: str, disk: str) -> Parent:
    """The point the overlay is over, in a repository. Blocking.

    It must be the same to the byte: of ours, of equal content hash, here or copied; of Xen
    Orchestra's, the very one.

    Raises:
        RepositoryError: no group can have that name.
        StoreError: the repository cannot be read.
    """
    destination.check_group(group)
    point, image = found.base.get("point"), found.base.get("image_id")
    if point and _home(found) == destination.place:
        return _upon_latest(destination, found, group, disk)
    if not point or not image:
        return Parent(
            None, f"the overlay is over {found.source}, which is no restore point of ours"
        )
    for key in reversed(destination.stored(group)):
        try:
            record = destination.point(key)
        except (ObjectMissing, CorruptImage):
            continue
        known = record.disk(disk)
        if known is None or known.size != found.size:
            continue
        if getattr(known, "image_id", "") == image:
            destination.prove(record, disk)
            return Parent(record, named=True)
    return Parent(None, f"the point the overlay is over, {found.selector}, is not there")


def _home(found: Description) -> str:
    """The ``place`` of a Xen Orchestra remote that an overlay's base lies in; else ""."""
    source = base_source(found)
    local = source.kind is Kind.REPOSITORY and source.scheme == "xo"
    return f"xo {os.path.realpath(source.location)}" if local else ""


def _upon_latest(destination: Destination, found: Description, group: str, disk: str) -> Parent:
    """Xen Orchestra's disks are a chain: of two children it can merge neither.

    So only the latest point can be built upon, and the second commit of an overlay is whole.
    """
    if reason := destination.renewal(group):
        return Parent(None, reason)
    keys = destination.stored(group)
    if not keys:
        text = f"{found.selector}, which the overlay is over, was made by Xen Orchestra"
        return Parent(None, f"{text}; only points of ours are built upon")
    try:
        record = destination.point(keys[-1])
    except (ObjectMissing, CorruptImage):
        record = None
    known = record.disk(disk) if record is not None and record.id == found.base["point"] else None
    if record is None or known is None or known.size != found.size:
        text = f"{found.selector}, which the overlay is over, is not the latest point"
        return Parent(None, f"{text}; Xen Orchestra merges chains, not trees")
    destination.prove(record, disk)
    return Parent(record, named=True)


CHANGED = DIRTY_CONTEXT
"""The context that tells what to read."""
