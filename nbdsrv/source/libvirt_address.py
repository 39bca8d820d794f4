"""``libvirt:URI#DOMAIN[/TARGET]``: a domain, and what must be said where libvirt does not tell it.

::

    libvirt:qemu:///system#web                                  all disks
    libvirt:qemu:///system#web/vda                              one
    libvirt:qemu:///system?scratch=/srv/scratch&agent=off#web
    libvirt:qemu+ssh://root@host1/system?listen=10.0.0.1:10809-10819#web

URI is libvirt's own, with parameters of its own; ours are taken out of it. On another host QEMU
serves by TCP, where ``listen`` says: on the first port that is free.
"""

import os
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from nbdsrv.errors import ConfigError
from protocol.uri import Uri, UriError

__all__ = ["DEFAULT_SCRATCH", "Agent", "LibvirtAddress", "parse_libvirt"]

DEFAULT_SCRATCH = "/var/tmp"  # noqa: S108 - a directory of our own is made there, and checked
"""Not /tmp or /run: these are memory, and a backup may need as much as the guest writes."""
MAX_PORTS = 1000
AGENTS = ("auto", "off", "needed")
Agent = str

_URI = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://([^/?]*)[^?]*")
_LISTEN = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})(?:-([0-9]{1,5}))?")
_OURS = frozenset({"scratch", "listen", "tls", "agent"})


@dataclass(frozen=True, slots=True)
class LibvirtAddress:
    """A domain.

    Attributes:
        uri: for libvirt.
        domain: name or UUID.
        target: a disk, or "" for all.
        remote: is the hypervisor on another host?
        scratch: directory on the hypervisor's host, with room for what the guest overwrites.
        host: where QEMU listens; "" for a Unix socket.
        ports: of that host, those that may be used.
        tls: directory with ``ca-cert.pem`` and perhaps a client's certificate; "": no TLS.
        agent: ``auto``, ``off``, or ``needed``: no backup unless the guest can be frozen.
    """

    uri: str
    domain: str
    target: str = ""
    remote: bool = False
    scratch: str = DEFAULT_SCRATCH
    host: str = ""
    ports: tuple[int, ...] = ()
    tls: str = ""
    agent: Agent = "auto"


def parse_libvirt(location: str, selector: str) -> LibvirtAddress:
    """What stands before and behind ``#``.

    Raises:
        ConfigError: says which part makes no sense.
    """
    text = f"libvirt:{location}"
    base, _, query = location.partition("?")
    match = _URI.fullmatch(base)
    if match is None:
        raise ConfigError(f"{text}: not a URI of libvirt, for instance qemu:///system")
    ours, theirs = _parameters(text, query)
    domain, slash, target = selector.partition("/")
    if not domain or (slash and not target):
        raise ConfigError(f"{text}#{selector}: name the domain, as {text}#NAME or #NAME/DISK")
    agent = ours.get("agent", "auto")
    if agent not in AGENTS:
        raise ConfigError(f"{text}: agent={agent} is none of {', '.join(AGENTS)}")
    scratch = ours.get("scratch", DEFAULT_SCRATCH)
    if not os.path.isabs(scratch):
        raise ConfigError(f"{text}: scratch={scratch} is not an absolute path")
    remote = bool(match[1])
    host, ports = _listen(text, ours["listen"]) if "listen" in ours else ("", ())
    if remote and not host:
        raise ConfigError(
            f"{text}: on another host QEMU must serve by TCP: add ?listen=ADDRESS:PORT, an address"
            " of that host that can be reached from here"
        )
    if "tls" in ours and not host:
        raise ConfigError(f"{text}: tls= goes with listen=; a Unix socket needs none")
    uri = base + (f"?{theirs}" if theirs else "")
    return LibvirtAddress(
        uri, domain, target, remote, scratch, host, ports, ours.get("tls", ""), agent
    )


def _parameters(text: str, query: str) -> tuple[dict[str, str], str]:
    """Ours, decoded, and the rest as it was."""
    ours: dict[str, str] = {}
    theirs = []
    for pair in query.split("&") if query else []:
        key, _, value = pair.partition("=")
        if key not in _OURS:
            theirs.append(pair)
        elif not value or key in ours:
            raise ConfigError(f"{text}: expected one {key}= with a value")
        else:
            ours[key] = unquote(value)
    return ours, "&".join(theirs)


def _listen(text: str, value: str) -> tuple[str, tuple[int, ...]]:
    match = _LISTEN.fullmatch(value)
    if match is None:
        raise ConfigError(
            f"{text}: listen={quote(value)} is not ADDRESS:PORT or ADDRESS:FIRST-LAST"
        )
    host, first = match[1].strip("[]"), int(match[2])
    last = int(match[3] or first)
    if not first <= last < first + MAX_PORTS:
        raise ConfigError(f"{text}: listen={value}: at most {MAX_PORTS} ports, in ascending order")
    try:
        for port in (first, last):
            Uri(host=host, port=port)
    except UriError as error:
        raise ConfigError(f"{text}: listen={value}: {error}") from error
    return host, tuple(range(first, last + 1))
