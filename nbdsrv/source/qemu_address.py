"""``qemu:WHERE``: a VM's monitor, and what must be said where QEMU does not tell it.

::

    qemu:/run/vm1/qmp.sock                      a Unix socket
    qemu:localhost:4444                         a TCP port of this host
    qemu:/run/vm1/qmp.sock?agent=/run/vm1/qga.sock&scratch=/srv/scratch&nbd=/run/vm1/nbd.sock

QEMU must run on this host: it writes to a directory that we make, and serves on a socket there.
"""

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl

from nbdsrv.errors import ConfigError
from protocol.uri import Uri, UriError

__all__ = ["AGENT_OFF", "DEFAULT_SCRATCH", "Place", "QemuAddress", "parse_qemu"]

DEFAULT_SCRATCH = "/var/tmp"  # noqa: S108 - a directory of our own is made there, and checked
"""Not /tmp or /run: these are memory, and a backup may need as much as the guest writes."""
AGENT_OFF = "off"
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_HOST_PORT = re.compile(r"\[?([A-Za-z0-9.:-]+?)\]?:([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Place:
    """A socket.

    Attributes:
        path: of a Unix socket; None for TCP.
    """

    path: str | None = None
    host: str = ""
    port: int = 0

    def uri(self, export: str) -> str:
        """Of an export there."""
        if self.path is not None:
            return str(Uri(socket=self.path, export=export))
        return str(Uri(host=self.host, port=self.port, export=export))

    def __str__(self) -> str:
        return self.path if self.path is not None else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class QemuAddress:
    """Where a VM is.

    Attributes:
        monitor: its QMP socket.
        agent: the guest agent's Unix socket; ``off``; or "": QEMU is asked for it.
        scratch: a directory on a file system with room for what the guest overwrites.
        nbd: where an NBD server of this QEMU listens already; None: one is started.
    """

    monitor: Place
    agent: str = ""
    scratch: str = DEFAULT_SCRATCH
    nbd: Place | None = None


def parse_qemu(location: str) -> QemuAddress:
    """What stands between ``qemu:`` and ``#``.

    Raises:
        ConfigError: says which part makes no sense.
    """
    where, _, query = location.partition("?")
    monitor = _place(where, f"qemu:{location}")
    if monitor.path is None and monitor.host not in LOCAL:
        text = f"qemu:{location}: QEMU must run on this host, to share files and sockets with us"
        raise ConfigError(text)
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise ConfigError(f"qemu:{location}: expected ?key=value&...") from None
    said = dict(pairs)
    if unknown := sorted(said.keys() - {"agent", "scratch", "nbd"}):
        known = "agent, scratch and nbd"
        raise ConfigError(f"qemu:{location}: unknown parameter {unknown[0]!r}; there are {known}")
    for key, value in said.items():
        if not value:
            raise ConfigError(f"qemu:{location}: nothing behind {key}=")
    nbd = _place(said["nbd"], f"qemu:{location}: nbd") if "nbd" in said else None
    return QemuAddress(monitor, said.get("agent", ""), said.get("scratch", DEFAULT_SCRATCH), nbd)


def _place(text: str, what: str) -> Place:
    try:
        if "/" in text:
            place = Place(path=text)
        elif match := _HOST_PORT.fullmatch(text):
            place = Place(host=match[1], port=int(match[2]))
        else:
            raise ConfigError(f"{what}: expected the path of a socket, or HOST:PORT")
        place.uri("")  # a path that is too long for a socket, a port that is none
    except UriError as error:
        raise ConfigError(f"{what}: {error}") from error
    return place
