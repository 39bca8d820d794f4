"""From a SOURCE to an open Disk, or to the exports of a whole repository."""

import errno
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError
from nbdsrv.export.grammar import Kind, Source, unknown_kind
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.repository.passphrase import passphrase_of

if TYPE_CHECKING:  # most commands serve nothing
    from nbdsrv.export.exports import Collection
    from nbdsrv.repository.repository import Point

__all__ = ["open_collection", "open_source"]

_SNAPSHOTS = frozenset({"", "qcow2"})
_ARCHIVES = frozenset({"", "ova", "xva", "gzip", "xz", "zstd"})


async def open_source(
    source: Source,
    workers: Workers,
    *,
    writable: bool = False,
    passphrase: Callable[[], str] = passphrase_of,
) -> Disk:
    """Open what a SOURCE names.

    Raises:
        ConfigError: it names several disks, or makes no sense.
        DiskError: it cannot be opened; ``UnsupportedImage`` if it is of a kind nbdsrv knows of
            but does not serve yet.
    """
    disk = await _open_whole(source, workers, passphrase, writable=writable)
    if source.partition is None:
        return disk
    from nbdsrv.formats.partition import open_partition

    return await open_partition(disk, source.partition)


async def _open_whole(
    source: Source, workers: Workers, passphrase: Callable[[], str], *, writable: bool
) -> Disk:
    if source.kind is Kind.NBD:
        from nbdsrv.source.nbd import open_nbd

        return await open_nbd(source.location, workers, writable=writable)
    if writable:
        _refuse_writing(source)
    if source.kind is Kind.REPOSITORY:
        return await _open_stored(source, workers, passphrase)
    if source.kind is Kind.HYPERVISOR:
        return await _open_frozen(source, workers)
    path, snapshot, member = await workers.look_up(_selectors, source)
    opening = Opening(workers, writable=writable, snapshot=snapshot, member=member)
    return await open_image(path, source.scheme, opening)


def _refuse_writing(source: Source) -> None:
    if source.kind is Kind.REPOSITORY:
        hint = "`nbdsrv serve --overlay DIR` lets clients write beside it"
        raise DiskError(f"{source.text}: a restore point is only read; {hint}", errno.EROFS)
    if source.kind is Kind.HYPERVISOR:
        text = f"{source.text}: a running VM is only read; its disks are its own to write"
        raise DiskError(text, errno.EROFS)


async def _open_frozen(source: Source, workers: Workers) -> Disk:
    """The disk of a VM at this moment, until it is closed; its backups do not notice."""
    from nbdsrv.source.moment import Moment
    from nbdsrv.source.opening import open_hypervisor

    moment = await Moment.open(open_hypervisor([source], workers), workers)
    return await moment.only_disk()


async def _open_stored(source: Source, workers: Workers, passphrase: Callable[[], str]) -> Disk:
    """A disk of a restore point; what it needs of its repository is closed with it."""
    from nbdsrv.repository.opening import open_repository
    from nbdsrv.repository.selector import select

    repository = await open_repository(source, workers, passphrase)
    try:
        selected = await select(repository, source.selector)
        return await repository.open_disk(selected.point, selected.disk)
    finally:
        await repository.close()


async def open_collection(
    source: Source,
    workers: Workers,
    name: str,
    prefix: str = "",
    *,
    writable: bool = False,
    tls_only: bool = False,
    passphrase: Callable[[], str] = passphrase_of,
) -> "Collection | None":
    """The exports of a repository, or of a running VM, which is frozen until it is closed.

    None if the SOURCE selects one disk of a repository.

    Args:
        source: of a repository or a VM.
        workers: as for ``open_source``.
        name: of the collection, for messages.
        prefix: of the exports' names.
        writable: refused; what lies under an overlay need not be.
        tls_only: never served in plain text.
        passphrase: asked for that of an encrypted repository.

    Raises:
        DiskError: as ``open_source``.
    """
    if writable:
        _refuse_writing(source)
    if source.kind is Kind.HYPERVISOR:
        from nbdsrv.export.frozen import FrozenExports
        from nbdsrv.source.opening import open_hypervisor

        machine = open_hypervisor([source], workers)
        return await FrozenExports.open(machine, workers, name, prefix, tls_only=tls_only)
    from nbdsrv.export.points import PointExports
    from nbdsrv.repository.opening import open_repository
    from nbdsrv.repository.selector import scope_of

    repository = await open_repository(source, workers, passphrase)
    group: str | None = None
    only: Sequence[Point] = ()
    try:
        if source.selector:
            scope = await scope_of(repository, source.selector)
            one_point = scope.said and len(scope.points) == 1
            if scope.disk is not None or (one_point and len(scope.points[0].disks) == 1):
                await repository.close()
                return None
            group, only = scope.group, scope.points if scope.said else ()
    except BaseException:
        await repository.close()
        raise
    return PointExports(repository, name, prefix=prefix, group=group, only=only, tls_only=tls_only)


def _selectors(source: Source) -> tuple[str, str, str]:
    """Path, ``@snapshot`` and ``#member``; a file of that whole name comes first. Blocking."""
    path = source.location
    if os.path.isdir(path):
        hint = f"a repository is named by its kind, for instance repo:{path}"
        raise DiskError(f"{path}: is a directory, not a disk image; {hint}", errno.EISDIR)
    if os.path.lexists(path):
        return path, "", ""
    if source.scheme in _ARCHIVES:
        before, mark, member = path.rpartition("#")
        if mark and member and os.path.lexists(before):
            return before, "", member
    if source.scheme in _SNAPSHOTS:
        before, mark, snapshot = path.rpartition("@")
        if mark and snapshot and os.path.lexists(before):
            return before, snapshot, ""
    if not source.scheme and (wrong := unknown_kind(path)):
        raise ConfigError(f"{source.text}: {wrong}")
    return path, "", ""
