"""Backups that are running on this host: each leaves a small file for ``status`` to find.

::

    nbdsrv backup ── registered("web") ── DIR/jobs/PID.json ── running() ── nbdsrv status
                          tell(done, total): written again, once a second at most

Rule: this is for people who look. A directory that is not there or not ours to write, a full disk:
the backup goes on and nobody is told.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nbdsrv.ops.runtime import runtime_directories

__all__ = ["Job", "Registration", "registered", "running"]

INTERVAL_S = 1.0
MAX_JOBS = 1000
MAX_FILE = 1 << 16
TOLERANCE_S = 60.0
"""A job begins after its process; that much may have been put right at the clock since."""


@dataclass(frozen=True, slots=True)
class Job:
    """One of them.

    Attributes:
        what: the VM or group, as its user named it.
        started: seconds since the epoch.
        done: bytes seen to; None if it has not told yet.
        total: bytes there are in all, likewise.
    """

    pid: int
    what: str
    started: float
    done: int | None = None
    total: int | None = None


class Registration:
    """This process's file."""

    def __init__(self, path: str | None, what: str) -> None:
        """Without a path nothing is written."""
        self._path = path
        self._what = what
        self._started = time.time()
        self._next = 0.0

    def tell(self, done: int | None = None, total: int | None = None) -> None:
        """How far it is."""
        if self._path is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + INTERVAL_S
        facts = {"pid": os.getpid(), "what": self._what, "started": self._started}
        text = json.dumps(facts | {"done": done, "total": total})
        with contextlib.suppress(OSError):
            with open(f"{self._path}.new", "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(f"{self._path}.new", self._path)

    def also(self, advance: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
        """What is told ``advance`` is told here as well."""

        def tell(done: int, total: int) -> None:
            self.tell(done, total)
            if advance is not None:
                advance(done, total)

        return tell


@contextlib.contextmanager
def registered(what: str, directories: Sequence[str] | None = None) -> Iterator[Registration]:
    """Be seen until the end of the block, in the first of the directories that can be written."""
    path = None
    for directory in runtime_directories() if directories is None else directories:
        jobs = os.path.join(directory, "jobs")
        with contextlib.suppress(OSError):
            os.makedirs(jobs, mode=0o755, exist_ok=True)
            if os.access(jobs, os.W_OK):
                path = os.path.join(jobs, f"{os.getpid()}.json")
                break
    registration = Registration(path, what)
    registration.tell()
    try:
        yield registration
    finally:
        if path is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)


def running(directories: Sequence[str] | None = None) -> list[Job]:
    """All that are there and alive; what a crash has left is passed over. Blocking."""
    found: dict[int, Job] = {}
    for directory in runtime_directories() if directories is None else directories:
        jobs = os.path.join(directory, "jobs")
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(jobs))[:MAX_JOBS]:
                if name.endswith(".json") and (job := _read(os.path.join(jobs, name))):
                    found.setdefault(job.pid, job)
    return sorted(found.values(), key=lambda job: job.started)


def _read(path: str) -> Job | None:
    try:
        with open(path, "rb") as file:
            facts = json.loads(file.read(MAX_FILE))
        job = Job(
            int(facts["pid"]),
            str(facts["what"])[:1000],
            float(facts["started"]),
            _bytes(facts.get("done")),
            _bytes(facts.get("total")),
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None
    return job if _lives(job.pid, job.started) else None


def _bytes(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _lives(pid: int, started: float) -> bool:
    """Is it that process, and not one that has its number now?"""
    if not 0 < pid < 1 << 31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    age = _age(pid)
    return age is None or time.time() - age < started + TOLERANCE_S


def _age(pid: int) -> float | None:
    """Seconds since a process was started; None if nobody tells us."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
