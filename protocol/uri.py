"""NBD URIs: where an export is, in one line of text.

::

    nbd://alice@example.com:10809/disk?tls-type=psk
    '-'   '---' '---------' '---' '--' '----------'
    scheme user     host    port export  parameters        nbd+unix:///disk?socket=/run/nbd

Source: uri.md of the NBD project and RFC 3986. The text printed is the one libnbd's
``nbd_get_uri`` prints (port and path always there), so that either can read the other.

Rule: a ``Uri`` that exists is valid. ``parse`` and the constructor check the same things; what
a URI names later reaches ``connect``, ``getaddrinfo`` and the wire without another look.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv6Address
from typing import Literal, cast
from urllib.parse import quote, unquote_to_bytes

from protocol.constants import MAX_STRING, NBD_PORT

__all__ = ["TlsType", "Uri", "UriError", "parse"]

TlsType = Literal["anon", "x509", "psk"]

SCHEMES = {
    "nbd": (False, False),
    "nbds": (True, False),
    "nbd+tcp": (False, False),
    "nbds+tcp": (True, False),
    "nbd+unix": (False, True),
    "nbds+unix": (True, True),
}
"""Scheme to (TLS required, Unix socket). ``+tcp`` is QEMU's spelling of the plain ones."""

TLS_TYPES = ("anon", "x509", "psk")
VERIFY_PEER = {"0": False, "1": True, "false": False, "true": True}
"""0 and 1 are the specification's; libnbd writes false and true."""

LOCAL_FILE_PARAMETERS = ("tls-certificates", "tls-psk-file")
"""libnbd's own. Text from elsewhere must not pick files of this machine as credentials."""

MAX_URI = 64 * 1024
"""Characters in a URI: a 4096-byte name takes 12288 when every byte is percent-encoded."""
MAX_SOCKET_PATH = 107
"""Bytes of ``sun_path`` on Linux, less its closing NUL."""
MAX_HOST = 255
"""Bytes of a name in the DNS."""

# What nbd_get_uri (libxml2's xmlSaveUri) leaves as it is in a path.
PATH_SAFE = "/;@&=+$,!*'()~"
QUERY_SAFE = "/:@~!*'(),"

# RFC 3986 appendix B, with a scheme that is really there.
PARTS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):"
    r"(?://(?P<authority>[^/?#]*))?(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?"
)
AUTHORITY = re.compile(
    r"(?:(?P<user>[^@]*)@)?(?P<host>\[[^\]]*\]|[^:@\[\]]*)(?::(?P<port>[0-9]*))?"
)
NOT_IN_A_URI = re.compile(r"[^A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]|%(?![0-9A-Fa-f]{2})")


