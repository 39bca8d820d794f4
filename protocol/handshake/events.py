"""What the server's handshake is made of: its states, what it asks of the shell, its outcome."""

from dataclasses import dataclass, field
from enum import Enum, auto

from protocol.constants import Dialect, Option, TransmissionFlag
from protocol.handshake.options import ExportInfo

__all__ = [
    "Agreement",
    "Close",
    "Event",
    "ListExports",
    "OpenExport",
    "QueryContexts",
    "StartTls",
    "State",
    "TlsMode",
    "Transmit",
]


class State(Enum):
    """Where the handshake stands."""

    GREETED = auto()
    NEWSTYLE = auto()
    FORCED = auto()
    OPEN = auto()
    SECURED = auto()
    ASKING = auto()
    UPGRADING = auto()
    TRANSMISSION = auto()
    CLOSED = auto()


class TlsMode(Enum):
    """proto.md's NOTLS, FORCEDTLS and SELECTIVETLS."""

    OFF = "off"
    REQUIRED = "required"
    PER_EXPORT = "per-export"


@dataclass(frozen=True, slots=True)
class ListExports:
    """LIST: answer with ``list_exports``."""


@dataclass(frozen=True, slots=True)
class OpenExport:
    """EXPORT_NAME, INFO or GO: answer with ``accept`` or ``refuse``."""

    option: Option
    name: str


@dataclass(frozen=True, slots=True)
class QueryContexts:
    """LIST_META_CONTEXT or SET_META_CONTEXT: answer with ``contexts`` or ``refuse``."""

    option: Option
    name: str


@dataclass(frozen=True, slots=True)
class StartTls:
    """Send what is due, upgrade the connection, then call ``tls_started``; in both roles.

    If the upgrade fails, close: there is no way back to plain text.
    """


@dataclass(frozen=True, slots=True)
class Agreement:
    """What both sides settled on.

    Attributes:
        contexts: meta context id to name, empty if none was selected for this export.
    """

    export: ExportInfo
    flags: TransmissionFlag
    dialect: Dialect
    contexts: dict[int, str] = field(default_factory=dict)
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Transmit:
    """The handshake is over; ``remainder`` are bytes of the first requests."""

    agreement: Agreement
    remainder: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """Send what is due, then close. ``fault`` tells a violation from a farewell."""

    reason: str
    fault: bool = True


Event = ListExports | OpenExport | QueryContexts | StartTls | Transmit | Close
