"""Whose snapshot is that? A mark by which a later run tells a dead backup's from a living one's.

::

    nbdsrv backup of web [nbdsrv:5d41402abc4b.4026531836.4711.88123.9f86d0]
                                 machine      pid space  pid  began  run

It is the snapshot's name, so that it is there the moment the snapshot is. On the same machine, in
the same space of pids, a process that is gone is dead at once. Everywhere who has not renewed a
stamp in ``other_config`` for an hour is dead as well.
"""

import hashlib
import os
import re
import secrets
import uuid
from dataclasses import dataclass

__all__ = ["ALIVE", "MARK", "RENEW_S", "Owner", "marked_name", "owner_of"]

MARK = "nbdsrv:run"
"""The key in ``other_config``."""
ALIVE = "nbdsrv:alive"
"""The key of the stamp: seconds since 1970."""
RENEW_S = 120.0
"""Seconds from stamp to stamp; also what keeps the session from expiring."""
ABANDONED_S = 3600.0
"""Seconds after the last stamp."""
_RUN = re.compile(r"[0-9a-f]{12}\.\d{1,20}\.\d{1,10}\.\d{1,20}\.[0-9a-f]{12}")
_MARKED = re.compile(rf".*\[nbdsrv:({_RUN.pattern})\]", re.DOTALL)
MAX_NAME = 200


@dataclass(frozen=True, slots=True)
class Owner:
    """One run of one process."""

    run: str

    @classmethod
    def new(cls) -> "Owner":
        """A run of this process."""
        parts = (_machine(), _space(), str(os.getpid()), _began(os.getpid()))
        return cls(".".join((*parts, secrets.token_hex(6))))

    def is_alive(self, stamp: str, now: float) -> bool:
        """Is it still at work?

        Args:
            stamp: its last, or when its snapshot was made; "" if unknown.
            now: seconds since 1970.
        """
        machine, space, pid, began, _ = self.run.split(".")
        if (machine, space) == (_machine(), _space()) and _began(int(pid)) != began:
            return False
        return not stamp.isdigit() or now - int(stamp[:15]) < ABANDONED_S


def marked_name(vm: str, owner: Owner) -> str:
    """What a snapshot is called."""
    return f"nbdsrv backup of {vm[:MAX_NAME]} [nbdsrv:{owner.run}]"


def owner_of(text: str) -> Owner | None:
    """From a snapshot's name, or a mark in ``other_config``; None for anything else."""
    if _RUN.fullmatch(text):
        return Owner(text)
    match = _MARKED.fullmatch(text)
    return Owner(match[1]) if match else None


def _machine() -> str:
    try:
        with open("/etc/machine-id", encoding="ascii") as file:
            identity = file.read(64).strip()
    except (OSError, UnicodeDecodeError):
        identity = f"{uuid.getnode():x}"
    return hashlib.sha256(f"nbdsrv {identity}".encode()).hexdigest()[:12]


def _space() -> str:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return "0"


def _began(pid: int) -> str:
    """When a process began, in clock ticks; "0" if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read(4096).rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return "0"