class UriError(ValueError):
    """A text is not an NBD URI, or not one that can be used; says which part and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uri:
    """One export's address. Immutable; raises UriError when a part is not valid.

    Attributes:
        tls: TLS is required (``nbds``); without it, it is merely allowed.
        socket: path of a Unix socket, undecodable bytes as surrogates (``os.fsencode`` gives
            them back); an abstract one starts with NUL. None means TCP.
        host: name or address without brackets; empty exactly when ``socket`` is given.
        port: TCP port, unused with ``socket``.
        export: the export's name, as sent to the server.
        username: who to be, for TLS with pre-shared keys.
        tls_type: kind of credentials, or None to choose by what there is.
        tls_hostname: the name the server's certificate must bear, when it is not ``host``.
        tls_verify_peer: whether to check the server's certificate; None is the default, yes.
        extra: experimental ``x-`` parameters, in the order they had.
    """

    tls: bool = False
    socket: str | None = None
    host: str = ""
    port: int = NBD_PORT
    export: str = ""
    username: str | None = None
    tls_type: TlsType | None = None
    tls_hostname: str | None = None
    tls_verify_peer: bool | None = None
    extra: tuple[tuple[str, str], ...] = field(default=())

    def __post_init__(self) -> None:
        if self.socket is None:
            check_host(self.host, "host")
        else:
            check_socket(self.socket)
            if self.host or self.port != NBD_PORT:
                raise UriError("a Unix socket has neither host nor port")
        if not 1 <= self.port <= 65535:
            raise UriError(f"port {self.port} is not between 1 and 65535")
        check_text(self.export, "export name", MAX_STRING)
        if self.username is not None:
            check_text(self.username, "user name", MAX_STRING)
        if self.tls_type is not None and self.tls_type not in TLS_TYPES:
            raise UriError(f"tls-type={self.tls_type} is none of {', '.join(TLS_TYPES)}")
        if self.tls_hostname is not None:
            check_host(self.tls_hostname, "tls-hostname")
        for key, value in self.extra:
            if not key.startswith("x-"):
                raise UriError(f"unknown parameter {key!r}")
            check_text(key + value, f"parameter {key!r}", MAX_STRING)
        if len(dict(self.extra)) < len(self.extra):
            raise UriError("a parameter is given twice")
        if self.extra and len(str(self)) > MAX_URI:
            raise UriError(f"longer than {MAX_URI} characters")

    @property
    def scheme(self) -> str:
        """The canonical scheme: nbd, nbds, nbd+unix or nbds+unix."""
        return ("nbds" if self.tls else "nbd") + ("" if self.socket is None else "+unix")

    def __str__(self) -> str:
        user = "" if self.username is None else quote(self.username, safe="") + "@"
        place = "" if self.socket is not None else f"{bracketed(self.host)}:{self.port}"
        query = "&".join(
            f"{quote(key, safe='')}={quote(value, safe=QUERY_SAFE, errors='surrogateescape')}"
            for key, value in self._parameters()
        )
        path = quote(self.export, safe=PATH_SAFE)
        return f"{self.scheme}://{user}{place}/{path}" + (f"?{query}" if query else "")

    def _parameters(self) -> Iterator[tuple[str, str]]:
        if self.socket is not None:
            yield "socket", self.socket
        if self.tls_type is not None:
            yield "tls-type", self.tls_type
        if self.tls_hostname is not None:
            yield "tls-hostname", self.tls_hostname
        if self.tls_verify_peer is not None:
            yield "tls-verify-peer", str(int(self.tls_verify_peer))
        yield from self.extra


def parse(text: str) -> Uri:
    """Read an NBD URI.

    A TCP URI without a host means localhost, as in libnbd.

    Raises:
        UriError: not a URI, a scheme that is not NBD's, a part missing, malformed, contradictory
            or too long, or a parameter nobody knows.
    """
    if len(text) > MAX_URI:
        raise UriError(f"longer than {MAX_URI} characters")
    if stray := NOT_IN_A_URI.search(text):
        where = f"{text[stray.start() : stray.start() + 3]!r} at character {stray.start()}"
        raise UriError(f"not a URI: {where} must be percent-encoded")
    parts = PARTS.fullmatch(text)
    if parts is None:
        raise UriError(f"not a URI: {text!r}")
    if parts["fragment"] is not None:
        raise UriError("an NBD URI has no fragment; write a '#' in a name as %23")
    tls, unix = scheme_of(parts["scheme"])
    path: str = parts["path"]
    if parts["authority"] is None:
        raise UriError(f"'//' is missing after {parts['scheme']}:")
    user, host, port = authority_of(parts["authority"])
    if unix and (host or port is not None):
        hint = f"nbd+unix:///NAME?socket=/{parts['authority']}{path}"
        raise UriError(f"a Unix socket has neither host nor port; did you mean {hint} ?")
    known, extra = parameters_of(parts["query"] or "")
    if unix and "socket" not in known:
        raise UriError("socket=PATH is missing")
    if not unix and "socket" in known:
        raise UriError(f"socket= belongs to nbd+unix, not to {parts['scheme']}")
    return Uri(
        tls=tls,
        socket=known.get("socket"),
        host="" if unix else host or "localhost",
        port=NBD_PORT if port is None else port,
        export=decoded(path[1:], "export name"),
        username=user,
        tls_type=cast("TlsType | None", known.get("tls-type")),
        tls_hostname=known.get("tls-hostname"),
        tls_verify_peer=verify_peer_of(known.get("tls-verify-peer")),
        extra=extra,
    )


def scheme_of(scheme: str) -> tuple[bool, bool]:
    try:
        return SCHEMES[scheme.lower()]
    except KeyError:
        known = "nbd, nbds, nbd+unix or nbds+unix"
        raise UriError(f"scheme {scheme!r} is not {known}") from None


def authority_of(authority: str) -> tuple[str | None, str, int | None]:
    match = AUTHORITY.fullmatch(authority)
    if match is None:
        raise UriError(f"not [user@]host[:port]: {authority!r}; an IPv6 address needs brackets")
    user: str | None = match["user"]
    if user is not None and ":" in user:
        raise UriError("only a user name may stand before the '@': a password does not belong here")
    port: str = match["port"] or ""
    if len(port) > 5:
        raise UriError(f"port {port[:10]} is not between 1 and 65535")
    return (
        None if user is None else decoded(user, "user name"),
        host_of(match["host"]),
        int(port) if port else None,
    )


def host_of(text: str) -> str:
    host = decoded(text.removeprefix("[").removesuffix("]"), "host")
    if text.startswith("[") and ":" not in host:
        raise UriError(f"host {text} in brackets is not an IPv6 address")
    return host


def parameters_of(query: str) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    known: dict[str, str] = {}
    extra: dict[str, str] = {}
    for piece in filter(None, query.split("&")):
        raw, equals, value = piece.partition("=")
        key = decoded(raw, "parameter")
        if not equals:
            raise UriError(f"parameter {key!r} has no value")
        if key in known or key in extra:
            raise UriError(f"parameter {key!r} is given twice")
        if key in LOCAL_FILE_PARAMETERS:
            raise UriError(f"{key} names files of this machine: not accepted in a URI")
        if key.startswith("x-"):
            extra[key] = decoded(value, key)
        elif key == "socket":
            known[key] = unquote_to_bytes(value).decode(errors="surrogateescape")
        elif key in {"tls-type", "tls-hostname", "tls-verify-peer"}:
            known[key] = decoded(value, key)
        else:
            raise UriError(f"unknown parameter {key!r}")
    return known, tuple(extra.items())


def verify_peer_of(value: str | None) -> bool | None:
    if value is None:
        return None
    try:
        return VERIFY_PEER[value]
    except KeyError:
        raise UriError(f"tls-verify-peer={value!r} is neither 0 nor 1") from None


def decoded(text: str, what: str) -> str:
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise UriError(f"{what} is not UTF-8") from None


def check_text(text: str, what: str, limit: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UriError(f"{what} is not UTF-8") from None
    if size > limit:
        raise UriError(f"{what} is {size} bytes long, the limit is {limit}")
    if "\0" in text:
        raise UriError(f"{what} contains a NUL")


def check_host(host: str, what: str) -> None:
    check_text(host, what, MAX_HOST)
    if not host:
        raise UriError(f"{what} is empty")
    # CVE-2025-14946: such a "host" becomes an option of whatever program it is handed to.
    if host.startswith("-"):
        raise UriError(f"{what} {host!r} starts with '-'")
    if ":" in host:
        check_ipv6(host, what)
    if not host.isprintable() or not set(host).isdisjoint(" /?#@[]\\"):
        raise UriError(f"{what} {host!r} is not a host name or address")


def check_ipv6(host: str, what: str) -> None:
    try:
        IPv6Address(host)
    except AddressValueError as error:
        raise UriError(f"{what} {host!r} is not an IPv6 address: {error}") from None


def check_socket(path: str) -> None:
    try:
        size = len(path.encode(errors="surrogateescape"))
    except UnicodeEncodeError:
        raise UriError("socket path is not a path") from None
    if size in {0, path.count("\0")}:
        raise UriError("socket is empty")
    if size > MAX_SOCKET_PATH:
        raise UriError(f"socket path is {size} bytes long, the limit is {MAX_SOCKET_PATH}")
    if "\0" in path[1:]:
        raise UriError("socket path contains a NUL")


def bracketed(host: str) -> str:
    if ":" in host:
        return f"[{quote(host, safe=':')}]"
    return quote(host, safe="")
