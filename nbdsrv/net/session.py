"""What is known of one client that has attached, and who wants to know.

::

    Greeting ── settled ──> Session ── gone ──> what it moved, how long it stayed
        └──── refused ────────────────────────> whom, what for, why
"""

import time
from dataclasses import dataclass, field
from typing import Protocol

from nbdsrv.export.access import Peer
from nbdsrv.export.exports import Export
from nbdsrv.net.transmission import Transmission

__all__ = ["Nobody", "Observer", "Session"]


@dataclass(slots=True, eq=False)
class Session:
    """A client in its transmission phase.

    Attributes:
        id: unique while the server runs.
        name: of the export, as the client asked for it.
        tls: the protocol version, or "".
        since: seconds since the epoch.
        began: the same on the monotonic clock.
    """

    id: int
    peer: Peer
    export: Export
    name: str
    read_only: bool
    tls: str
    dialect: str
    client: Transmission
    since: float = field(default_factory=time.time)
    began: float = field(default_factory=time.monotonic)

    @property
    def duration_s(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.began


class Observer(Protocol):
    """Told on the loop about what an auditor asks for. Must neither block nor raise."""

    def attached(self, session: Session) -> None:
        """A client may transmit from now on."""

    def detached(self, session: Session, reason: str) -> None:
        """It has left, or had to."""

    def refused(self, peer: Peer, export: str | None, reason: str) -> None:
        """Somebody did not get in. ``export`` is what was asked for, if it came to that."""


class Nobody:
    """An Observer who does not care."""

    def attached(self, session: Session) -> None:
        """Nothing."""

    def detached(self, session: Session, reason: str) -> None:
        """Nothing."""

    def refused(self, peer: Peer, export: str | None, reason: str) -> None:
        """Nothing."""
