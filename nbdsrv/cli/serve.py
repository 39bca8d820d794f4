"""``nbdsrv serve``: exports over NBD until SIGTERM or SIGINT."""

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import click
import uvloop

from nbdsrv.cli.running import delivering
from nbdsrv.disk.blocks import DEFAULT_CACHE, BlockCache
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError
from nbdsrv.export.exports import Catalogue, Export
from nbdsrv.export.grammar import Kind, Source, parse_source
from nbdsrv.export.opener import open_collection, open_source
from nbdsrv.net.listener import Listener, activated_sockets, listen
from nbdsrv.net.server import Limits, Server
from nbdsrv.net.stdio import standard_stream
from nbdsrv.net.tls import server_context
from nbdsrv.ops.logs import set_up
from nbdsrv.ops.notify import notify
from protocol.constants import NBD_PORT
from protocol.handshake.events import TlsMode
from protocol.uri import Uri

__all__ = ["serve"]

DEFAULT_LISTEN = f"127.0.0.1:{NBD_PORT}"
STDIO = "stdio"
SWITCH_S = 0.0005
"""Seconds after which a waiting thread gets the interpreter; a tenth of Python's default."""
_DEFAULTS = Limits()


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line asked for."""

    sources: tuple[str, ...]
    exports: tuple[str, ...]
    listen: tuple[str, ...]
    write: bool
    tls: str | None
    tls_cert: str | None
    tls_key: str | None
    tls_ca: str | None
    tls_exports: tuple[str, ...]
    socket_mode: str
    max_connections: int
    handshake_timeout: float
    drain_timeout: float
    memory: int
    cache: int


@click.command()
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.option(
    "--export", "exports", multiple=True, metavar="NAME=SOURCE", help="Serve SOURCE under NAME."
)
@click.option(
    "--listen",
    multiple=True,
    metavar="WHERE",
    envvar="NBDSRV_LISTEN",
    help=f"HOST:PORT, unix:PATH or stdio; repeatable.  [default: {DEFAULT_LISTEN}]",
)
@click.option("--write", is_flag=True, help="Let clients write. Without it all is read-only.")
@click.option("--tls-cert", metavar="FILE", envvar="NBDSRV_TLS_CERT", help="Certificate, PEM.")
@click.option("--tls-key", metavar="FILE", envvar="NBDSRV_TLS_KEY", help="Its key, PEM.")
@click.option(
    "--tls-ca",
    metavar="FILE",
    envvar="NBDSRV_TLS_CA",
    help="Demand client certificates signed by this CA, PEM.",
)
@click.option(
    "--tls",
    type=click.Choice([mode.value for mode in TlsMode]),
    help="[default: required with --tls-cert, off without]",
)
@click.option(
    "--tls-export",
    "tls_exports",
    multiple=True,
    metavar="NAME",
    help="With --tls per-export: an export that is served over TLS only.",
)
@click.option(
    "--socket-mode", default="600", show_default=True, help="Permissions of Unix sockets, octal."
)
@click.option(
    "--max-connections",
    type=click.IntRange(1, 1_000_000),
    default=_DEFAULTS.connections,
    show_default=True,
)
@click.option(
    "--handshake-timeout",
    type=click.FloatRange(0.01, 3600),
    default=_DEFAULTS.handshake_s,
    show_default=True,
    help="Seconds a client may take to choose an export.",
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(0, 3600),
    default=_DEFAULTS.drain_s,
    show_default=True,
    help="Seconds SIGTERM waits for requests in flight.",
)
@click.option(
    "--memory",
    type=click.IntRange(64, 1 << 20),
    default=_DEFAULTS.memory >> 20,
    show_default=True,
    help="MiB lent to requests in flight at any one time.",
)
@click.option(
    "--cache",
    type=click.IntRange(0, 1 << 20),
    default=DEFAULT_CACHE >> 20,
    show_default=True,
    help="MiB of decoded blocks kept, of compressed images.",
)
@click.option("-v", "--verbose", count=True, help="Log more; twice for debugging.")
def serve(verbose: int, **options: object) -> None:
    """Serve each SOURCE over NBD.

    A repository (repo:/path) is served whole: every disk of every restore point, as they come and
    go, under GROUP/DISK@POINT and GROUP/DISK@latest.

    Prints one NBD URI per export or repository once connections are accepted. SIGTERM finishes
    what is in flight and exits with 0. Sockets handed over by systemd (LISTEN_FDS) are used if
    there is no --listen.
    """
    settings = Settings(**options)  # type: ignore[arg-type]
    set_up(verbose)
    uvloop.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    if not (settings.handshake_timeout > 0 and settings.drain_timeout >= 0):  # nan is neither
        raise ConfigError("--handshake-timeout and --drain-timeout are numbers of seconds")
    _raise_descriptor_limit(settings.max_connections)
    # A thread that stores writes must not keep the loop from the interpreter for the usual 5 ms.
    sys.setswitchinterval(SWITCH_S)
    workers = Workers(cache=BlockCache(settings.cache << 20))
    with delivering(workers):
        catalogue = await _catalogue(settings, workers)
    if not len(catalogue) and not catalogue.collections:
        raise ConfigError("nothing to serve; give a SOURCE or --export NAME=SOURCE")
    mode = _tls_mode(settings, catalogue)
    context = None
    if mode is not TlsMode.OFF:
        assert settings.tls_cert is not None
        assert settings.tls_key is not None
        context = server_context(settings.tls_cert, settings.tls_key, settings.tls_ca)
    await _check(catalogue, workers)
    limits = Limits(
        settings.max_connections,
        settings.handshake_timeout,
        settings.drain_timeout,
        settings.memory << 20,
    )
    stop = _stop_on_signals()
    stream = None
    if STDIO in settings.listen:
        if len(settings.listen) > 1:
            raise ConfigError("--listen stdio serves one client and goes with no other --listen")
        stream = standard_stream()
        server = Server(catalogue, workers, limits=limits, tls=mode, context=context)
        server.serve(stream.sock)
        await _first(stop, server)
    else:
        listeners = _listeners(settings)
        server = Server(catalogue, workers, limits=limits, tls=mode, context=context)
        server.listen(listeners)
        _announce(catalogue, listeners, mode)
        await stop.wait()
    notify("STOPPING=1")
    await server.stop()
    with delivering(workers):
        for collection in catalogue.collections:
            await collection.close()
    workers.close()
    if stream is not None:
        stream.finish(settings.drain_timeout)
    _ignore_signals()


async def _catalogue(settings: Settings, workers: Workers) -> Catalogue:
    catalogue = Catalogue()
    given = len(settings.sources)
    for n, (name, source) in enumerate(_named_sources(settings)):
        if source.kind is Kind.REPOSITORY and source.partition is None:
            prefix = f"{name}/" if n >= given else ""  # two repositories may have the same VMs
            tls_only = name in settings.tls_exports
            collection = await open_collection(source, workers, name, prefix, tls_only=tls_only)
            if collection is not None:
                catalogue.collections.append(collection)
                continue
        catalogue.add(_export(name, source, settings, workers))
    return catalogue


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
        tls_only=name in settings.tls_exports,
    )


async def _check(catalogue: Catalogue, workers: Workers) -> None:
    """Fail now rather than when the first client comes."""
    with delivering(workers):
        for export in catalogue:
            await export.acquire()
            await export.release()


def _tls_mode(settings: Settings, catalogue: Catalogue) -> TlsMode:
    given = settings.tls_cert is not None and settings.tls_key is not None
    if not given and (settings.tls_cert or settings.tls_key or settings.tls_ca):
        raise ConfigError("TLS needs both --tls-cert and --tls-key")
    if settings.tls is None:
        mode = TlsMode.REQUIRED if given else TlsMode.OFF
    else:
        mode = TlsMode(settings.tls)
    if mode is not TlsMode.OFF and not given:
        raise ConfigError(f"--tls {mode.value} needs --tls-cert and --tls-key")
    if settings.tls_exports and mode is not TlsMode.PER_EXPORT:
        raise ConfigError("--tls-export goes with --tls per-export")
    names = {each.name for each in (*catalogue, *catalogue.collections)}
    for name in settings.tls_exports:
        if name not in names:
            raise ConfigError(f"--tls-export {name}: no such export")
    return mode


def _listeners(settings: Settings) -> list[Listener]:
    if not settings.listen and (activated := activated_sockets(os.environ)):
        return activated
    try:
        mode = int(settings.socket_mode, 8)
        if not 0 <= mode <= 0o777:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--socket-mode {settings.socket_mode}: expected octal digits") from None
    opened: list[Listener] = []
    try:
        for where in settings.listen or (DEFAULT_LISTEN,):
            opened += listen(where, socket_mode=mode & 0o777)
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    return opened


def _announce(catalogue: Catalogue, listeners: Sequence[Listener], mode: TlsMode) -> None:
    uris = []
    for listener in listeners:
        lone = len(catalogue) == 1 and not catalogue.collections
        for export in catalogue:
            secure = mode is TlsMode.REQUIRED or export.tls_only
            uris.append(str(_uri(listener, "" if lone else export.name, secure=secure)))
        for collection in catalogue.collections:  # its exports come and go: ask for the list
            secure = mode is TlsMode.REQUIRED or collection.tls_only
            uris.append(str(_uri(listener, "", secure=secure)))
    print(*dict.fromkeys(uris), sep="\n", flush=True)
    repositories = f", {len(catalogue.collections)} repositories" if catalogue.collections else ""
    notify(f"READY=1\nSTATUS=serving {len(catalogue)} exports{repositories}")


def _uri(listener: Listener, name: str, *, secure: bool) -> Uri:
    address = listener.address
    if isinstance(address, str):
        return Uri(tls=secure, socket=os.path.abspath(address), export=name)
    host, port = address
    return Uri(tls=secure, host=host, port=port, export=name)


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Nothing to reload; but a hang-up must not end the server of a closed terminal's session.
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    return stop


def _ignore_signals() -> None:
    """We are on our way out: being told so once more must not change the exit code."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


async def _first(stop: asyncio.Event, server: Server) -> None:
    """Until told to stop or, on standard input, until the one client has left."""
    waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(server.wait_empty())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await wait


def _raise_descriptor_limit(connections: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
