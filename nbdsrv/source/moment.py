"""A VM's disks at one moment, for as long as somebody looks at them; its backups do not notice.

::

    Moment.open ── clean, freeze ── disk("vda") ── read ... ── close ──> thawed, the old checkpoint
                                                                         in force as if nothing was

A task of its own holds the freeze from its beginning to its end: what opens a moment and what
closes it may be different tasks, which many context managers do not take well.
"""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError
from nbdsrv.source.hypervisor import Frozen, FrozenDisk
from nbdsrv.source.opening import Machine, open_frozen
from nbdsrv.source.turn import turn

__all__ = ["Moment"]


class Moment:
    """A frozen VM. Belongs to one event loop.

    Attributes:
        vm: its name.
        disks: in the VM's order.
    """

    def __init__(self, machine: Machine, workers: Workers) -> None:
        """Use ``open``."""
        self.vm = ""
        self.disks: Sequence[FrozenDisk] = ()
        self._machine = machine
        self._workers = workers
        self._over = asyncio.Event()
        self._frozen: asyncio.Future[Frozen] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold())

    @classmethod
    async def open(cls, machine: Machine, workers: Workers) -> "Moment":
        """Freeze a VM. End it with ``close``.

        Raises:
            SourceError: it cannot be frozen.
        """
        moment = cls(machine, workers)
        try:
            frozen = await asyncio.shield(moment._frozen)
        except BaseException:
            await moment.close()
            raise
        moment.vm, moment.disks = frozen.vm, tuple(frozen.disks)
        return moment

    def named(self, name: str) -> FrozenDisk:
        """One of its disks; without a name the only one.

        Raises:
            ConfigError: there is none of that name, or there are several.
        """
        chosen = [disk for disk in self.disks if not name or disk.name == name]
        if len(chosen) != 1:
            names = ", ".join(disk.name for disk in self.disks)
            raise ConfigError(f"{self.vm} has the disks {names}: name one of them behind a #")
        return chosen[0]

    async def disk(self, name: str = "") -> Disk:
        """Open a disk; it is to be closed before the moment is.

        Raises:
            ConfigError: as ``named``.
            DiskError: it cannot be opened.
        """
        return await self._opened(self.named(name), AsyncExitStack())

    async def only_disk(self) -> Disk:
        """The only disk; closing it ends the moment. Without it the moment is over.

        Raises:
            ConfigError: there are several.
            DiskError: it cannot be opened.
        """
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.close)
            return await self._opened(self.named(""), stack.pop_all())
        raise AssertionError("unreachable")

    async def _opened(self, frozen: FrozenDisk, stack: AsyncExitStack) -> Disk:
        async with stack:
            inside = await stack.enter_async_context(open_frozen(frozen, self._workers))
            name = f"{self.vm}/{frozen.name}"
            return _View(self._workers, inside, name, stack.pop_all())
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Thaw. Idempotent.

        Raises:
            SourceError: the moment was lost, and what was read may be of a later one; or
                something is left behind, which the next freeze removes.
        """
        self._over.set()
        if not self._frozen.done():
            self._task.cancel()
        await asyncio.shield(self._task)

    async def _hold(self) -> None:
        machine, frozen = self._machine, self._frozen
        try:
            with turn(machine.place):
                await machine.hypervisor.clean()
                async with machine.hypervisor.freeze({}, machine.disks) as now:
                    frozen.set_result(now)
                    await self._over.wait()
                    await now.still_frozen()
        except asyncio.CancelledError:
            frozen.cancel()  # ``close`` came before there was anything to hold
        except Exception as error:
            if frozen.done():
                raise
            frozen.set_exception(error)


class _View(Passthrough):
    """One disk of a moment; what was opened for it is closed with it."""

    def __init__(self, workers: Workers, inside: Disk, name: str, stack: AsyncExitStack) -> None:
        super().__init__(workers, inside)
        self.name = name
        self._stack = stack

    async def close(self) -> None:
        """Close the connection, and the moment if it is this disk's alone."""
        await self._stack.aclose()
