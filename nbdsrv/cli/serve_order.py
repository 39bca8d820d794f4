"""What a server is asked to do: by its command line, and by a configuration file if there is one.

::

    command line ──┐
                   ├──> Wanted      the command line wins where both say something, and its
    FILE ──────────┘                sources are served beside the file's

The file is read again at each reload; the command line stays what it was.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nbdsrv.cli.quantities import parse_rate
from nbdsrv.cli.serving import STDIO, Serving, socket_mode
from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import Kind, parse_source
from nbdsrv.ops.endpoints import parse_endpoint, parse_socket, parse_tcp
from nbdsrv.ops.offers import Offer
from nbdsrv.ops.runtime import ADMIN_SOCKET
from nbdsrv.ops.settings import ExportTable, Settings

if TYPE_CHECKING:
    from nbdsrv.ops.config import ConfigFile

__all__ = ["Order", "Wanted", "understand"]

_LEVELS = {"warning": 0, "info": 1, "debug": 2}


@dataclass(frozen=True, slots=True)
class Order:
    """The command line.

    Attributes:
        given: names of options that were given, or set by the environment.
        sources: SOURCEs, under names of their own.
        exports: NAME=SOURCE.
        cache: MiB.
        overlay: directory for what clients write, or None.
        hydrate: a rate, "" for none; None to leave the base where it is.
    """

    serving: Serving
    given: frozenset[str]
    sources: tuple[str, ...]
    exports: tuple[str, ...]
    write: bool
    cache: int
    config: str | None = None
    admin_socket: str | None = None
    metrics: str | None = None
    audit_file: str | None = None
    log_format: str = "text"
    verbose: int = 0
    overlay: str | None = None
    hydrate: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Both together. ``cache`` is bytes."""

    serving: Serving
    offers: Sequence[Offer]
    cache: int
    admin_socket: str | None
    metrics: str | None
    audit_file: str | None
    log_format: str
    verbosity: int


def understand(order: Order) -> Wanted:
    """What is wanted now. Blocking: reads the configuration file.

    Raises:
        ConfigError: command line or file make no sense.
    """
    wanted = _both(order)
    _check_places(wanted)
    return wanted


def _both(order: Order) -> Wanted:
    offers = _from_command_line(order)
    if order.config is None:
        return Wanted(
            order.serving,
            offers,
            order.cache << 20,
            order.admin_socket,
            order.metrics,
            order.audit_file,
            order.log_format,
            order.verbose,
        )
    from nbdsrv.ops.config import load_config

    config = load_config(order.config)
    settings = config.settings
    cache = order.cache if "cache" in order.given else settings.limits.cache
    return Wanted(
        _serving(order, settings),
        [*_from_file(config), *offers],
        cache << 20,
        order.admin_socket or _admin_socket(settings),
        order.metrics or (settings.metrics.listen if settings.metrics else None),
        order.audit_file or (settings.audit.file if settings.audit else None),
        order.log_format if "log_format" in order.given else settings.log.format,
        order.verbose or _LEVELS[settings.log.level],
    )


def _check_places(wanted: Wanted) -> None:
    """Those of the command line; the file's are known to be places by now."""
    socket_mode(wanted.serving)
    for where in wanted.serving.listen:
        if where != STDIO:
            _named(f"--listen {where}", parse_endpoint, where)
    if wanted.admin_socket is not None:
        _named(f"--admin-socket {wanted.admin_socket}", parse_socket, wanted.admin_socket)
    if wanted.metrics is not None:
        _named(f"--metrics {wanted.metrics}", parse_tcp, wanted.metrics)


def _named(option: str, parse: Callable[[str], object], text: str) -> None:
    try:
        parse(text)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from error


def _admin_socket(settings: Settings) -> str | None:
    """As the file says; a service that systemd has given a directory of its own always has one."""
    if settings.admin is not None:
        return settings.admin.socket
    directory = os.environ.get("RUNTIME_DIRECTORY")
    return os.path.join(directory.partition(":")[0], ADMIN_SOCKET) if directory else None


