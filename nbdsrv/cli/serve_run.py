"""A server from its first export to its last client.

::

    understand ── Offers ── Doors ── Server ── announce ─┬─ SIGTERM, SIGINT ── drained, exit 0
                                                         ├─ SIGHUP, `reload` ── the file again
                                                         └─ Admin, MetricsEndpoint, Audit, Watchdog

Rule: a reload that fails anywhere leaves everything as it was, and says so.
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from typing import TYPE_CHECKING

from nbdsrv.cli.running import delivering
from nbdsrv.cli.serve_order import Order, Wanted, understand
from nbdsrv.cli.serving import (
    DEFAULT_LISTEN,
    STDIO,
    announce,
    ignore_signals,
    prepare_process,
    socket_mode,
    tls_context,
    tls_mode,
)
from nbdsrv.cli.stopping import STOP, unless_stopped
from nbdsrv.disk.blocks import BlockCache
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError, NbdsrvError
from nbdsrv.export.exports import Catalogue
from nbdsrv.net.server import Server
from nbdsrv.net.stdio import standard_stream
from nbdsrv.ops.admin import Admin, Question
from nbdsrv.ops.audit import Audit
from nbdsrv.ops.doors import Doors
from nbdsrv.ops.logs import AUDIT, set_up
from nbdsrv.ops.notify import notify
from nbdsrv.ops.offers import Offers, Plan
from nbdsrv.ops.rates import Rates
from nbdsrv.ops.status import Overview, Reloads
from nbdsrv.ops.watchdog import Watchdog

if TYPE_CHECKING:
    from nbdsrv.ops.metrics import MetricsEndpoint

__all__ = ["check", "serve_until_told"]

log = logging.getLogger(__name__)

TICK_S = 1.0
FAREWELL_S = 1.0
"""Seconds a reload that moves the admin socket has to be answered on the old one."""


async def check(order: Order) -> tuple[int, int]:
    """Understand, and open everything once; serves nothing. How many exports, and collections.

    Raises:
        NbdsrvError: what a server would have said.
    """
    wanted = understand(order)
    workers = Workers(cache=BlockCache(wanted.cache))
    catalogue = Catalogue()
    offers = Offers(catalogue, workers)
    try:
        with delivering(workers):
            plan = await offers.prepare(wanted.offers)
            _want_something(plan, order)
            offers.commit(plan)
            tls_context(wanted.serving, tls_mode(wanted.serving, catalogue))
            await offers.close()
    finally:
        workers.close()
    return len(catalogue), len(catalogue.collections)


async def serve_until_told(order: Order) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        NbdsrvError: something cannot be opened, or not be listened on.
    """
    wanted = understand(order)
    set_up(wanted.verbosity, wanted.log_format)
    prepare_process(wanted.serving)
    workers = Workers(cache=BlockCache(wanted.cache))
    service = _Service(order, wanted, workers)
    with STOP.acting(service.stop.set, wanted.serving.patience_s):
        try:
            with delivering(workers):
                opened = await unless_stopped(service.open())
            if not opened:
                log.info("stop.early: nothing was served")
            elif STDIO in wanted.serving.listen:
                await service.serve_stdio()
            else:
                await service.serve()
        finally:  # a VM that is frozen must not stay so
            with delivering(workers):
                await service.offers.close()
    workers.close()
    ignore_signals()


