"""A VM on QEMU, reached by its monitor.

::

    connect ── lock the private directory ── sweep what a killed run has left ── QemuFrozen ── ...
    qmp        qemu_scratch                  qemu_leftovers                      qemu_frozen
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence

from nbdsrv.disk.insist import insist
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.source.hypervisor import Hypervisor, SourceError
from nbdsrv.source.qemu_address import parse_qemu
from nbdsrv.source.qemu_frozen import QemuFrozen
from nbdsrv.source.qemu_leftovers import sweep, sweep_files
from nbdsrv.source.qemu_scratch import Scratch
from nbdsrv.source.qmp import QmpClient, making_sense, open_qmp

__all__ = ["QemuVm"]

OLDEST = (5, 2, 0)
"""block-export-add came with it. Tested with 7.2."""


class QemuVm(Hypervisor):
    """The VM behind a monitor. Any number of freezes, one at a time.

    The monitor is held as long as the VM is frozen; QEMU serves one client per monitor, so it
    should be one that nobody else needs: ``-qmp unix:/run/vm1/nbdsrv.sock,server=on,wait=off``.

    Attributes:
        name: for messages.
    """

    def __init__(self, location: str, workers: Workers) -> None:
        """``location``: as ``parse_qemu`` takes it; raises ConfigError as that does."""
        self._address = parse_qemu(location)
        self._workers = workers
        self.name = f"qemu:{self._address.monitor}"

    async def vm(self) -> str:
        """What ``-name`` says; without, the name of the monitor's socket."""
        client = await self._connect()
        try:
            return await self._name_of(client)
        finally:
            await client.close()

    @contextlib.asynccontextmanager
    async def freeze(
        self, known: Mapping[str, Sequence[str]], disks: Sequence[str] = ()
    ) -> AsyncIterator[QemuFrozen]:
        """Freeze; ``known`` may hold any names, those that are not this VM's are passed by.

        Raises:
            SourceError: the VM cannot be frozen, with nothing left behind; or, instead of what
                the block raised, why the moment was lost.
        """
        async with self._ready() as (client, scratch):
            await self._sweep(client, scratch)
            frozen = QemuFrozen(client, self._connect, scratch, self._address, self._workers)
            try:
                with making_sense(self.name):
                    await frozen.make(await self._name_of(client), known, disks)
                async with frozen.watched():
                    yield frozen
            except asyncio.CancelledError:
                frozen.hurry()
                raise
            except DiskError as error:
                if frozen.trouble and frozen.trouble not in str(error):
                    raise SourceError(f"{self.name}: {frozen.trouble}") from error
                raise
            finally:
                await insist(frozen.release(), hurry=frozen.hurry)
                await frozen.client.close()

    async def clean(self) -> Sequence[str]:
        """Remove what crashed backups left; refused while one is running."""
        async with self._ready() as (client, scratch):
            return await self._sweep(client, scratch)

    async def _sweep(self, client: QmpClient, scratch: Scratch) -> list[str]:
        with making_sense(self.name):
            return await sweep(client, scratch, self._address, self._workers)

    @contextlib.asynccontextmanager
    async def _ready(self) -> AsyncIterator[tuple[QmpClient, Scratch]]:
        """Connected, and with the private directory locked."""
        client = await self._connect()
        try:
            scratch = await self._workers.look_up(
                Scratch, self._address.scratch, str(self._address.monitor)
            )
            await self._workers.look_up(scratch.open, _owner(client))
            try:
                yield client, scratch
            finally:
                await insist(self._put_away(scratch))
        finally:
            await client.close()

    async def _put_away(self, scratch: Scratch) -> None:
        await sweep_files(scratch, self._workers)
        await self._workers.look_up(scratch.close)

    async def _connect(self) -> QmpClient:
        at = self._address.monitor
        client = await open_qmp(self.name, path=at.path, host=at.host, port=at.port)
        if client.version < OLDEST:
            await client.close()
            has, needs = (".".join(map(str, each)) for each in (client.version, OLDEST))
            raise SourceError(f"{self.name}: QEMU {has} is too old; {needs} is needed")
        return client

    async def _name_of(self, client: QmpClient) -> str:
        said = await client.execute("query-name")
        with making_sense(self.name):
            return str(said.get("name") or os.path.basename(str(self._address.monitor)))


def _owner(client: QmpClient) -> tuple[int, int] | None:
    """User and group that QEMU runs as: it may have changed since it began to listen."""
    peer = client.peer
    if peer is None:
        return None
    process, user, group = peer
    with contextlib.suppress(OSError):
        found = os.stat(f"/proc/{process}")
        return found.st_uid, found.st_gid
    return user, group
