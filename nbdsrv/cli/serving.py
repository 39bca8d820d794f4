"""What ``serve`` and ``proxy`` have in common: where they listen, for whom, and until when.

::

    options ── Serving ── tls_mode ── open_listeners ── Server ── announce ── a signal ── stop
"""

import contextlib
import os
import resource
import signal
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import click

from nbdsrv.cli.stopping import PATIENCE_S, STOP
from nbdsrv.errors import ConfigError
from nbdsrv.export.exports import Catalogue
from nbdsrv.net.listener import Listener, activated_sockets, listen
from nbdsrv.net.server import Limits
from nbdsrv.net.tls import server_context
from nbdsrv.ops.arenas import few_arenas
from nbdsrv.ops.notify import notify
from protocol.constants import NBD_PORT
from protocol.handshake.events import TlsMode
from protocol.uri import Uri

__all__ = [
    "DEFAULT_LISTEN",
    "STDIO",
    "Serving",
    "announce",
    "ignore_signals",
    "open_listeners",
    "prepare_process",
    "server_options",
    "socket_mode",
    "tls_context",
    "tls_mode",
]

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_LISTEN = f"127.0.0.1:{NBD_PORT}"
STDIO = "stdio"
SWITCH_S = 0.0005
"""Seconds after which a waiting thread gets the interpreter; a tenth of Python's default."""
_DEFAULTS = Limits()


@dataclass(frozen=True, slots=True)
class Serving:
    """What the command line asked for."""

    listen: tuple[str, ...]
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

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> "Serving":
        """Those of ``server_options``; they are removed from ``options``.

        Raises:
            ConfigError: a number that is none.
        """
        serving = cls(**{field.name: options.pop(field.name) for field in fields(cls)})
        if not (serving.handshake_timeout > 0 and serving.drain_timeout >= 0):  # nan is neither
            raise ConfigError("--handshake-timeout and --drain-timeout are numbers of seconds")
        return serving

    @property
    def patience_s(self) -> float:
        """Seconds from a signal to stop until what is silent is waited for no more."""
        return self.drain_timeout + PATIENCE_S

    @property
    def limits(self) -> Limits:
        """For the server."""
        return Limits(
            self.max_connections, self.handshake_timeout, self.drain_timeout, self.memory << 20
        )


_OPTIONS = (
    click.option(
        "--listen",
        multiple=True,
        metavar="WHERE",
        envvar="NBDSRV_LISTEN",
        help=f"HOST:PORT, unix:PATH or stdio; repeatable.  [default: {DEFAULT_LISTEN}]",
    ),
    click.option("--tls-cert", metavar="FILE", envvar="NBDSRV_TLS_CERT", help="Certificate, PEM."),
    click.option("--tls-key", metavar="FILE", envvar="NBDSRV_TLS_KEY", help="Its key, PEM."),
    click.option(
        "--tls-ca",
        metavar="FILE",
        envvar="NBDSRV_TLS_CA",
        help="Demand client certificates signed by this CA, PEM.",
    ),
    click.option(
        "--tls",
        type=click.Choice([mode.value for mode in TlsMode]),
        help="Who must use TLS: nobody, everybody, or who opens a --tls-export.  [default: required"
        " with --tls-cert, off without]",
    ),
    click.option(
        "--tls-export",
        "tls_exports",
        multiple=True,
        metavar="NAME",
        help="With --tls per-export: an export that is served over TLS only; repeatable.",
    ),
    click.option(
        "--socket-mode",
        metavar="OCTAL",
        default="600",
        show_default=True,
        help="Permissions of Unix sockets.",
    ),
    click.option(
        "--max-connections",
        type=click.IntRange(1, 1_000_000),
        default=_DEFAULTS.connections,
        show_default=True,
        metavar="N",
        help="Connections at any one time.",
    ),
    click.option(
        "--handshake-timeout",
        type=click.FloatRange(0.01, 3600),
        default=_DEFAULTS.handshake_s,
        metavar="S",
        show_default=True,
        help="Seconds a client may take to choose an export.",
    ),
    click.option(
        "--drain-timeout",
        type=click.FloatRange(0, 3600),
        default=_DEFAULTS.drain_s,
        metavar="S",
        show_default=True,
        help="Seconds SIGTERM waits for requests in flight.",
    ),
    click.option(
        "--memory",
        type=click.IntRange(64, 1 << 20),
        default=_DEFAULTS.memory >> 20,
        metavar="MIB",
        show_default=True,
        help="MiB lent to requests in flight at any one time.",
    ),
)


def server_options(command: Command) -> Command:
    """The options that become a ``Serving``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def prepare_process(serving: Serving) -> None:
    """Descriptors for all connections; memory and threads that do not get in the loop's way."""
    STOP.take_interrupts()
    few_arenas()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = serving.max_connections + 256
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    # A thread that stores writes must not keep the loop from the interpreter for the usual 5 ms.
    sys.setswitchinterval(SWITCH_S)


def tls_mode(serving: Serving, catalogue: Catalogue) -> TlsMode:
    """Who is served over TLS.

    Raises:
        ConfigError: options that do not go together, or an export that is not there.
    """
    given = serving.tls_cert is not None and serving.tls_key is not None
    if not given and (serving.tls_cert or serving.tls_key or serving.tls_ca):
        raise ConfigError("TLS needs both --tls-cert and --tls-key")
    if serving.tls is None:
        mode = TlsMode.REQUIRED if given else TlsMode.OFF
    else:
        mode = TlsMode(serving.tls)
    if mode is not TlsMode.OFF and not given:
        raise ConfigError(f"--tls {mode.value} needs --tls-cert and --tls-key")
    if serving.tls_exports and mode is not TlsMode.PER_EXPORT:
        raise ConfigError("--tls-export goes with --tls per-export")
    names = {each.name for each in (*catalogue, *catalogue.collections)}
    for name in serving.tls_exports:
        if name not in names:
            raise ConfigError(f"--tls-export {name}: no such export")
    return mode


def tls_context(serving: Serving, mode: TlsMode) -> ssl.SSLContext | None:
    """What TLS is served with; None where it is not.

    Raises:
        ConfigError: certificate or key cannot be used.
    """
    if mode is TlsMode.OFF:
        return None
    assert serving.tls_cert is not None
    assert serving.tls_key is not None
    return server_context(serving.tls_cert, serving.tls_key, serving.tls_ca)


def socket_mode(serving: Serving) -> int:
    """Permissions of Unix sockets.

    Raises:
        ConfigError: no octal number, or not one of permissions.
    """
    try:
        mode = int(serving.socket_mode, 8)
        if not 0 <= mode <= 0o777:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--socket-mode {serving.socket_mode}: expected octal digits") from None
    return mode


def open_listeners(serving: Serving) -> list[Listener]:
    """Sockets that accept; all of them or none.

    Raises:
        ConfigError: no such place, or it is taken.
    """
    if not serving.listen and (activated := activated_sockets(os.environ)):
        return activated
    mode = socket_mode(serving)
    opened: list[Listener] = []
    try:
        for where in serving.listen or (DEFAULT_LISTEN,):
            opened += listen(where, socket_mode=mode, replace=True)
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    return opened


def announce(catalogue: Catalogue, listeners: Sequence[Listener], mode: TlsMode) -> None:
    """A URI for each export or repository on standard output, and READY."""
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


def ignore_signals() -> None:
    """We are on our way out: being told so once more must not change the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
