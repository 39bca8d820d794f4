"""``libvirt:``: a running domain, frozen by libvirt's backup job in pull mode.

::

    libvirtd ── QEMU ── vda ── copy-before-write ── vda.scratch ── NBD ── socket ── us
                         |                                          |
                    bitmap nbdsrv-<new>               bitmap backup-vda: changed since nbdsrv-<old>

    clean up after the dead ── look ── freeze the guest ── begin ── thaw ── read ... ── succeed
                                                                                     └─ leave

libvirt does what ``qemu:`` does by hand: one transaction for all disks, checkpoints as persistent
bitmaps, a job that is exclusive in the domain. It needs QEMU 6.1, libvirt 7.6 and qcow2 images;
other images are backed up too, in full.
"""

import logging
from asyncio import to_thread
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.net.client_tls import Credentials
from nbdsrv.source.hypervisor import Frozen, FrozenDisk, Hypervisor, SourceError
from nbdsrv.source.libvirt_address import parse_libvirt
from nbdsrv.source.libvirt_checkpoints import is_ours, token_of
from nbdsrv.source.libvirt_frozen import LibvirtFrozen
from nbdsrv.source.libvirt_guest import frozen_guest
from nbdsrv.source.libvirt_link import Link
from nbdsrv.source.libvirt_remains import base_directory, end_job, remove_remains
from nbdsrv.source.libvirt_start import Start, untracked
from nbdsrv.source.libvirt_workplace import Workplace
from nbdsrv.source.libvirt_xml import Domain, DomainDisk, parse_domain
from nbdsrv.ulid import new_ulid
from protocol.uri import Uri

__all__ = ["LibvirtDomain"]

log = logging.getLogger(__name__)


class LibvirtDomain(Hypervisor):
    """A domain. Belongs to one event loop; one freeze at a time, which libvirt sees to.

    Attributes:
        address: of it.
    """

    def __init__(self, location: str, domain: str, workers: Workers) -> None:
        """``libvirt:LOCATION#DOMAIN``; a ``/DISK`` behind the domain is what is frozen by default.

        Args:
            location: libvirt's URI, and our parameters in it.
            domain: name or UUID.
            workers: of this process; libvirt has a thread of its own, since its calls may hang.

        Raises:
            ConfigError: that names no domain.
        """
        del workers
        self.address = parse_libvirt(location, domain)

    async def vm(self) -> str:
        """The domain's name."""
        async with self._linked() as link:
            return await link.name()

    def freeze(
        self, known: Mapping[str, Sequence[str]], disks: Sequence[str] = ()
    ) -> AbstractAsyncContextManager[Frozen]:
        """Freeze, by one backup job for all disks."""
        return self._freeze(known, disks)

    async def clean(self) -> Sequence[str]:
        """Remove what crashed backups left.

        A checkpoint that a repository may have a point of is left to the next ``freeze``, which is
        told what repositories have.
        """
        async with self._linked() as link:
            domain = parse_domain(await link.xml())
            return await remove_remains(link, self.address, domain, ())

    @asynccontextmanager
    async def _linked(self) -> AsyncIterator[Link]:
        link = await Link.open(self.address.uri, self.address.domain)
        try:
            yield link
        finally:
            await link.close()

    @asynccontextmanager
    async def _freeze(
        self, known: Mapping[str, Sequence[str]], disks: Sequence[str]
    ) -> AsyncIterator[Frozen]:
        async with self._linked() as link:
            domain = parse_domain(await link.xml())
            wanted = _selected(
                domain, disks or ([self.address.target] if self.address.target else [])
            )
            if not await link.is_running():
                text = f"{domain.name} is shut off, and libvirt backs up running VMs only"
                raise SourceError(f"{text}: back up its images, {_images(wanted)}")
            names = {name for each in known.values() for name in each}
            await remove_remains(link, self.address, domain, names)
            frozen = await self._begin(link, domain, wanted, known)
            try:
                yield frozen
            except BaseException as error:
                if isinstance(error, DiskError) and not isinstance(error, SourceError):
                    with suppress(SourceError):  # it becomes what is ``lost``
                        await frozen.still_frozen()
                await _leave_quietly(frozen)
                if frozen.lost and isinstance(error, DiskError):  # what is behind a lost connection
                    raise SourceError(f"{frozen.vm}: {frozen.lost}") from error
                raise
            await frozen.leave()

    # --- beginning ------------------------------------------------------------------------------

    async def _begin(
        self,
        link: Link,
        domain: Domain,
        disks: Sequence[DomainDisk],
        known: Mapping[str, Sequence[str]],
    ) -> LibvirtFrozen:
        address = self.address
        checkpoints = {each.name: each for each in await link.checkpoints()}
        newest = max((token_of(name) or "" for name in checkpoints if is_ours(name)), default="")
        persistent = await link.is_persistent()
        look = partial(untracked, persistent=persistent, remote=address.remote)
        reasons = {disk.target: reason for disk in disks if (reason := await to_thread(look, disk))}
        place = Workplace.make(
            base_directory(address),
            new_ulid(newest),
            domain.uuid,
            None if address.remote else domain.owner,
        )
        present = [disk.target for disk in domain.disks]
        start = Start(address, place, disks, known, checkpoints, reasons, present)
        try:
            if not address.remote:
                place.check_room(sum([await link.size(disk.target) for disk in disks]))
            async with frozen_guest(link, place, domain, address.agent) as consistency:
                await start.begin(link)
            return LibvirtFrozen(
                link,
                start,
                [self._frozen_disk(start, disk, await link.size(disk.target)) for disk in disks],
                vm=domain.name,
                consistency=consistency,
                facts=await self._facts(link, domain),
            )
        except BaseException:
            await _take_back(link, start)
            raise

    def _frozen_disk(self, start: Start, disk: DomainDisk, size: int) -> FrozenDisk:
        choice = start.choices[disk.target]
        listen = start.listen
        if listen.socket:
            uri = Uri(socket=listen.socket, export=disk.target)
        else:
            uri = Uri(tls=listen.tls, host=listen.host, port=listen.port, export=disk.target)
        return FrozenDisk(
            name=disk.target,
            uri=str(uri),
            size=size,
            context=f"qemu:dirty-bitmap:backup-{disk.target}" if choice.since else "",
            since=choice.since,
            checkpoint=start.checkpoint if disk.target in start.tracked else "",
            reason=choice.reason,
            tls=_credentials(self.address.tls),
            facts={
                "images": list(disk.images),
                "format": disk.format,
                "bus": disk.bus,
                "serial": disk.serial,
            },
        )

    async def _facts(self, link: Link, domain: Domain) -> dict[str, Any]:
        return {
            "hypervisor": "libvirt",
            "uri": self.address.uri,
            "name": domain.name,
            "uuid": domain.uuid,
            "domain_xml": await link.definition(),
        }


