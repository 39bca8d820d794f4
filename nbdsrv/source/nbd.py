"""An export of another server as a Disk.

::

    read_into |-----------------------------------------|     any offset, any length
    pieces    |--- 512 KiB ---|--- 512 KiB ---|-- rest --|     several at a time ...
    depth     as many bytes in flight as the way holds        ... (``nbd_depth``)
    links     [Client A]  [Client B]  [Client A]  ...         ... on whichever is least busy

READ    its connection dies: once more on a new one (``nbd_reads``); then, as on EIO, taken apart
WRITE   its connection dies: an error; it is never sent again (``nbd_changes``)

What the server does not offer is done otherwise where that is honest: zeroes are written, trims
left undone, a map without base:allocation is all data.
"""

import asyncio
import contextlib
import errno as os_errno
from collections.abc import Callable, Mapping, Sequence

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.disk.runs import RemoteRun, Run
from nbdsrv.disk.watch import Watch
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.net.client import Client, ConnectionLost
from nbdsrv.net.client_connect import Patience, Remote
from nbdsrv.net.client_tls import Credentials
from nbdsrv.source.nbd_address import find_address
from nbdsrv.source.nbd_changes import Changes
from nbdsrv.source.nbd_depth import Depth
from nbdsrv.source.nbd_dialler import Dialler
from nbdsrv.source.nbd_links import Incidents, Links
from nbdsrv.source.nbd_pieces import in_pieces
from nbdsrv.source.nbd_reads import Reads, whole_blocks
from nbdsrv.source.nbd_salvage import Salvage
from protocol.constants import Dialect, TransmissionFlag
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH
from protocol.extents import DATA, HOLE, ZERO, ExtentList
from protocol.terms import BlockSizes

__all__ = ["NbdDisk", "open_nbd"]

DEFAULT_CONNECTIONS = 4
"""As nbdcopy; more gain nothing on one machine and little on a network."""
MAX_CONNECTIONS = 64
"""Each costs a server a thread or a process, and XCP-ng's grants 16 to all the world."""
PIECE = 1 << 19
"""Bytes of one READ or WRITE: long enough to be cheap, short enough to spread. A busy qemu-nbd is
twice as fast with these as with longer ones."""
SECTOR = 512
"""Bytes reads are aligned to where the server does not say: xapi-nbd ends the session otherwise."""
ROUSING = 1 << 16
"""Bytes that are asked about only for the question's sake."""
ROUSING_S = 0.2
"""Seconds that opening waits for the answer at most."""
STATUS_LIMIT = 1 << 31
"""Bytes of one BLOCK_STATUS with 32-bit lengths. nbdkit before 1.42.3 aborts close to 4 GiB."""
STATES = {0: DATA, 1: DATA, 2: ZERO, 3: HOLE}
"""base:allocation's two bits. A hole that does not promise to read as zeroes must be read."""
UNKNOWN = 1
"""Of another context, where it cannot be asked for: changed, or allocated. To say less than is so
would lose data."""

ABILITIES = {
    TransmissionFlag.SEND_FLUSH: Ability.FLUSH,
    TransmissionFlag.SEND_TRIM: Ability.TRIM,
    TransmissionFlag.SEND_WRITE_ZEROES: Ability.ZERO,
    TransmissionFlag.SEND_FAST_ZERO: Ability.FAST_ZERO,
}


