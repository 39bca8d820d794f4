"""A snapshot read over NBD from any of the pool's hosts, for longer than a session lives.

::

    get_nbd_info ──> host A   host B          address, port, certificate, a name with a session
                       │
    read ── NbdDisk ───┘   it dies for good: a new login, new names, the next host

xapi-nbd grants 16 connections to a host in all; this process takes ``HOST_CONNECTIONS`` at most,
all disks and VMs together, and makes them one after the other (``net.client_budget``).

Rule: a server's certificate is the one XAPI has told, byte by byte. Without TLS nothing is read
unless that was asked for.
"""

import asyncio
import errno as os_errno
import ipaddress
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError, NbdsrvError
from nbdsrv.net.client_connect import Patience
from nbdsrv.net.client_tls import Credentials
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.nbd import NbdDisk, open_nbd
from nbdsrv.source.xapi_records import Vdi
from nbdsrv.source.xapi_session import XapiError, XapiSession
from protocol.uri import Uri, UriError

__all__ = ["HOST_CONNECTIONS", "open_over_nbd"]

log = logging.getLogger(__name__)

HOST_CONNECTIONS = 12
"""Of the 16: others may read from that host as well."""
DISK_CONNECTIONS = 4
"""Each serves one request at a time, in pieces of 512 KiB."""
MAX_PLACES = 256
MAX_REOPENED = 8
"""New beginnings for one read; a disk whose hosts all die is not waited for for ever."""
PATIENCE = Patience(connect_s=30.0, reconnect_s=5.0)
"""A connection plugs a virtual block device in the control domain first, which takes a while; one
that does not come back has lost its session, most likely."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a disk is served.

    Attributes:
        uri: with a session in it: a secret.
        certificate: PEM; "" if XAPI told none.
    """

    uri: Uri
    certificate: str

    @property
    def host(self) -> str:
        """For messages."""
        return f"{self.uri.host}:{self.uri.port}"


async def nbd_places(session: XapiSession, vdi: str, *, plain: bool) -> list[Place]:
    """Where XAPI serves a VDI; empty if on no network.

    Args:
        session: logged in.
        vdi: reference.
        plain: without TLS.

    Raises:
        SourceError: it cannot be asked.
    """
    found = await session.call("VDI.get_nbd_info", vdi)
    if not isinstance(found, list):
        raise SourceError(f"{session.server.name}: VDI.get_nbd_info: no list")
    places = [_place(info, plain=plain) for info in found[:MAX_PLACES] if isinstance(info, dict)]
    return [place for place in places if place is not None]


def _place(info: Mapping[str, Any], *, plain: bool) -> Place | None:
    """One of ``get_nbd_info``; None for what cannot be an address. Ports may be texts."""
    try:
        host = str(info["address"])
        ipaddress.ip_address(host)
        uri = Uri(tls=not plain, host=host, port=int(info["port"]), export=str(info["exportname"]))
    except (KeyError, ValueError, UriError):
        return None
    return Place(uri, str(info.get("cert", "")))


@asynccontextmanager
async def open_over_nbd(
    session: XapiSession, vdi: Vdi, workers: Workers, *, first: int, plain: bool
) -> AsyncIterator[Disk]:
    """A snapshot over NBD, until the end of the block.

    Args:
        session: stays logged in meanwhile, under whatever reference.
        vdi: the snapshot.
        workers: threads.
        first: which of the hosts is tried first: several disks spread over them.
        plain: without TLS.

    Raises:
        SourceError: no host serves it.
    """
    reach = _Reach(session, vdi, workers, first, plain=plain)
    disk = _Reopening(workers, await reach.open(), reach)
    try:
        yield disk
    finally:
        await disk.close()


class _Reach:
    """From a snapshot to a connection, again and again."""

    def __init__(
        self, session: XapiSession, vdi: Vdi, workers: Workers, first: int, *, plain: bool
    ) -> None:
        self._session = session
        self._vdi = vdi
        self._workers = workers
        self._first = first
        self._plain = plain
        self.name = f"VDI {vdi.uuid}"

    async def open(self) -> NbdDisk:
        """At the next host that serves it.

        Raises:
            SourceError: none does.
        """
        try:
            places = await nbd_places(self._session, self._vdi.ref, plain=self._plain)
        except XapiError as error:
            raise SourceError(f"{self.name} is not served over NBD: {error.code}") from error
        if not places:
            hint = "a network of the pool needs the purpose nbd"
            raise SourceError(f"{self.name} is not served over NBD: {hint}")
        start, self._first = self._first, self._first + 1
        reasons = []
        for turn in range(len(places)):
            place = places[(start + turn) % len(places)]
            try:
                return await self._at(place)
            except NbdsrvError as error:  # also a certificate that is none
                log.warning("xapi.nbd host=%s reason=%s", place.host, error)
                reasons.append(error)
        raise SourceError(f"no host serves it over NBD: {reasons[0]}")

    async def _at(self, place: Place) -> NbdDisk:
        if not self._plain and not place.certificate:
            raise SourceError(f"{place.host}: XAPI tells no certificate of its NBD server")
        disk = await open_nbd(
            str(place.uri),
            self._workers,
            connections=DISK_CONNECTIONS,
            credentials=Credentials(exact=place.certificate) if not self._plain else None,
            contexts=(),
            patience=PATIENCE,
            host_connections=HOST_CONNECTIONS,
            frozen=True,
        )
        if disk.size != self._vdi.size:
            await disk.close()
            text = (
                f"{place.host} serves {disk.size} bytes of {self.name}, which has {self._vdi.size}"
            )
            raise SourceError(text)
        return disk


class _Reopening(Passthrough):
    """An NbdDisk, replaced by another once it has lost its server."""

    _inside: NbdDisk

    def __init__(self, workers: Workers, inside: NbdDisk, reach: _Reach) -> None:
        super().__init__(workers, inside)
        self.name = reach.name
        self._reach = reach
        self._replacing = asyncio.Lock()
        self._closed = False

    @property
    def facts(self) -> Mapping[str, object]:
        """The inner Disk's, without the session in the export's name."""
        return {**self._inside.facts, "export": self.name}

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """As the server gives it; a bad place is an error, a lost server is not."""
        for _ in range(MAX_REOPENED):
            inside = self._inside
            try:
                await inside.read_into(offset, buffer)
                return
            except DiskError as error:
                if self._closed or not _is_lost(inside, error):
                    raise
                await self._replace(inside, error)
        await self._inside.read_into(offset, buffer)

    async def _replace(self, lost: NbdDisk, why: DiskError) -> None:
        async with self._replacing:
            if self._inside is not lost or self._closed:
                return
            log.warning("xapi.reopen disk=%s reason=%s", self.name, why)
            # Others who are reading from it fail now, and come here as well.
            await lost.close()
            self._inside = await self._reach.open()

    async def close(self) -> None:
        """Close the connections."""
        self._closed = True
        async with self._replacing:
            await self._inside.close()


def _is_lost(disk: NbdDisk, error: DiskError) -> bool:
    """Is it the server that is gone, rather than the place that is bad?"""
    if error.errno == os_errno.EINVAL:
        return False
    at = error.offset
    return at is None or not any(low <= at < low + span for low, span in disk.incidents.bad)
