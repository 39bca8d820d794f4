"""What a client wants of a handshake, and what may come of it.

::

    Wants ──> ClientHandshake ──> StartTls       the shell upgrades the connection
                              ──> Negotiated     (protocol.terms) transmission begins
                              ──> Listed | Described | ContextsListed   and may ask again
                              ──> Ended          after abort()

Source: proto.md, "Option types".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from protocol.constants import MAX_OPTION_LENGTH, MAX_STRING, Info, Option
from protocol.errors import LocalProtocolError
from protocol.handshake.events import StartTls
from protocol.terms import Negotiated

__all__ = [
    "ContextsListed",
    "Described",
    "Ended",
    "Event",
    "Export",
    "Listed",
    "Mode",
    "StartTls",
    "TlsPolicy",
    "Wants",
]

DEFAULT_INFOS = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)


class Mode(Enum):
    """What to ask for once the dialect is settled; the value is the option that asks."""

    GO = Option.GO
    INFO = Option.INFO
    LIST = Option.LIST
    LIST_CONTEXTS = Option.LIST_META_CONTEXT


class TlsPolicy(Enum):
    """Whether to encrypt. ALLOW is open to a downgrade by whoever sits in between."""

    OFF = "off"
    ALLOW = "allow"
    REQUIRE = "require"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """A client's wishes. Raises LocalProtocolError if they cannot be put on the wire.

    Attributes:
        export: export name, at most 4096 bytes of UTF-8 without NUL.
        mode: what to ask for first.
        tls: whether to encrypt.
        structured: ask for structured replies (also when extended headers are refused).
        extended: ask for extended headers, first.
        queries: meta contexts to select (GO, INFO) or queries to list them by (LIST_CONTEXTS,
            where none means all). Each once, with a namespace.
        infos: what to ask beside the size and the flags.
        go: ask by GO, and by EXPORT_NAME where the server does not know it; without, by
            EXPORT_NAME at once (for servers that hang up on options). Not with ``extended``.
    """

    export: str = ""
    mode: Mode = Mode.GO
    tls: TlsPolicy = TlsPolicy.OFF
    structured: bool = True
    extended: bool = True
    queries: tuple[str, ...] = ()
    infos: tuple[int, ...] = DEFAULT_INFOS
    go: bool = True

    def __post_init__(self) -> None:
        check_string(self.export, "export name")
        for query in self.queries:
            check_string(query, "meta context query")
            if ":" not in query:
                raise LocalProtocolError(f"meta context query {query!r} has no namespace")
        if self.extended and not self.go:
            raise LocalProtocolError("EXPORT_NAME is illegal after EXTENDED_HEADERS")
        check_distinct(self.queries, "meta context query")
        check_distinct(self.infos, "information request")
        if not all(0 <= info <= 0xFFFF for info in self.infos):
            raise LocalProtocolError(f"information requests are 16-bit numbers: {self.infos}")
        length = 8 + len(self.export.encode()) + sum(4 + len(q.encode()) for q in self.queries)
        if max(length, 6 + MAX_STRING + 2 * len(self.infos)) > MAX_OPTION_LENGTH:
            raise LocalProtocolError(f"more queries than fit in {MAX_OPTION_LENGTH} bytes")


@dataclass(frozen=True, slots=True)
class Export:
    """One line of a server's list."""

    name: str
    description: str


@dataclass(frozen=True, slots=True)
class Listed:
    """LIST has been answered. ``ask`` again, or ``abort``."""

    exports: tuple[Export, ...]


@dataclass(frozen=True, slots=True)
class Described:
    """INFO has been answered with the terms a GO would bring. ``ask`` again, or ``abort``."""

    terms: Negotiated


@dataclass(frozen=True, slots=True)
class ContextsListed:
    """LIST_META_CONTEXT has been answered. ``ask`` again, or ``abort``."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """ABORT has been answered, or the server has hung up on it. Close the connection."""


Event = StartTls | Listed | Described | ContextsListed | Negotiated | Ended


def check_string(text: str, what: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise LocalProtocolError(f"{what} is not UTF-8") from None
    if size > MAX_STRING:
        raise LocalProtocolError(f"{what} is {size} bytes long, the limit is {MAX_STRING}")
    if "\0" in text:
        raise LocalProtocolError(f"{what} contains a NUL")


def check_distinct(items: Sequence[object], what: str) -> None:
    if len(set(items)) < len(items):
        raise LocalProtocolError(f"the same {what} twice")
