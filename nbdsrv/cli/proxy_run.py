"""What ``nbdsrv proxy`` does once its words are understood.

::

    pass_on    SOURCE ──────────────── Export ── Server ── clients       until a signal
    tee_off    SOURCE ── Tee ───────── Export ── Server ── clients       until a signal, or --once
                          └── Backup ── repositories                     ... then the rest, commit

Repositories have threads of their own: a store that hangs keeps none from clients.
"""

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from nbdsrv.backup.engine import Backup, Order, SourceDisk
from nbdsrv.backup.live import LiveBackup, LiveReport
from nbdsrv.backup.tee import Tee
from nbdsrv.cli.backup_run import Outcome, opened_destinations
from nbdsrv.cli.running import delivering, running_workers
from nbdsrv.cli.serving import (
    Serving,
    announce,
    ignore_signals,
    open_listeners,
    prepare_process,
    tls_context,
    tls_mode,
)
from nbdsrv.cli.stopping import STOP, stoppable, unless_stopped
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.export.exports import Catalogue, Export
from nbdsrv.export.grammar import Kind, Source
from nbdsrv.export.opener import open_source
from nbdsrv.net.listener import Listener
from nbdsrv.net.server import Server
from nbdsrv.ops.notify import notify
from nbdsrv.repository.destination import Storage
from nbdsrv.source.nbd import open_nbd
from nbdsrv.source.nbd_contexts import offered_contexts
from nbdsrv.source.opening import open_hypervisor

__all__ = ["Passing", "pass_on", "tee_off"]


@dataclass(frozen=True, slots=True)
class Passing:
    """What the command line asked for.

    Attributes:
        disks: by the names they are served under.
        serving: where, and to whom.
        once: end with the last client.
        write: let clients write.
        connections: to each source.
        machine: in place of ``disks``, a running VM.
    """

    disks: Mapping[str, Source]
    serving: Serving
    once: bool
    write: bool
    connections: int
    machine: Sequence[Source] = ()


async def pass_on(passing: Passing) -> None:
    """Serve until told to stop.

    Raises:
        NbdsrvError: a source cannot be opened, or nothing can be listened to.
    """
    prepare_process(passing.serving)
    _endure_hang_ups()
    workers = Workers()
    listeners = open_listeners(passing.serving)
    stop = asyncio.Event()
    with _closing(listeners), STOP.acting(stop.set, passing.serving.patience_s):
        front = _Front(passing, workers, listeners)
        for name, source in passing.disks.items():
            opening = partial(_open, source, workers, passing)
            # Not the whole path: where things lie is no concern of a client.
            front.add(name, os.path.basename(source.location), opening)
        with delivering(workers):  # fail now rather than when the first client comes
            opened = await unless_stopped(_look_at(front.catalogue))
        if opened:
            await front.serve(stop)
    workers.close()
    ignore_signals()


async def tee_off(
    passing: Passing, repositories: Sequence[Source], order: Order, storage: Storage
) -> Outcome:
    """Serve until told to stop, then make a restore point of what is served.

    Raises:
        NbdsrvError: a source cannot be read, or no point was made.
        Stopped: twice.
    """
    prepare_process(passing.serving)
    _endure_hang_ups()
    try:
        work = _tee_off(passing, repositories, order, storage)
        return await stoppable(work, "no restore point was made")
    finally:
        ignore_signals()


