"""From a SOURCE to an open Disk."""

import os

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import UnsupportedImage
from nbdsrv.export.grammar import Kind, Source
from nbdsrv.formats.opening import Opening, open_image

__all__ = ["open_source"]

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
    if source.kind is not Kind.IMAGE:
        raise UnsupportedImage(f"{source.text}: {_NOT_YET[source.kind]} are not served yet")
    path, snapshot, member = await workers.look_up(_selectors, source)
    opening = Opening(workers, writable=writable, snapshot=snapshot, member=member)
    return await open_image(path, source.scheme, opening)


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
    Kind.REPOSITORY: "backup repositories",
    Kind.HYPERVISOR: "disks of running VMs",
}
