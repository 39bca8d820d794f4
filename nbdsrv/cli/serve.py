"""``nbdsrv serve``: exports over NBD until SIGTERM or SIGINT."""

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import uvloop

from nbdsrv.cli.running import delivering
from nbdsrv.cli.serving import (
    STDIO,
    Serving,
    announce,
    ignore_signals,
    open_listeners,
    prepare_process,
    server_options,
    tls_context,
    tls_mode,
)
from nbdsrv.disk.blocks import DEFAULT_CACHE, BlockCache
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError
from nbdsrv.export.exports import Catalogue, Export
from nbdsrv.export.grammar import Kind, Source, parse_source
from nbdsrv.export.opener import open_collection, open_source
from nbdsrv.net.server import Server
from nbdsrv.net.stdio import standard_stream
from nbdsrv.ops.logs import set_up
from nbdsrv.ops.notify import notify

__all__ = ["serve"]

_MANY = frozenset({Kind.REPOSITORY, Kind.HYPERVISOR})
"""Kinds of SOURCE that are several exports."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line asked for."""

    serving: Serving
    sources: tuple[str, ...]
    exports: tuple[str, ...]
    write: bool
    cache: int


@click.command()
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.option(
    "--export", "exports", multiple=True, metavar="NAME=SOURCE", help="Serve SOURCE under NAME."
)
@click.option("--write", is_flag=True, help="Let clients write. Without it all is read-only.")
@server_options
@click.option(
    "--cache",
    type=click.IntRange(0, 1 << 20),
    default=DEFAULT_CACHE >> 20,
    show_default=True,
    help="MiB of decoded blocks kept, of compressed images.",
)
@click.option("-v", "--verbose", count=True, help="Log more; twice for debugging.")
def serve(verbose: int, **options: Any) -> None:
    """Serve each SOURCE over NBD.

    A repository (repo:/path) is served whole: every disk of every restore point, as they come and
    go, under GROUP/DISK@POINT and GROUP/DISK@latest. A running VM (qemu:, libvirt:, xapi:) is
    served as it is now, under VM/DISK, until the server stops.

    Prints one NBD URI per export or repository once connections are accepted. SIGTERM finishes
    what is in flight and exits with 0. Sockets handed over by systemd (LISTEN_FDS) are used if
    there is no --listen.
    """
    serving = Serving.taken_from(options)
    settings = Settings(serving, **options)
    set_up(verbose)
    uvloop.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    serving = settings.serving
    prepare_process(serving)
    workers = Workers(cache=BlockCache(settings.cache << 20))
    catalogue = Catalogue()
    try:
        with delivering(workers):
            await _fill(catalogue, settings, workers)
        await _serve_all(catalogue, settings, workers)
    finally:  # a VM that is frozen must not stay so
        with delivering(workers):
            for collection in catalogue.collections:
                await collection.close()
    workers.close()
    ignore_signals()


async def _serve_all(catalogue: Catalogue, settings: Settings, workers: Workers) -> None:
    serving = settings.serving
    if not len(catalogue) and not catalogue.collections:
        raise ConfigError("nothing to serve; give a SOURCE or --export NAME=SOURCE")
    mode = tls_mode(serving, catalogue)
    context = tls_context(serving, mode)
    await _check(catalogue, workers)
    limits = serving.limits
    stop = _stop_on_signals()
    stream = None
    if STDIO in serving.listen:
        if len(serving.listen) > 1:
            raise ConfigError("--listen stdio serves one client and goes with no other --listen")
        stream = standard_stream()
        server = Server(catalogue, workers, limits=limits, tls=mode, context=context)
        server.serve(stream.sock)
        await _first(stop, server)
    else:
        listeners = open_listeners(serving)
        server = Server(catalogue, workers, limits=limits, tls=mode, context=context)
        server.listen(listeners)
        announce(catalogue, listeners, mode)
        await stop.wait()
    notify("STOPPING=1")
    await server.stop()
    if stream is not None:
        stream.finish(serving.drain_timeout)


async def _fill(catalogue: Catalogue, settings: Settings, workers: Workers) -> None:
    given = len(settings.sources)
    for n, (name, source) in enumerate(_named_sources(settings)):
        if source.kind in _MANY and source.partition is None:
            prefix = f"{name}/" if n >= given else ""  # two repositories may have the same VMs
            tls_only = name in settings.serving.tls_exports
            collection = await open_collection(source, workers, name, prefix, tls_only=tls_only)
            if collection is not None:
                catalogue.collections.append(collection)
                continue
        catalogue.add(_export(name, source, settings, workers))


def _named_sources(settings: Settings) -> list[tuple[str, Source]]:
    named = []
    for text in settings.sources:
        source = parse_source(text)
        name = source.selector if source.kind is Kind.REPOSITORY else ""
        named.append((name or os.path.basename(source.location.rstrip("/")) or text, source))
    for text in settings.exports:
        name, equals, rest = text.partition("=")
        if not equals:
            raise ConfigError(f"--export {text}: expected NAME=SOURCE")
        named.append((name, parse_source(rest)))
    return named


def _export(name: str, source: Source, settings: Settings, workers: Workers) -> Export:
    return Export(
        name=name,
        open=partial(open_source, source, workers, writable=settings.write),
        # Not the whole path: where things lie on this host is no concern of a client.
        description=os.path.basename(source.location),
        tls_only=name in settings.serving.tls_exports,
    )


async def _check(catalogue: Catalogue, workers: Workers) -> None:
    """Fail now rather than when the first client comes."""
    with delivering(workers):
        for export in catalogue:
            await export.acquire()
            await export.release()


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Nothing to reload; but a hang-up must not end the server of a closed terminal's session.
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    return stop


async def _first(stop: asyncio.Event, server: Server) -> None:
    """Until told to stop or, on standard input, until the one client has left."""
    waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(server.wait_empty())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await wait
