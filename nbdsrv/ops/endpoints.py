"""Places to listen on, before anybody listens: are two of them the same?"""

import os
import socket
from dataclasses import dataclass

from nbdsrv.errors import ConfigError
from nbdsrv.net.listener import check_socket_path, split_address

__all__ = ["Endpoint", "overlapping", "parse_endpoint", "parse_socket", "parse_tcp"]

SYSTEMD = "systemd"
_ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104 - compared with, not bound


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A Unix socket's path; or a port of a host, None for all addresses; or what systemd gives."""

    path: str | None = None
    host: str | None = None
    port: int = 0
    systemd: bool = False


def parse_endpoint(text: str) -> Endpoint:
    """``HOST:PORT``, ``unix:PATH`` or ``systemd``.

    Raises:
        ConfigError: it is none.
    """
    if text == SYSTEMD:
        return Endpoint(systemd=True)
    if text.startswith("unix:"):
        return parse_socket(text.removeprefix("unix:"))
    if text == "stdio":
        raise ConfigError("stdio serves one client and is for the command line only")
    return _tcp(text, f"HOST:PORT, unix:PATH or {SYSTEMD}")


def parse_socket(path: str) -> Endpoint:
    """A Unix socket's path.

    Raises:
        ConfigError: none can be there.
    """
    check_socket_path(path)
    return Endpoint(path=path)


def parse_tcp(text: str) -> Endpoint:
    """``HOST:PORT``; the port of NBD is not meant where none is named.

    Raises:
        ConfigError: it is none.
    """
    if "/" in text or not text.rpartition("]")[2].rpartition(":")[1]:
        raise ConfigError("expected HOST:PORT")
    return _tcp(text, "HOST:PORT")


def _tcp(text: str, expected: str) -> Endpoint:
    try:
        host, port = split_address(text)
    except ConfigError as error:
        reason = str(error).removeprefix(f"--listen {text}: ")
        raise ConfigError(reason.replace("HOST:PORT, unix:PATH or stdio", expected)) from error
    return Endpoint(host=host, port=port)


def overlapping(one: Endpoint, other: Endpoint) -> bool:
    """Would the second to listen be told that the address is in use? May ask a name server."""
    if one.systemd or other.systemd:
        return one.systemd and other.systemd
    if one.path is not None or other.path is not None:
        if one.path is None or other.path is None:
            return False
        return os.path.realpath(one.path) == os.path.realpath(other.path)
    if one.port != other.port or not one.port:
        return False
    ours, theirs = _addresses(one), _addresses(other)
    for family, address in ours:
        for family_too, address_too in theirs:
            if family == family_too and (
                address == address_too or _ANY[family] in {address, address_too}
            ):
                return True
    return False


def _addresses(place: Endpoint) -> set[tuple[socket.AddressFamily, str]]:
    try:
        found = socket.getaddrinfo(
            place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        return set()  # listening on it will tell
    return {(family, str(address[0])) for family, _, _, _, address in found if family in _ANY}
