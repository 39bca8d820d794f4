"""Where clients knock: TCP, Unix sockets, sockets handed over by systemd or inetd.

::

    HOST:PORT  [::1]:PORT  :PORT   TCP; every address the name stands for
    unix:PATH                      Unix socket, mode 0600 unless told otherwise
    stdio                          one client, already connected: see ``stdio``
    (nothing) + LISTEN_FDS         systemd socket activation, sd_listen_fds(3)
"""

import contextlib
import errno as os_errno
import os
import re
import socket
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nbdsrv.errors import ConfigError, ListenError
from protocol.constants import NBD_PORT

__all__ = ["Listener", "activated_sockets", "identity", "listen", "split_address"]

MAX_SOCKET_PATH = 107
"""Bytes: unix(7)."""
BACKLOG = 1024
"""Connections the kernel completes for us while we are busy; it caps this at somaxconn."""
FIRST_ACTIVATED_FD = 3


@dataclass(slots=True)
class Listener:
    """A listening socket.

    Attributes:
        path: the file to remove when it closes.
        name: the host name it was asked for by, which a certificate may have to match.
        given: what systemd calls it, if it gave it.
        lasting: somebody else holds the socket too: its file stays when we close it.
    """

    sock: socket.socket
    path: str | None = None
    identity: tuple[int, int] | None = None
    name: str | None = None
    given: str | None = None
    lasting: bool = False

    def close(self) -> None:
        """Stop listening; remove the Unix socket we made, if it is still ours."""
        self.sock.close()
        if self.path is not None and not self.lasting:
            with contextlib.suppress(OSError):
                if identity(self.path) == self.identity:
                    os.unlink(self.path)

    @property
    def address(self) -> tuple[str, int] | str:
        """(host, port), or the path of a Unix socket."""
        name = self.sock.getsockname()
        if self.sock.family == socket.AF_UNIX:
            return os.fsdecode(name)
        return self.name or str(name[0]), int(name[1])


def listen(where: str, *, socket_mode: int = 0o600, replace: bool = False) -> list[Listener]:
    """Listen on one address of the command line.

    With ``replace`` the socket of a server that is gone is removed first: a service that was
    killed must come up again by itself.

    Raises:
        ConfigError: the address makes no sense.
        ListenError: it cannot be listened on; the message says what to do.
    """
    if where.startswith("unix:"):
        path = where.removeprefix("unix:")
        if replace and is_stale(path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        return [_listen_unix(path, socket_mode)]
    host, port = split_address(where)
    return list(_listen_tcp(where, host, port))


def split_address(where: str) -> tuple[str | None, int]:
    """Host, None for all addresses, and port.

    Raises:
        ConfigError: the text makes no sense.
    """
    if where.isdecimal():
        raise ConfigError(f"--listen {where}: write :{where}, or 127.0.0.1:{where} for this host")
    if "/" in where:
        raise ConfigError(f"--listen {where}: a Unix socket is written unix:/path")
    host, colon, port = where.rpartition(":")
    if not colon or "]" in port:
        host, port = where, str(NBD_PORT)
    # Nothing at all comes of a variable that is not set: by no means all addresses.
    if not where or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigError(f"--listen {where}: expected HOST:PORT, unix:PATH or stdio")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"--listen {where}: write IPv6 addresses in brackets, [::1]:10809")
    # glibc takes a star for all addresses, but a URI with one leads nowhere.
    return None if host in {"", "*"} else host, int(port)


def _listen_tcp(where: str, host: str | None, port: int) -> Iterator[Listener]:
    kind = socket.SOCK_STREAM
    try:
        found = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ListenError(f"--listen {where}: {error.strerror}") from error
    except UnicodeError as error:
        raise ConfigError(f"--listen {where}: no host can have this name") from error
    addresses = dict.fromkeys((family, address) for family, _, _, _, address in found)
    opened: list[Listener] = []
    for family, address in addresses:
        sock = socket.socket(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # Port 0: the same free port for every address of the name.
            if not port and opened:
                address = (address[0], opened[0].sock.getsockname()[1], *address[2:])  # noqa: PLW2901
            sock.bind(address)
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            for listener in opened:
                listener.close()
            hint = ""
            if error.errno == os_errno.EADDRINUSE:
                hint = "; another server uses this port, choose one with --listen HOST:PORT"
            reason = os.strerror(error.errno or 0)
            raise ListenError(f"cannot listen on {where}: {reason}{hint}") from error
        opened.append(Listener(sock, name=host))
    yield from opened


def check_socket_path(path: str) -> None:
    """Can a Unix socket be there?

    Raises:
        ConfigError: no.
    """
    length = len(os.fsencode(path))
    if not path or "\0" in path:
        raise ConfigError("a socket needs a path")
    if length > MAX_SOCKET_PATH:
        text = f"a socket's path has {MAX_SOCKET_PATH} bytes at most, this one has {length}"
        raise ConfigError(text)


def _listen_unix(path: str, mode: int) -> Listener:
    try:
        check_socket_path(path)
    except ConfigError as error:
        raise ConfigError(f"--listen unix:{path}: {error}") from error
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o777 & ~mode)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot listen on unix:{path}: {_why_not(path, error)}") from error
    finally:
        os.umask(previous)
    return Listener(sock, path, identity(path))


def is_stale(path: str) -> bool:
    """Is it a socket on which nobody listens any more?"""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False
    return False


def identity(path: str) -> tuple[int, int]:
    """Device and inode of a file, not followed. Raises OSError if there is none."""
    info = os.lstat(path)
    return info.st_dev, info.st_ino


def _why_not(path: str, error: OSError) -> str:
    if error.errno != os_errno.EADDRINUSE:
        if error.errno is None:
            return f"{error}: 107 bytes at most"
        return os.strerror(error.errno)
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return "the file exists and is not a socket"
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.settimeout(1)
        probe.connect(path)
    except ConnectionRefusedError:
        return "stale socket of a server that is gone; remove the file and start again"
    except OSError:
        pass
    finally:
        probe.close()
    return "another server is listening there"


def activated_sockets(environ: Mapping[str, str]) -> list[Listener]:
    """The sockets systemd handed over; none if it did not mean us.

    Raises:
        ConfigError: one of them is not a listening stream socket.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = environ.get("LISTEN_FDS", "")
    if not re.fullmatch("[0-9]{1,4}", count):
        return []
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    return [
        _adopt(FIRST_ACTIVATED_FD + n, names[n] if n < len(names) else "")
        for n in range(int(count))
    ]


def _adopt(fd: int, name: str) -> Listener:
    try:
        sock = socket.socket(fileno=fd)
        kind = sock.type
    except OSError as error:
        raise ConfigError(f"LISTEN_FDS: descriptor {fd} is not a socket") from error
    if kind != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ConfigError(f"LISTEN_FDS: descriptor {fd} does not listen for streams; Accept=no?")
    os.set_inheritable(fd, False)
    return Listener(sock, given=name)