class NbdDisk(Disk):
    """Somebody else's export.

    Attributes:
        incidents: what has gone wrong so far.
    """

    format = "nbd"
    remote = True

    def __init__(
        self,
        workers: Workers,
        links: Links,
        salvage: Salvage,
        incidents: Incidents,
        name: str,
        *,
        writable: bool,
    ) -> None:
        super().__init__(workers)
        terms = links.terms
        self.name = name
        self.size = terms.size
        self.incidents = incidents
        self._links = links
        self._flags = terms.flags
        self._chunked = terms.dialect is not Dialect.SIMPLE
        self._contexts = {context: number for number, context in terms.contexts.items()}
        self.contexts = (ALLOCATION, *(name for name in self._contexts if name != ALLOCATION))
        self._minimum = terms.blocks.minimum
        self._aligned = self._minimum if terms.blocks_advertised else SECTOR
        self._piece = min(PIECE, terms.blocks.maximum) // self._aligned * self._aligned
        self.abilities = _abilities(terms.flags, writable=writable)
        self.block_sizes = BlockSizes(
            self._minimum if writable else 1, max(terms.blocks.preferred, self._minimum)
        )
        self._depth = Depth()
        self._reads = Reads(
            links, name, salvage, incidents, self._depth, self._aligned, self._piece
        )
        self._made = Changes(links, name, self.abilities, self._piece, self._depth)
        self._closed = False
        self._rousing: asyncio.Task[None] | None = None

    @property
    def facts(self) -> Mapping[str, object]:
        """The terms, and what has gone wrong."""
        terms = self._links.terms
        return {
            "export": terms.name if terms.name is not None else terms.export,
            "description": terms.description or "",
            "dialect": terms.dialect.name.lower(),
            "tls": terms.tls,
            "read_only": bool(terms.flags & TransmissionFlag.READ_ONLY),
            "connections": self._links.count,
        }

    @property
    def depth(self) -> int:
        """Bytes to have in flight now."""
        return self._depth.bytes

    # --- reading -------------------------------------------------------------------------

    def locate(self, offset: int, length: int) -> Sequence[Run] | None:
        """All of it is elsewhere."""
        del offset
        return [RemoteRun(length)]

    async def load(self, offset: int, length: int) -> None:
        """There is nothing ``locate`` would need."""

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` in pieces; on an error all before its offset is good."""
        self._check(offset, len(buffer))
        await self._reads.read_into(offset, buffer)

    def begin_read(self, offset: int, buffer: memoryview, done: Callable[[bool], None]) -> bool:
        """What is one READ to the server, and need not wait for others."""
        return not self._closed and self._reads.begin(offset, buffer, done)

    def attend(self, watch: Watch) -> None:
        """All connections there are and will be."""
        self._links.watch_by(watch)

    # --- maps ----------------------------------------------------------------------------

    async def extents(self, offset: int, length: int) -> ExtentList:
        """By base:allocation; without it, data."""
        self._check(offset, length)
        if ALLOCATION not in self._contexts:
            if offset >= self.size:
                raise self._beyond(offset, length, os_errno.EINVAL)
            return ExtentList(offset, [(length, DATA)])
        if self._reads.reach <= offset < self.size:
            return ExtentList(offset, [(length, DATA)])
        found = await self._status(ALLOCATION, offset, length)
        return ExtentList(offset, [(span, STATES[flags & 3]) for span, flags in found])

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """Any context the server has."""
        if context == ALLOCATION:
            return await self.extents(offset, length)
        if context not in self._contexts:
            raise DiskError(f"{self.name} has no context {context}", os_errno.EINVAL)
        self._check(offset, length)
        if self._reads.reach <= offset < self.size:
            return ExtentList(offset, [(length, UNKNOWN)])
        return ExtentList(offset, await self._status(context, offset, length))

    async def _status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        if not length or offset >= self.size:
            raise self._beyond(offset, length, os_errno.EINVAL)
        # A server that names no block size may end an answer within one of ours: then from there.
        for block in (self._aligned, self._minimum):
            begin, end = whole_blocks(block, self._reads.reach, offset, length)
            if self._links.terms.dialect is not Dialect.EXTENDED:
                end = min(end, begin + STATUS_LIMIT)
            found = await self._ask_status(context, begin, end - begin)
            clipped = _clipped(begin, found, offset, min(offset + length, end))
            if clipped:
                return clipped
        text = f"{self.name}: the server's map of {end - begin} bytes at {begin} ends too soon"
        raise DiskError(text, os_errno.EPROTO)

    async def _ask_status(
        self, context: str, offset: int, length: int
    ) -> Sequence[tuple[int, int]]:
        async def asked(client: Client) -> Sequence[tuple[int, int]]:
            numbers = {name: number for number, name in client.terms.contexts.items()}
            chosen = None
            if client.terms.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD and len(numbers) > 1:
                chosen = [numbers[context]]
            found = await client.block_status(offset, length, chosen)
            return found[numbers[context]]

        try:
            return await self._links.ask(asked)
        except ConnectionLost:
            self.incidents.reread += 1
            return await self._links.ask(asked)

    # --- changes -------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview) -> None:
        """In pieces; after an error, some of them are written."""
        self._check_change(offset, len(data))
        await self._made.write(offset, data)

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """By WRITE_ZEROES; where that is not offered, by writing zeroes."""
        self._check_change(offset, length)
        await self._made.zero(offset, length, punch=punch, fast=fast)

    async def trim(self, offset: int, length: int) -> None:
        """The whole blocks in the range, if the server knows how."""
        self._check_change(offset, length)
        await self._made.trim(offset, length)

    async def flush(self) -> None:
        """FLUSH; fails for good once a server may have taken acknowledged writes along."""
        if self._closed:
            raise self._shut()
        await self._made.flush()

    async def cache(self, offset: int, length: int) -> None:
        """CACHE, if the server knows how."""
        self._check(offset, length)
        if self._flags & TransmissionFlag.SEND_CACHE and length:
            begin, end = whole_blocks(self._aligned, self._reads.reach, offset, length)

            async def one(at: int, count: int) -> None:
                client = await self._links.choose()
                await client.cache(at, count)

            if begin < end:
                await in_pieces(begin, end - begin, self._piece, one)

    async def rouse(self, client: Client) -> None:
        """Have qemu-nbd describe a little of the export, before anything is read.

        It then has had a buffer of 1 MiB for extents, and from the first free of such a one glibc
        keeps what buffers for reads need. Until then their pages are mapped anew for each: a client
        that only reads was given 1.8 GB/s where afterwards it was 4.4 (QEMU 7.2). A server that
        takes its time for it is not waited for.
        """
        length = min(self.size, ROUSING) // self._aligned * self._aligned

        async def ask() -> None:
            with contextlib.suppress(DiskError):
                await client.block_status(0, length)

        if length:
            self._rousing = asyncio.get_running_loop().create_task(ask())
            await asyncio.wait({self._rousing}, timeout=ROUSING_S)

    async def close(self) -> None:
        """Say goodbye on all connections."""
        self._closed = True
        if self._rousing is not None:
            self._rousing.cancel()
        await self._reads.close()
        await self._links.close()

    # --- what must hold ------------------------------------------------------------------

    def _check(self, offset: int, length: int, errno: int = os_errno.EINVAL) -> None:
        if self._closed:
            raise self._shut()
        if offset < 0 or offset + length > self.size:
            raise self._beyond(offset, length, errno)

    def _beyond(self, offset: int, length: int, errno: int) -> DiskError:
        text = f"{self.name}: {length} bytes at {offset} reach beyond its end at {self.size}"
        return DiskError(text, errno)

    def _shut(self) -> DiskError:
        return DiskError(f"{self.name} is closed", os_errno.EBADF)

    def _check_change(self, offset: int, length: int) -> None:
        if Ability.WRITE not in self.abilities:
            raise self._read_only()
        self._check(offset, length, os_errno.ENOSPC)


def _abilities(flags: TransmissionFlag, *, writable: bool) -> Ability:
    """What the server offered, as far as it is wanted. All clients of the Disk share its links."""
    found = Ability.MULTI_CONN
    if flags & TransmissionFlag.ROTATIONAL:
        found |= Ability.ROTATIONAL
    if writable:
        found |= Ability.WRITE
        for flag, ability in ABILITIES.items():
            if flags & flag:
                found |= ability
    return found


def _clipped(
    begin: int, found: Sequence[tuple[int, int]], offset: int, end: int
) -> list[tuple[int, int]]:
    """The part of (length, flags) pairs from ``begin`` on that lies in ``offset``..``end``."""
    clipped = []
    at = begin
    for length, flags in found:
        low, high = max(at, offset), min(at + length, end)
        if low < high:
            clipped.append((high - low, flags))
        at += length
    return clipped


async def open_nbd(
    text: str,
    workers: Workers,
    *,
    writable: bool = False,
    connections: int = DEFAULT_CONNECTIONS,
    credentials: Credentials | None = None,
    contexts: Sequence[str] = (ALLOCATION, ALLOCATION_DEPTH),
    patience: Patience | None = None,
    host_connections: int = 0,
    frozen: bool = False,
) -> NbdDisk:
    """Open an NBD URI.

    Args:
        text: ``nbd://HOST[:PORT]/EXPORT``, ``nbds://``, ``nbd+unix:///EXPORT?socket=PATH`` ...
        workers: for reading certificates.
        writable: without it nothing is ever written, whatever the server allows.
        connections: at most; only one where the server does not say CAN_MULTI_CONN.
        credentials: for TLS; by default those of ``NBDSRV_TLS_CERTIFICATES``, or else the system's
            authorities.
        contexts: meta contexts to ask for; the Disk has those the server knows.
        patience: deadlines.
        host_connections: of this process to that host at most, over all of its disks; 0 for no
            limit. A disk waits ``Patience.turn_s`` for its first one.
        frozen: the content is known never to change: several connections are used even where
            the server does not say CAN_MULTI_CONN. Not with ``writable``.

    Raises:
        ConfigError: not a URI that can be used.
        DiskError: no connection, no such export, or it is read-only and must be written.
    """
    uri, context, credentials = await find_address(text, workers, credentials)
    remote = Remote(uri, context, tuple(contexts), patience or Patience(), credentials)
    dialler = Dialler(remote, host_connections)
    client = await dialler.open()
    terms = client.terms
    if writable and terms.flags & TransmissionFlag.READ_ONLY:
        await client.close()
        raise DiskError(f"{remote.name} is read-only on its server", os_errno.EROFS)
    limit = 1
    if terms.flags & TransmissionFlag.CAN_MULTI_CONN or (frozen and not writable):
        limit = max(1, min(connections, MAX_CONNECTIONS))
    incidents = Incidents()
    links = Links(client, dialler, limit, remote.patience, incidents)
    granule = max(SECTOR, terms.blocks.minimum)
    salvage = Salvage(dialler.plain, granule, incidents)
    disk = NbdDisk(workers, links, salvage, incidents, remote.name, writable=writable)
    if ALLOCATION in terms.contexts.values():
        try:
            await disk.rouse(client)
        except BaseException:
            await disk.close()
            raise
    return disk