def _serving(order: Order, settings: Settings) -> Serving:
    limits, tls = settings.limits, settings.tls
    said: dict[str, object] = {
        "listen": settings.listen or (),
        "socket_mode": settings.socket_mode,
        "max_connections": limits.connections,
        "memory": limits.memory,
        "handshake_timeout": limits.handshake_timeout,
        "drain_timeout": limits.drain_timeout,
    }
    if tls is not None:
        said |= {"tls": tls.mode, "tls_cert": tls.cert, "tls_key": tls.key, "tls_ca": tls.ca}
    changes = {name: value for name, value in said.items() if name not in order.given}
    return dataclasses.replace(order.serving, **changes)  # type: ignore[arg-type]


def _from_file(config: "ConfigFile") -> list[Offer]:
    offers = []
    for n, export in enumerate(config.settings.export):
        access = config.access(export)
        source = parse_source(export.source)
        offers.append(
            Offer(
                name=export.name,
                source=export.source,
                write=export.write,
                overlay=export.overlay,
                hydrate=_hydrate_of(export, partial(config.error, ("export", n, "hydrate"))),
                prefix=f"{export.name}/" if source.kind in _PREFIXED else "",
                description=export.description,
                tls_only=export.tls_only,
                access=access,
                mistake=partial(config.error, ("export", n, "source")),
            )
        )
    for name, repository in config.settings.repository.items():
        if repository.serve:
            offers.append(
                Offer(
                    name=name,
                    source=repository.location,
                    prefix=f"{name}/" if repository.prefix is None else repository.prefix,
                    passphrase_file=repository.passphrase_file,
                    tls_only=repository.tls_only,
                    access=config.access(repository),
                    mistake=partial(config.error, ("repository", name, "location")),
                )
            )
    return offers


def _hydrate_of(export: ExportTable, mistake: Callable[[str], ConfigError]) -> int | None:
    if export.hydrate is False:
        return None
    if export.overlay is None:
        raise mistake("hydrate fills an overlay; say where it is")
    if export.hydrate is True:
        return 0
    try:
        return parse_rate("hydrate", str(export.hydrate))
    except ConfigError as error:
        raise mistake(f"{export.hydrate!r} is not a rate, for instance 50M") from error


def _rate(text: str | None) -> int | None:
    """Bytes a second, 0 for any; None for nothing said."""
    if not text:
        return None if text is None else 0
    try:
        return parse_rate("--hydrate", text)
    except ConfigError:
        hint = "for instance 50M; write --hydrate=RATE, or SOURCE before it"
        raise ConfigError(f"--hydrate {text}: not a rate, {hint}") from None


_PREFIXED = frozenset({Kind.REPOSITORY, Kind.HYPERVISOR})


def _from_command_line(order: Order) -> list[Offer]:
    offers = []
    for text in order.sources:
        source = parse_source(text)
        name = source.selector if source.kind is Kind.REPOSITORY else ""
        name = name or os.path.basename(source.location.rstrip("/")) or text
        offers.append(_offer(order, name, text, ""))
    for text in order.exports:
        name, equals, rest = text.partition("=")
        if not equals:
            raise ConfigError(f"--export {text}: expected NAME=SOURCE")
        offers.append(_offer(order, name, rest, f"{name}/"))  # two repositories may have one VM
    return offers


def _offer(order: Order, name: str, text: str, prefix: str) -> Offer:
    parse_source(text)
    if order.hydrate is not None and order.overlay is None:
        raise ConfigError("--hydrate fills overlays; it goes with --overlay DIR")
    return Offer(
        name=name,
        source=text,
        write=order.write,
        overlay=order.overlay,
        hydrate=_rate(order.hydrate),
        prefix=prefix,
        tls_only=name in order.serving.tls_exports,
    )
