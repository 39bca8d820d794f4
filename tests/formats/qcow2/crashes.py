"""What a file may look like after a crash, from a recording of everything done to it.

::

    calls    write a   write b   SYNC   write c   write d   | crash
    file     |------ there -----|      |-- any part of it --|

A write that had returned before a sync began is there once the sync has returned. Of the others any
may be missing, whole or by the sector.
"""

import errno
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nbdsrv.formats.qcow2 import writable_store

__all__ = ["Recording"]

SECTOR = 512


@dataclass
class Call:
    """One change of the file, or a sync (``data`` is None and ``size`` too)."""

    begun: int
    ended: int = -1
    position: int = 0
    data: bytes | None = None
    size: int | None = None


@dataclass
class Recording:
    """Everything done to one file through ``os`` while it lasts; the real calls are made too.

    Attributes:
        failing: the how manieth write from now on finds the disk full, 0 for none.
    """

    path: Path
    before: bytes
    calls: list[Call] = field(default_factory=list)
    clock: int = 0
    failing: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def start(cls, path: Path, patch: pytest.MonkeyPatch) -> "Recording":
        found = cls(path, path.read_bytes())
        pwrite, truncate, sync = os.pwrite, os.ftruncate, os.fdatasync
        punch = writable_store.punch_hole

        def recorded_pwrite(fd: int, data: Any, position: int) -> int:
            call = Call(0, position=position, data=bytes(data))
            return found.record(fd, call, lambda: pwrite(fd, data, position))

        def recorded_truncate(fd: int, size: int) -> None:
            found.record(fd, Call(0, size=size), lambda: truncate(fd, size))

        def recorded_sync(fd: int) -> None:
            found.record(fd, Call(0), lambda: sync(fd))

        def recorded_punch(fd: int, position: int, length: int) -> None:
            call = Call(0, position=position, data=bytes(length))
            found.record(fd, call, lambda: punch(fd, position, length))

        patch.setattr(os, "pwrite", recorded_pwrite)
        patch.setattr(os, "ftruncate", recorded_truncate)
        patch.setattr(os, "fdatasync", recorded_sync)
        patch.setattr(writable_store, "punch_hole", recorded_punch)
        return found

    def record(self, fd: int, call: Call, perform: Callable[[], Any]) -> Any:
        if os.readlink(f"/proc/self/fd/{fd}") != str(self.path):
            return perform()
        if self.failing and call.data is not None:
            self.failing -= 1
            if not self.failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with self.lock:
            self.clock += 1
            call.begun = self.clock
            self.calls.append(call)
        result = perform()
        with self.lock:
            self.clock += 1
            call.ended = self.clock
        return result

    def moment(self, chance: random.Random) -> int:
        """Any; every other time while a sync is under way, for much hangs by it then."""
        syncs = [call.ended - 1 for call in self.calls if call.data is None and call.size is None]
        return chance.choice((chance.randrange(self.clock + 1), chance.choice(syncs)))

    def after(self, moment: int, chance: random.Random) -> bytes:
        """The file after a crash at ``moment``; ``chance`` decides what had got through."""
        synced = 0
        for call in self.calls:
            if call.data is None and call.size is None and 0 <= call.ended <= moment:
                synced = max(synced, call.begun)
        mood = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        content = bytearray(self.before)
        for call in self.calls:
            if call.begun > moment or (call.data is None and call.size is None):
                continue
            if 0 <= call.ended <= synced:
                _apply(content, call)
            elif call.size is not None:
                if chance.random() < mood:
                    _apply(content, call)
            else:
                _apply_some(content, call, chance, mood)
        return bytes(content)


def _apply(content: bytearray, call: Call) -> None:
    if call.size is not None:
        del content[call.size :]
        content += bytes(call.size - len(content))
        return
    assert call.data is not None
    end = call.position + len(call.data)
    content += bytes(max(0, end - len(content)))
    content[call.position : end] = call.data


def _apply_some(content: bytearray, call: Call, chance: random.Random, mood: float) -> None:
    """Each sector of a write gets through or does not."""
    assert call.data is not None
    if mood == 1.0 or (chance.random() < 0.5 and chance.random() < mood):
        _apply(content, call)
        return
    at, end = call.position, call.position + len(call.data)
    while at < end:
        stop = min((at // SECTOR + 1) * SECTOR, end)
        if chance.random() < mood:
            piece = call.data[at - call.position : stop - call.position]
            _apply(content, Call(0, position=at, data=piece))
        at = stop