def _selected(domain: Domain, wanted: Sequence[str]) -> list[DomainDisk]:
    """The disks that are wanted.

    Raises:
        SourceError: there is none of that name, or it cannot be frozen.
    """
    by_name = {disk.target: disk for disk in domain.disks}
    for name in wanted:
        if name not in by_name:
            there = ", ".join(by_name) or "none"
            raise SourceError(f"{domain.name} has no disk {name!r}; there are {there}")
        if by_name[name].obstacle:
            raise SourceError(f"{domain.name}/{name} cannot be frozen: {by_name[name].obstacle}")
    chosen = [by_name[name] for name in dict.fromkeys(wanted)] or [*by_name.values()]
    for disk in chosen:
        if disk.obstacle:
            log.warning(
                "libvirt.skipped disk=%s/%s reason=%s", domain.name, disk.target, disk.obstacle
            )
    able = [disk for disk in chosen if not disk.obstacle]
    if not able:
        raise SourceError(f"{domain.name} has no disk that could be frozen")
    return able


def _images(disks: Sequence[DomainDisk]) -> str:
    return ", ".join(disk.images[0] for disk in disks)


def _credentials(directory: str) -> dict[str, str]:
    """As ``Credentials`` takes them."""
    if not directory:
        return {}
    found = Credentials.in_directory(directory)
    files = {"ca": found.ca, "cert": found.cert, "key": found.key}
    return {name: path for name, path in files.items() if path is not None}


async def _take_back(link: Link, start: Start) -> None:
    """Undo a beginning; what cannot be undone is noted by the directory that stays."""
    try:
        await end_job(link, start.place.token)
        if start.checkpoint:
            await link.delete_checkpoint(start.checkpoint)
        start.place.remove()
    except SourceError as error:
        log.warning("libvirt.left token=%s reason=%s", start.place.token, error)
    finally:
        start.place.leave()


async def _leave_quietly(frozen: LibvirtFrozen) -> None:
    """There is an error already, and it is the news."""
    try:
        await frozen.leave()
    except SourceError as error:
        log.warning("libvirt.left vm=%s reason=%s", frozen.vm, error)
