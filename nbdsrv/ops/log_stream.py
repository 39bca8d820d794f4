"""Where log lines are written: a descriptor that may be full for ever, and must not stop us.

::

    line ── fits ───────────────────────────────────────────────> file, tty, journal, pipe
       └─ the pipe is full: kept, MAX_KEPT bytes ── a thread, as soon as somebody reads ──^
                                └─ more than that: lost, and counted; the count is a line, later

Rule: nothing is written without having asked whether it fits; so no thread, the loop's least of
all, waits in a write, and who ends the process finds no lock taken.
"""

import _thread
import logging
import os
import select
import time
from collections import deque

__all__ = ["LogStream"]

MAX_KEPT = 1 << 20
"""Bytes of lines, sixteen times what a pipe holds: a reader that is alive does not fall so far
behind."""
PIECE = 4096
"""Bytes that a descriptor which takes anything takes at once (PIPE_BUF)."""
FAREWELL_S = 1.0
"""Seconds a reader has at the end to take what is left."""


class LogStream(logging.Handler):
    """Writes records to a descriptor. Thread-safe, as handlers are."""

    def __init__(self, fd: int) -> None:
        """``fd`` stays its owner's."""
        super().__init__()
        self._fd = fd
        self._kept: deque[bytes] = deque()
        self._size = 0
        self._lost = 0
        self._waiting = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write it, or keep it, or count it. The caller holds the lock."""
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:  # noqa: BLE001 - as logging does: a bad line is no reason to fail
            self.handleError(record)
            return
        if self._size + len(line) > MAX_KEPT and self._kept:
            self._lost += 1
        else:
            self._keep(line)
        self._write()
        if self._kept and not self._waiting:
            self._waiting = True
            _thread.start_new_thread(self._wait, ())

    def flush(self) -> None:
        """Wait for a reader, but not long. ``logging.shutdown`` calls it."""
        end = time.monotonic() + FAREWELL_S
        while (left := end - time.monotonic()) > 0:
            if self._emptied():
                return
            self._takes(left)

    def _keep(self, line: bytes) -> None:
        self._kept.append(line)
        self._size += len(line)

    def _write(self) -> None:
        """As much as fits."""
        while self._kept and self._takes(0):
            line = self._kept.popleft()
            self._size -= len(line)
            try:
                rest = line[os.write(self._fd, line[:PIECE]) :]
            except BlockingIOError:  # whoever shares it has made it so
                rest = line
            except OSError:  # its reader has left, its disk is full
                self._lost += 1
                continue
            if rest:
                self._kept.appendleft(rest)
                self._size += len(rest)
            elif self._lost and not self._kept:
                self._tell_lost()

    def _tell_lost(self) -> None:
        text = "log.lost lines=%d reason=nobody took them"
        fields = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
        record = logging.makeLogRecord({**fields, "msg": text, "args": (self._lost,)})
        self._lost = 0
        self._keep(f"{self.format(record)}\n".encode())

    def _wait(self) -> None:
        """In a thread of its own, while there is something to wait for."""
        while not self._emptied():
            self._takes(None)

    def _emptied(self) -> bool:
        self.acquire()
        try:
            self._write()
            self._waiting = self._waiting and bool(self._kept)
            return not self._kept
        finally:
            self.release()

    def _takes(self, timeout_s: float | None) -> bool:
        try:
            return bool(select.select([], [self._fd], [], timeout_s)[1])
        except OSError:  # it has been closed: writing says so
            return True
