"""Who attached what, who left, who was refused: one line each, in the log or in a file of its own.

::

    {"time": "2026-11-26T01:20:03.120+00:00", "event": "attach", "session": 7, "export": "vm1",
     "access": "ro", "address": "192.0.2.7", "port": 40112, "subject": "CN=web1", "tls": "TLSv1.3"}
    {..., "event": "detach", ..., "received": 1204, "sent": 52428800, "duration_s": 3.21,
     "reason": "left"}
    {..., "event": "refuse", "export": "vm1", "uid": 1000, "pid": 4711, "reason": "not allowed"}

Rule: a name a client sends is data. JSON escapes it in the file, ``repr`` in the log, so that it
can never look like another line.
"""

import json
import logging
import os
import stat
from datetime import UTC, datetime

from nbdsrv.errors import ConfigError
from nbdsrv.export.access import Peer
from nbdsrv.net.session import Session
from nbdsrv.ops.logs import AUDIT

__all__ = ["Audit"]

log = logging.getLogger(__name__)
_audit = logging.getLogger(AUDIT)


class Audit:
    """An ``Observer`` that writes. A line is one write(2), so lines of two servers do not mix.

    A file that cannot be written (a full disk) is a warning in the log, and the line goes there.
    So it does if a part of it fitted; that part gets a line of its own, and spoils no other.
    """

    def __init__(self, path: str | None = None) -> None:
        """Without a path everything goes to the log.

        Raises:
            ConfigError: the file cannot be opened for appending.
        """
        self._path = path
        self._fd = _open(path) if path is not None else None
        self._torn = _is_torn(self._fd, path)

    def reopen(self, path: str | None) -> None:
        """Go on in that file, or in the log: after logrotate has renamed the old one.

        Raises:
            ConfigError: it cannot be opened; the old one is kept.
        """
        fd = _open(path) if path is not None else None
        self.close()
        self._path, self._fd, self._torn = path, fd, _is_torn(fd, path)

    def close(self) -> None:
        """No more lines in the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def attached(self, session: Session) -> None:
        """A client may transmit."""
        self._write("attach", _who(session))

    def detached(self, session: Session, reason: str) -> None:
        """It has left."""
        tally = session.client.tally()
        self._write(
            "detach",
            _who(session)
            | {
                "received": tally.received,
                "sent": tally.sent,
                "reads": tally.reads,
                "writes": tally.writes,
                "duration_s": round(session.duration_s, 3),
                "reason": reason,
            },
        )

    def refused(self, peer: Peer, export: str | None, reason: str) -> None:
        """Somebody did not get in."""
        asked = {} if export is None else {"export": export}
        self._write("refuse", asked | peer.facts() | {"reason": reason})

    def _write(self, event: str, facts: dict[str, object]) -> None:
        if self._fd is not None:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = json.dumps({"time": now, "event": event} | facts, default=str) + "\n"
            try:
                self._append(self._fd, line)
            except OSError as error:
                log.warning("audit.unwritten file=%r reason=%s", self._path, error.strerror)
            else:
                return
        if _audit.isEnabledFor(logging.INFO):
            words = " ".join(f"{key}={value!r}" for key, value in facts.items())
            fields = {"event": f"audit.{event}"} | facts
            _audit.info("audit.%s %s", event, words, extra={"fields": fields})

    def _append(self, fd: int, line: str) -> None:
        data = ("\n" + line if self._torn else line).encode()
        while data:  # a second time only to learn what is wrong: the disk is full
            count = os.write(fd, data)
            self._torn = count < len(data)
            data = data[count:]


def _who(session: Session) -> dict[str, object]:
    known: dict[str, object] = {
        "session": session.id,
        "export": session.name,
        "access": "ro" if session.read_only else "rw",
    }
    known |= session.peer.facts()
    if session.tls:
        known["tls"] = session.tls
    return known


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"audit file {path}: {reason}") from error


def _is_torn(fd: int | None, path: str | None) -> bool:
    """Does the file end within a line, which a full disk or a power cut has left?"""
    if fd is None or path is None:
        return False
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return False
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:  # it may be written but not read: then nobody knows
        return False