class _Service:
    """One server's.

    Attributes:
        stop: ends serving.
        offers: what is served.
    """

    def __init__(self, order: Order, wanted: Wanted, workers: Workers) -> None:
        self._order = order
        self._wanted = wanted
        self._workers = workers
        self._catalogue = Catalogue()
        self.offers = Offers(self._catalogue, workers)
        self._audit = Audit(wanted.audit_file)
        self.stop = asyncio.Event()
        self._ready = False
        self._hung_up_early = False
        self._reloading = asyncio.Lock()
        self._reloads = Reloads()
        self._tasks: set[asyncio.Task[None]] = set()
        self._doors = Doors(service=order.config is not None)
        self._admin: Admin | None = None
        self._metrics: MetricsEndpoint | None = None
        if order.config is not None:
            logging.getLogger(AUDIT).setLevel(logging.INFO)

    async def open(self) -> None:
        """Open what is to be served, and look whether it can be read."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hung_up)
        plan = await self.offers.prepare(self._wanted.offers)
        _want_something(plan, self._order)
        self.offers.commit(plan)

    def _server(self) -> Server:
        serving = self._wanted.serving
        mode = tls_mode(serving, self._catalogue)
        server = Server(
            self._catalogue,
            self._workers,
            limits=serving.limits,
            tls=mode,
            context=tls_context(serving, mode),
            observer=self._audit,
        )
        self.offers.traffic = server.traffic
        return server

    async def serve_stdio(self) -> None:
        """One client, on standard input and output."""
        serving = self._wanted.serving
        if len(serving.listen) > 1:
            raise ConfigError("--listen stdio serves one client and goes with no other --listen")
        server = self._server()
        stream = standard_stream()
        server.serve(stream.sock)
        await _first(self.stop, server)
        notify("STOPPING=1")
        await server.stop()
        stream.finish(serving.drain_timeout)

    async def serve(self) -> None:
        """Any number, until told to stop."""
        self._doors.take_over(os.environ)
        server = self._server()
        opened = self._doors.open(self._places(self._wanted))
        try:
            server.listen(opened)
            self._workers.muster()
            self._overview = Overview(
                server,
                self._catalogue,
                self.offers,
                self._workers,
                Rates(server),
                self._reloads,
                self._order.config,
            )
            await self._open_windows(self._wanted)
            announce(self._catalogue, self._doors.listeners, server.tls)
            self._doors.store()
            self._ready = True
            if self._hung_up_early:
                self._hung_up()
            await self._until_told(server)
        finally:
            for each in (self._admin, self._metrics):
                if each is not None:
                    await each.close()
            await server.stop()
            self._audit.close()

    async def _until_told(self, server: Server) -> None:
        watchdog = Watchdog()
        if self._order.config or self._admin or self._metrics:
            server.watch()
        ticking = asyncio.create_task(self._tick())
        try:
            await self.stop.wait()
        finally:
            ticking.cancel()
            watchdog.close()
            if self._tasks:
                await asyncio.wait(self._tasks)
            notify("STOPPING=1")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._overview.rates.sample()
            self.offers.clean_up()

    def _places(self, wanted: Wanted) -> list[tuple[str, int]]:
        serving = wanted.serving
        return self._doors.places(serving.listen, DEFAULT_LISTEN, socket_mode(serving))

    # --- being looked at ------------------------------------------------------

    async def _open_windows(self, wanted: Wanted) -> None:
        """The admin socket and the metrics, where they are wanted and not there yet."""
        if wanted.admin_socket is not None and not self._admin:
            self._admin = await self._opened_admin(wanted.admin_socket)
        if wanted.metrics is not None and not self._metrics:
            self._metrics = self._opened_metrics(wanted.metrics)

    async def _opened_admin(self, path: str) -> Admin:
        admin = Admin(
            path,
            {
                "status": self._tell_status,
                "exports": self._tell_exports,
                "clients": self._tell_clients,
                "reload": self._reload_when_asked,
                "drop-client": self._drop_client,
            },
        )
        await admin.open()
        return admin

    def _opened_metrics(self, where: str) -> "MetricsEndpoint":
        from nbdsrv.ops.metrics import MetricsEndpoint

        return MetricsEndpoint(where, self._overview)

    async def _tell_status(self, _question: Question) -> object:
        return self._overview.document()

    async def _tell_exports(self, _question: Question) -> object:
        return self._overview.exports()

    async def _tell_clients(self, _question: Question) -> object:
        return self._overview.clients()

    async def _drop_client(self, question: Question) -> object:
        server = self._overview.server
        for session in list(server.sessions.values()):
            if session.id == question.id:
                server.drop(session, "dropped by the administrator")
                return {"dropped": question.id}
        raise DiskError(f"there is no client {question.id}")

    # --- reloads ------------------------------------------------------

    def _hung_up(self) -> None:
        # Without a file there is little to reload; but a hang-up must not end the server of a
        # closed terminal's session.
        if self.stop.is_set() or not (self._order.config or self._order.audit_file):
            return
        if STDIO in self._wanted.serving.listen:
            self._reopen_audit()  # there is no file, and so nothing else that could change
            return
        if not self._ready:
            self._hung_up_early = True
            return
        task = asyncio.get_running_loop().create_task(self._reload_and_say())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _reopen_audit(self) -> None:
        try:
            self._audit.reopen(self._wanted.audit_file)
        except ConfigError as error:
            log.error("audit.kept reason=%s", error)  # noqa: TRY400

    async def _reload_and_say(self) -> None:
        with contextlib.suppress(NbdsrvError):  # said already
            await self._reload()

    async def _reload_when_asked(self, _question: Question) -> object:
        if self._order.config is None:
            raise DiskError("there is nothing to reload: the server was started without --config")
        return await self._reload()

    async def _reload(self) -> dict[str, object]:
        async with self._reloading:
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            self._reloads.when = time.time()
            try:
                done = await self._take_up(await self._workers.look_up(understand, self._order))
            except NbdsrvError as error:
                self._reloads.failed += 1
                self._reloads.error = str(error)
                log.error("reload.failed reason=%s; everything stays as it was", error)  # noqa: TRY400
                notify(f"READY=1\nSTATUS=reload failed, the old configuration is kept: {error}")
                raise
            self._reloads.count += 1
            self._reloads.error = None
            log.warning("reload.done %s", " ".join(f"{k}={v!r}" for k, v in done.items()))
            notify(f"READY=1\nSTATUS=serving {len(self.offers.served)} exports and repositories")
            return done

    async def _take_up(self, wanted: Wanted) -> dict[str, object]:
        server, serving, before = self._overview.server, wanted.serving, self._wanted
        plan = await self.offers.prepare(wanted.offers)
        fresh: list[Admin | MetricsEndpoint] = []
        try:
            _want_something(plan, self._order)
            mode = tls_mode(serving, plan.catalogue)
            context = await self._workers.look_up(tls_context, serving, mode)
            admin, metrics = self._admin, self._metrics
            if wanted.admin_socket != before.admin_socket and wanted.admin_socket is not None:
                admin = await self._opened_admin(wanted.admin_socket)
                fresh.append(admin)
            if wanted.metrics != before.metrics and wanted.metrics is not None:
                metrics = self._opened_metrics(wanted.metrics)
                fresh.append(metrics)
            self._doors.change(self._places(wanted), server)
            try:
                self._audit.reopen(wanted.audit_file)
            except NbdsrvError:
                self._doors.change(self._places(before), server)
                raise
        except BaseException:
            for each in fresh:
                await each.close()
            await self.offers.discard(plan)
            raise
        self.offers.commit(plan)
        self._doors.store()
        await self._swap_windows(
            admin if wanted.admin_socket else None, metrics if wanted.metrics else None
        )
        server.change(limits=serving.limits, tls=mode, context=context)
        server.buffers.budget = serving.limits.memory
        self._workers.cache.limit = wanted.cache
        prepare_process(serving)
        set_up(wanted.verbosity, wanted.log_format)
        server.forget_unserved()
        self._wanted = wanted
        leaving = sum(not self._catalogue.has(each.export) for each in server.sessions.values())
        return {
            "added": plan.added,
            "removed": plan.removed,
            "changed": plan.changed,
            "leaving": leaving,
        }

    async def _swap_windows(self, admin: Admin | None, metrics: "MetricsEndpoint | None") -> None:
        """The old ones are where they were no more: the next reload may want to be there."""
        old_admin, old_metrics = self._admin, self._metrics
        self._admin, self._metrics = admin, metrics
        if old_admin is not None and old_admin is not admin:
            old_admin.retire()
            task = asyncio.get_running_loop().create_task(_close_soon(old_admin))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if old_metrics is not None and old_metrics is not metrics:
            await old_metrics.close()


def _want_something(plan: Plan, order: Order) -> None:
    """A server of nothing is a mistake."""
    if not plan.served:
        if order.config is None:
            raise ConfigError("nothing to serve; give a SOURCE or --export NAME=SOURCE")
        hint = "add an [[export]] or a [repository.NAME]"
        raise ConfigError(f"{order.config}: nothing to serve; {hint}")


async def _close_soon(admin: Admin) -> None:
    await asyncio.sleep(FAREWELL_S)
    await admin.close()


async def _first(stop: asyncio.Event, server: Server) -> None:
    """Until told to stop or, on standard input, until the one client has left."""
    waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(server.wait_empty())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
