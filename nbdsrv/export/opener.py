"""From a SOURCE to an open Disk."""

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import UnsupportedImage
from nbdsrv.export.grammar import Kind, Source
from nbdsrv.formats.probe import probe
from nbdsrv.formats.raw import open_raw

__all__ = ["open_source"]


async def open_source(source: Source, workers: Workers, *, writable: bool = False) -> Disk:
    """Open what a SOURCE names.

    Raises:
        DiskError: it cannot be opened; ``UnsupportedImage`` if it is of a kind nbdsrv knows of
            but does not serve yet.
    """
    if source.kind is not Kind.IMAGE:
        raise UnsupportedImage(f"{source.text}: {_NOT_YET[source.kind]} are not served yet")
    if source.partition is not None:
        raise UnsupportedImage(f"{source.text}: partitions (~pN) are not served yet")
    kind = source.scheme or await workers.look_up(probe, source.location)
    if kind != "raw":
        hint = "" if source.scheme else f"; raw:{source.location} serves the file as it is"
        raise UnsupportedImage(f"{source.location}: {kind} images are not served yet{hint}")
    return await open_raw(source.location, workers, writable=writable)


_NOT_YET = {
    Kind.NBD: "NBD exports as sources",
    Kind.REPOSITORY: "backup repositories",
    Kind.HYPERVISOR: "disks of running VMs",
}
