"""From a SOURCE to an open Disk, or to the exports of a whole repository."""

import os
from collections.abc import Sequence

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import UnsupportedImage
from nbdsrv.export.exports import Collection
from nbdsrv.export.grammar import Kind, Source
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.repository.repository import Point

__all__ = ["open_collection", "open_source"]

_SNAPSHOTS = frozenset({"", "qcow2"})
_ARCHIVES = frozenset({"", "ova", "xva", "gzip", "xz", "zstd"})


async def open_source(source: Source, workers: Workers, *, writable: bool = False) -> Disk:
    """Open what a SOURCE names.

    Raises:
        DiskError: it cannot be opened; ``UnsupportedImage`` if it is of a kind nbdsrv knows of
            but does not serve yet.
    """
    disk = await _open_whole(source, workers, writable=writable)
    if source.partition is None:
        return disk
    from nbdsrv.formats.partition import open_partition

    return await open_partition(disk, source.partition)


async def _open_whole(source: Source, workers: Workers, *, writable: bool) -> Disk:
    if source.kind is Kind.NBD:
        from nbdsrv.source.nbd import open_nbd

        return await open_nbd(source.location, workers, writable=writable)
    if source.kind is Kind.REPOSITORY:
        return await _open_stored(source, workers)
    if source.kind is not Kind.IMAGE:
        raise UnsupportedImage(f"{source.text}: {_NOT_YET[source.kind]} are not served yet")
    path, snapshot, member = await workers.look_up(_selectors, source)
    opening = Opening(workers, writable=writable, snapshot=snapshot, member=member)
    return await open_image(path, source.scheme, opening)


async def _open_stored(source: Source, workers: Workers) -> Disk:
    """A disk of a restore point; what it needs of its repository is closed with it."""
    from nbdsrv.repository.opening import open_repository
    from nbdsrv.repository.selector import select

    repository = await open_repository(source, workers)
    try:
        selected = await select(repository, source.selector)
        return await repository.open_disk(selected.point, selected.disk)
    finally:
        await repository.close()


async def open_collection(
    source: Source, workers: Workers, name: str, prefix: str = "", *, tls_only: bool = False
) -> Collection | None:
    """The exports of a repository; None if the SOURCE selects one disk of it.

    Args:
        source: of a repository.
        workers: as for ``open_source``.
        name: of the collection, for messages.
        prefix: of the exports' names.
        tls_only: never served in plain text.

    Raises:
        DiskError: as ``open_source``.
    """
    from nbdsrv.export.points import PointExports
    from nbdsrv.repository.opening import open_repository
    from nbdsrv.repository.selector import scope_of

    repository = await open_repository(source, workers)
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
    return path, "", ""


_NOT_YET = {
    Kind.HYPERVISOR: "disks of running VMs",
}
