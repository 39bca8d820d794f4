"""Where we listen, across reloads and, with systemd's help, across restarts.

::

    listen = [...] ── Doors.change ──> opened, closed, kept
                          │
      FDSTORE=1 ──────────┴──> systemd holds a duplicate of each listening socket
      LISTEN_FDS <── the next process of the service finds it again, with whoever waits in it

What survives a restart is the listening socket and its backlog: a client that connects meanwhile
waits instead of being refused. A client that is attached does not survive: what it has agreed on
and what it has in flight are this process's. It is drained, and connects anew.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nbdsrv.errors import ConfigError
from nbdsrv.net.listener import Listener, activated_sockets, identity, listen
from nbdsrv.net.server import Server
from nbdsrv.ops.notify import is_listened_to, notify

__all__ = ["SYSTEMD", "Doors"]

log = logging.getLogger(__name__)

SYSTEMD = "systemd"
"""In place of an address: the sockets of the socket unit."""
STORED = "nbdsrv-listen-"
"""How descriptors we have stored are called."""

Place = tuple[str, int]
"""An address as it was given, and the mode of a Unix socket."""


@dataclass(slots=True)
class Doors:
    """All listeners of a service.

    Attributes:
        service: are we one that is started anew when it dies? Then sockets are stored.
    """

    service: bool
    _open: dict[Place, list[Listener]] = field(default_factory=dict)
    _given: list[Listener] = field(default_factory=list)
    _stored: dict[str, list[Listener]] = field(default_factory=dict)

    def take_over(self, environ: Mapping[str, str]) -> None:
        """What systemd hands to us: its sockets, and those our predecessor has stored.

        Raises:
            ConfigError: one of them is not a listening stream socket.
        """
        for listener in activated_sockets(environ):
            if listener.given is not None and listener.given.startswith(STORED):
                self._stored.setdefault(listener.given, []).append(listener)
            else:
                self._given.append(listener)

    @property
    def listeners(self) -> list[Listener]:
        """All that are open, in the order they were asked for."""
        return [listener for listeners in self._open.values() for listener in listeners]

    def places(self, given: Sequence[str], default: str, mode: int) -> list[Place]:
        """Where to listen if that was asked for, and what if nothing was."""
        wheres = list(given) or ([SYSTEMD] if self._given else [default])
        if SYSTEMD not in wheres and self._given:
            log.warning('listen.unused: systemd hands over sockets; "systemd" is not in listen')
        return [(where, mode if where.startswith("unix:") else 0) for where in wheres]

    def open(self, places: Sequence[Place]) -> list[Listener]:
        """Listen there; all of it or nothing.

        Raises:
            ConfigError: no such place can be.
            ListenError: it cannot be listened on.
        """
        opened: dict[Place, list[Listener]] = {}
        try:
            for place in places:
                opened[place] = self._listen(*place)
        except BaseException:
            for listeners in opened.values():
                for listener in listeners:
                    listener.close()
            raise
        self._open |= opened
        self._forget_stored()
        return [listener for listeners in opened.values() for listener in listeners]

    def change(self, places: Sequence[Place], server: Server) -> None:
        """Listen there and nowhere else. If that fails, it is as before.

        A place that is given up and taken again under another name, 127.0.0.1:1 for 0.0.0.0:1, is
        closed for a moment; nobody else is.

        Raises:
            ConfigError, ListenError: as ``open``.
        """
        gone = [place for place in self._open if place not in places]
        for place in gone:
            self._close(place, server)
        new = [place for place in places if place not in self._open]
        try:
            server.listen(self.open(new))
        except BaseException:
            server.listen(self.open(gone))
            raise

    def store(self) -> None:
        """Have systemd keep what we listen on; what we were given by it, it has anyway."""
        if not (self.service and is_listened_to()):
            return
        for place, listeners in self._open.items():
            for listener in listeners:
                if place[0] != SYSTEMD:
                    state = f"FDSTORE=1\nFDNAME={_stored_name(place)}"
                    notify(state, [listener.sock.fileno()])
                    listener.lasting = True  # the file is the next process's

    def _close(self, place: Place, server: Server) -> None:
        listeners = self._open.pop(place)
        if place[0] == SYSTEMD:
            for listener in listeners:  # ours to give back, not to close: it may be asked for again
                server.unlisten([listener], close=False)
            return
        for listener in listeners:
            listener.lasting = False
        server.unlisten(listeners)
        if self.service:
            notify(f"FDSTOREREMOVE=1\nFDNAME={_stored_name(place)}")

    def _listen(self, where: str, mode: int) -> list[Listener]:
        if where == SYSTEMD:
            if not self._given:
                raise ConfigError('listen "systemd": systemd has handed over no socket')
            return self._given
        stored = self._stored.pop(_stored_name((where, mode)), [])
        if stored and all(_is_reachable(listener, where) for listener in stored):
            return stored
        for listener in stored:
            listener.close()
        return listen(where, socket_mode=mode, replace=True)

    def _forget_stored(self) -> None:
        for name, listeners in self._stored.items():
            log.info("listen.forgotten name=%s", name)
            for listener in listeners:
                listener.close()
            notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
        self._stored.clear()


def _is_reachable(listener: Listener, where: str) -> bool:
    """Does a Unix socket's file still lead to it, as far as one can tell?"""
    if not where.startswith("unix:"):
        return True
    listener.path = where.removeprefix("unix:")
    try:
        listener.identity = identity(listener.path)
    except OSError:
        return False
    return True


def _stored_name(place: Place) -> str:
    where, mode = place
    return STORED + hashlib.sha256(f"{where}\0{mode:o}".encode()).hexdigest()[:16]