async def _tee_off(
    passing: Passing,
    repositories: Sequence[Source],
    order: Order,
    storage: Storage,
) -> Outcome:
    workers = Workers()
    async with running_workers() as storing:
        with ExitStack() as stack:
            listeners = open_listeners(passing.serving)
            stack.enter_context(_closing(listeners))
            opened, failed = opened_destinations(repositories, stack, storage)
            outside = stack.enter_context(ExitStack())
            outside.enter_context(delivering(workers))
            front = _Front(passing, workers, listeners)

            async def meanwhile(tees: Mapping[str, Tee]) -> None:
                for name, tee in tees.items():
                    source = passing.disks.get(name)
                    said = f"disk {name}" if source is None else os.path.basename(source.location)
                    front.add(name, said, partial(_itself, tee))
                outside.close()  # the server's reactor does it, while there is one
                stop = asyncio.Event()
                with STOP.acting(stop.set, final=False):
                    await front.serve(stop)
                outside.enter_context(delivering(workers))

            targets = [destination for destination, _ in opened]
            if passing.machine:
                live = LiveBackup(targets, storing, order, absent=bool(failed))
                machine = open_hypervisor(passing.machine, storing)
                done = await live.run(machine, meanwhile=meanwhile)
            else:
                disks = [
                    SourceDisk(name, partial(_opened, source, workers, passing), source)
                    for name, source in passing.disks.items()
                ]
                work = Backup(targets, storing, order)
                done = LiveReport(order.group, await work.run(disks, meanwhile))
    workers.close()
    report = done.report
    # As the user named them: what is printed can be used again.
    texts = {destination.name: source.text for destination, source in opened}
    report.disks = [dataclasses.replace(d, repository=texts[d.repository]) for d in report.disks]
    report.failed = [dataclasses.replace(f, repository=texts[f.repository]) for f in report.failed]
    report.failed += failed
    return Outcome(report=report, cleaned=list(done.cleaned), warnings=done.warnings)


# --- sources --------------------------------------------------------------------------------------


async def _open(
    source: Source, workers: Workers, passing: Passing, contexts: Sequence[str] = ()
) -> Disk:
    """A source, with all meta contexts its server has, and these."""
    if source.kind is not Kind.NBD or source.partition is not None:
        return await open_source(source, workers, writable=passing.write)
    offered = await offered_contexts(source.location, workers)
    wanted = tuple(dict.fromkeys([*offered, *contexts]))
    return await open_nbd(
        source.location,
        workers,
        writable=passing.write,
        connections=passing.connections,
        contexts=wanted,
    )


@asynccontextmanager
async def _opened(
    source: Source, workers: Workers, passing: Passing, contexts: Sequence[str]
) -> AsyncIterator[Disk]:
    disk = await _open(source, workers, passing, contexts)
    try:
        yield disk
    finally:
        await disk.close()


async def _itself(tee: Tee) -> Disk:
    return tee


# --- serving --------------------------------------------------------------------------------------


def _endure_hang_ups() -> None:
    """A hang-up must not end the server of a closed terminal's session."""
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)  # ignored, it would be inherited


async def _look_at(catalogue: Catalogue) -> None:
    for export in catalogue:
        await export.acquire()
        await export.release()


class _Front:
    """The side that clients see.

    Attributes:
        catalogue: what they are served.
    """

    def __init__(self, passing: Passing, workers: Workers, listeners: Sequence[Listener]) -> None:
        self.catalogue = Catalogue()
        self._passing = passing
        self._workers = workers
        self._listeners = listeners
        self._came = asyncio.Event()

    def add(
        self, name: str, description: str, opening: "partial[Coroutine[Any, Any, Disk]]"
    ) -> None:
        """One export."""

        async def opened() -> Disk:
            disk = await opening()
            self._came.set()
            return disk

        self.catalogue.add(
            Export(
                name=name,
                open=opened,
                description=description,
                tls_only=name in self._passing.serving.tls_exports,
            )
        )

    async def serve(self, stop: asyncio.Event) -> None:
        """Until told to stop, or, if that was asked for, the last client has left."""
        serving = self._passing.serving
        mode = tls_mode(serving, self.catalogue)
        context = tls_context(serving, mode)
        self._came.clear()
        server = Server(
            self.catalogue, self._workers, limits=serving.limits, tls=mode, context=context
        )
        server.listen(self._listeners)
        self._workers.muster()
        try:
            announce(self.catalogue, self._listeners, mode)
            await self._end(server, stop)
            notify("STOPPING=1")
        finally:
            await server.stop()

    async def _end(self, server: Server, stop: asyncio.Event) -> None:
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(stop.wait())]
        if self._passing.once:
            waits.append(asyncio.ensure_future(self._left(server)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _left(self, server: Server) -> None:
        await self._came.wait()
        await server.wait_empty()


@contextlib.contextmanager
def _closing(listeners: Sequence[Listener]) -> Iterator[None]:
    """Closed, whatever happens; a server has closed them already."""
    try:
        yield
    finally:
        for listener in listeners:
            listener.close()
