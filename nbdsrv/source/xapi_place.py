"""Where a pool is and how to get in: a SOURCE and the environment.

::

    xapi://root@host[:443]#VM[/DISK]        VM: a name (a slash in it is %2F) or a uuid
    NBDSRV_XAPI_PASSWORD[_FILE]             of that user
    NBDSRV_XAPI_CA                          a PEM file: who may have signed the hosts' certificates
    NBDSRV_XAPI_FINGERPRINT                 SHA-256 of the hosts' certificates, by commas
    NBDSRV_XAPI_PLAIN_NBD=1                 NBD without TLS, where the network offers no other
    NBDSRV_XAPI_SPOOL                       a directory for disks that can only be had as a stream

Hosts sign their certificates themselves, as they are installed: the fingerprint is the usual way.
"""

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

from nbdsrv.errors import ConfigError
from nbdsrv.secret import secret_of

__all__ = ["Access", "Secret", "XapiPlace", "access_of", "parse_place"]

HTTPS_PORT = 443
MAX_PASSWORD = 4096
PASSWORD = "NBDSRV_XAPI_PASSWORD"  # noqa: S105 - where it is, not what it is
_PLACE = re.compile(
    r"xapi://(?P<user>[^@/#\s]+)@(?P<host>\[[0-9A-Fa-f:.]+\]|[^@:/#\[\]\s]+)(?::(?P<port>\d{1,5}))?/?"
    r"(?:#(?P<vm>.*))?",
    re.DOTALL,
)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class Secret:
    """A text that is shown to nobody by accident."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself."""
        return self._text

    def __repr__(self) -> str:
        return "***"


@dataclass(frozen=True, slots=True)
class XapiPlace:
    """A VM, or one disk of it, in a pool.

    Attributes:
        disk: its name; "" for all disks.
    """

    user: str
    host: str
    port: int
    vm: str
    disk: str = ""

    @property
    def name(self) -> str:
        """For messages."""
        return f"xapi://{self.user}@{self.host}#{self.vm}"


@dataclass(frozen=True, slots=True)
class Access:
    """How to get in.

    Attributes:
        context: for TLS to the pool's hosts.
        fingerprints: of certificates that are trusted; empty where ``context`` verifies.
        plain_nbd: may a disk be read without TLS?
        spool: a directory for temporary files; "" for the system's.
    """

    password: Secret
    context: ssl.SSLContext
    fingerprints: frozenset[str] = field(default=frozenset())
    plain_nbd: bool = False
    spool: str = ""


def parse_place(text: str) -> XapiPlace:
    """Read ``xapi://USER@HOST[:PORT]#VM[/DISK]``; VM and DISK may be percent-encoded.

    Raises:
        ConfigError: it is something else.
    """
    match = _PLACE.fullmatch(text)
    if match is None or not match["vm"]:
        shown = re.sub(r"(//[^:@/]*):[^@/]*@", r"\1:***@", text)
        raise ConfigError(f"{shown}: expected xapi://USER@HOST#VM or xapi://USER@HOST#VM/DISK")
    port = int(match["port"] or HTTPS_PORT)
    if not 1 <= port <= 65535:
        raise ConfigError(f"xapi://{match['host']}: port {port} is not between 1 and 65535")
    user = unquote(match["user"])
    if ":" in match["user"]:
        text = f"a password does not belong into a SOURCE; set {PASSWORD} or {PASSWORD}_FILE"
        raise ConfigError(f"xapi://{match['host']}: {text}")
    vm, _, disk = match["vm"].partition("/")
    if not vm:
        raise ConfigError(f"xapi://{match['host']}#{match['vm']}: no VM before the slash")
    return XapiPlace(user, match["host"].strip("[]"), port, unquote(vm), unquote(disk))


def access_of(environment: Mapping[str, str] = os.environ) -> Access:
    """What the environment gives. Blocking: reads files.

    Raises:
        ConfigError: no password, or a file or fingerprint that is none.
    """
    prints = frozenset(
        each.strip().replace(":", "").lower()
        for each in environment.get("NBDSRV_XAPI_FINGERPRINT", "").split(",")
        if each.strip()
    )
    if wrong := [each for each in sorted(prints) if not _FINGERPRINT.fullmatch(each)]:
        text = "is no SHA-256 in hexadecimal; `openssl x509 -fingerprint -sha256` prints one"
        raise ConfigError(f"NBDSRV_XAPI_FINGERPRINT: {wrong[0]!r} {text}")
    wanted = "the pool wants a password"
    password = secret_of(environment, PASSWORD, kind="password", wanted=wanted, limit=MAX_PASSWORD)
    return Access(
        Secret(password),
        _context(environment.get("NBDSRV_XAPI_CA", ""), exact=bool(prints)),
        prints,
        plain_nbd=environment.get("NBDSRV_XAPI_PLAIN_NBD", "") == "1",
        spool=environment.get("NBDSRV_XAPI_SPOOL", ""),
    )


def _context(ca: str, *, exact: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if exact:
        context.check_hostname = False  # the certificate itself is compared in ``xapi_http``
        context.verify_mode = ssl.CERT_NONE
    elif ca:
        try:
            context.load_verify_locations(ca)
        except OSError as error:  # SSLError is one
            raise ConfigError(f"NBDSRV_XAPI_CA {ca}: {error.strerror or error}") from error
    else:
        context.load_default_certs()
    return context
