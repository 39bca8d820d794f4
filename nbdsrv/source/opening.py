"""From a SOURCE that names a running VM to its hypervisor, and from a frozen disk to a Disk.

::

    qemu:/run/qmp.sock#vda            ── open_hypervisor ──> QemuVm         ["vda"]
    libvirt:qemu:///system#web/vda    ─────────────────────> LibvirtDomain  ["vda"]
    xapi://root@host#web/xvda         ─────────────────────> XapiVm         ["xvda"]

    FrozenDisk ── open_frozen ──> NbdDisk, or what its hypervisor makes of it
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import unquote

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import Kind, Source
from nbdsrv.net.client_tls import Credentials
from nbdsrv.source.hypervisor import FrozenDisk, Hypervisor, SourceError
from protocol.contexts import ALLOCATION

__all__ = ["Machine", "machine_of", "open_frozen", "open_hypervisor"]


@dataclass(frozen=True, slots=True)
class Machine:
    """A VM that can be frozen.

    Attributes:
        hypervisor: of this VM.
        kind: ``qemu``, ``libvirt`` or ``xapi``: whose checkpoints they are.
        place: what tells it from other VMs, on this host.
        disks: names of those wanted; all without any.
    """

    hypervisor: Hypervisor
    kind: str
    place: str
    disks: Sequence[str] = ()


def machine_of(source: Source) -> tuple[str, str]:
    """Which VM a SOURCE names, and which disk of it, "" for all.

    Behind the # of ``qemu:`` is the disk, behind that of the others the VM, a slash, the disk.
    """
    if source.scheme == "qemu":
        return f"qemu:{source.location}", source.selector
    vm, _, disk = source.selector.partition("/")
    if source.scheme == "xapi":  # whose names may have any characters
        vm, disk = unquote(vm), unquote(disk)
    return f"{source.scheme}:{source.location}#{vm}", disk


def open_hypervisor(sources: Sequence[Source], workers: Workers) -> Machine:
    """The VM that SOURCEs name, all of them the same. It is not asked for anything yet.

    Raises:
        ConfigError: they name none, or what is needed to talk to that hypervisor is not installed.
    """
    first = sources[0]
    for source in sources:
        if source.kind is not Kind.HYPERVISOR:
            raise ConfigError(f"{source.text}: is no running VM; give qemu:, libvirt: or xapi:")
    place = machine_of(first)[0]
    disks = [machine_of(source)[1] for source in sources]
    wanted = () if "" in disks else tuple(dict.fromkeys(disks))
    return Machine(_OPENERS[first.scheme](first, workers), first.scheme, place, wanted)


@asynccontextmanager
async def open_frozen(
    frozen: FrozenDisk, workers: Workers, contexts: Sequence[str] = (), *, budget: int = 0
) -> AsyncIterator[Disk]:
    """A frozen disk, read-only, until the end of the block.

    Args:
        frozen: it; must stay so meanwhile.
        workers: threads.
        contexts: meta contexts to ask for, besides its own.
        budget: connections of this process to its server at most, 0: what the hypervisor says.

    Raises:
        DiskError: it cannot be opened, or its size is not what the hypervisor said.
    """
    if frozen.open is not None:
        async with frozen.open(workers, contexts) as disk:
            yield _checked(frozen, disk)
        return
    from nbdsrv.source.nbd import open_nbd

    wanted = (ALLOCATION, *([frozen.context] if frozen.context else []), *contexts)
    limits = [count for count in (budget, frozen.connections) if count]
    disk = await open_nbd(
        frozen.uri,
        workers,
        credentials=Credentials(**frozen.tls),
        contexts=tuple(dict.fromkeys(wanted)),
        host_connections=min(limits, default=0),
        frozen=True,
    )
    try:
        yield _checked(frozen, disk)
    finally:
        await disk.close()


def _checked(frozen: FrozenDisk, disk: Disk) -> Disk:
    if disk.size != frozen.size:
        text = f"{frozen.name}: has {frozen.size} bytes, and its server serves {disk.size}"
        raise SourceError(f"{text}; nothing was read of it")
    return disk


def _qemu(source: Source, workers: Workers) -> Hypervisor:
    from nbdsrv.source.qemu import QemuVm

    return QemuVm(source.location, workers)


def _libvirt(source: Source, workers: Workers) -> Hypervisor:
    from nbdsrv.source.libvirt import LibvirtDomain

    return LibvirtDomain(source.location, source.selector, workers)


def _xapi(source: Source, workers: Workers) -> Hypervisor:
    from nbdsrv.source.xapi import XapiVm
    from nbdsrv.source.xapi_place import access_of, parse_place

    place = parse_place(f"xapi:{source.location}#{source.selector}")
    return XapiVm(place, access_of(), workers)


_OPENERS: dict[str, Callable[[Source, Workers], Hypervisor]] = {
    "qemu": _qemu,
    "libvirt": _libvirt,
    "xapi": _xapi,
}
