"""A native repository as its users see it: nbdsrv's commands, and other people's clients.

::

    disk ── nbdsrv backup ──> repository ── nbdsrv serve ──> nbdcopy ──> SHA-256, as remembered
                 ▲                 │
            killed, full      prune, gc, verify

Every command is a process of its own. One that prints a traceback fails the check, whatever its
exit code; what it refuses, it refuses with one line.
"""

import hashlib
import json
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance.context import Context
from conformance.image import KIB, MIB, file_digest
from conformance.outcome import CheckFailedError
from conformance.process import Finished
from conformance.registry import expect, expect_in
from conformance.server import Server, server_environment

__all__ = [
    "CHUNK",
    "SEED",
    "SIZE",
    "Repository",
    "World",
    "command",
    "disk_of",
    "rewrite",
]

CHUNK = 64 * KIB
"""Small, so that a small disk has many chunks; ``init --chunk-size`` is told so."""
DAY_S = 24 * 3600
GROUP = "vm one"
DISK = "disk"
SIZE = 24 * MIB + 5 * 512
"""Of a disk; its last chunk is a short one."""
SEED = 4


def command(*words: str | Path) -> list[str]:
    """One of our commands, as words."""
    return [sys.executable, "-m", "nbdsrv", *map(str, words)]


@dataclass
class Repository:
    """One repository, and what it is known to hold.

    Attributes:
        context: of the check.
        target: ``repo:/path`` or ``repo+s3://bucket/prefix``.
        environment: variables its commands need.
        known: SHA-256 of the disk by point id, of every point that was made.
        group: the VM whose disk it is about.
    """

    context: Context
    target: str
    environment: Mapping[str, str] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)
    group: str = GROUP

    @property
    def path(self) -> Path:
        """Of a repository in a directory."""
        return Path(self.target.removeprefix("repo:"))

    def variables(self) -> dict[str, str]:
        """Everything a command's environment has on top of ours."""
        return {**server_environment(), **self.environment}

    def run(self, *words: str | Path, code: int | None = 0, timeout_s: float = 60) -> Finished:
        """Run a command to its end.

        Raises:
            CheckFailedError: it ended with another code, or printed a traceback.
        """
        finished = self.context.run(
            *command(*words), code=code, environment=self.variables(), timeout_s=timeout_s
        )
        if "Traceback" in finished.stderr:
            raise CheckFailedError(f"a traceback: {finished.describe()}")
        return finished

    def refused(self, *words: str | Path, saying: str, code: int = 1) -> str:
        """Run a command that must fail with one line that has ``saying`` in it; return the line."""
        finished = self.run(*words, code=code)
        lines = finished.stderr.splitlines()
        expect(1, len(lines), f"lines on stderr of {' '.join(map(str, words))}: {lines}")
        expect_in(saying.lower(), lines[0].lower(), f"what {words[0]} says")
        return lines[0]

    def init(self, *options: str) -> None:
        """``nbdsrv init``, with small chunks."""
        self.run("init", self.target, "--chunk-size", str(CHUNK), *options)

    def init_as_usual(self) -> None:
        """``nbdsrv init``, with chunks as everybody has them."""
        self.run("init", self.target)

    def backup(self, disk: str | Path, digest: str, *options: str) -> dict[str, Any]:
        """``nbdsrv backup`` of a disk with this SHA-256; its report."""
        finished = self.run(*self.backup_words(disk), "--json", *options)
        report: dict[str, Any] = one_row(finished.stdout)
        self.known[report["point"]] = digest
        return report

    def backup_words(self, disk: str | Path) -> list[str]:
        """The words of a backup."""
        words = ["backup", "--disk", f"{DISK}={disk}", "--to", self.target, "--group", self.group]
        return [*words, "--quiet"]

    def points(self) -> list[str]:
        """The ids that ``nbdsrv ls`` shows of the VM, from old to new; none may be damaged."""
        rows = rows_of(self.run("ls", "--json", f"{self.target}#{self.group}").stdout)
        damaged = [row["point"] for row in rows if row.get("flags")]
        expect([], damaged, "points with flags")
        return [row["point"] for row in rows]

    def source(self, point: str = "latest") -> str:
        """The SOURCE of its disk as it was then."""
        return f"{self.target}#{self.export(point)}"

    def export(self, point: str = "latest") -> str:
        """The name under which a served repository has it."""
        return f"{self.group}/{DISK}@{point}"

    def serve(self, *, listen: tuple[str, ...] = ("unix",)) -> Server:
        """All of it, over NBD."""
        return self.context.serve(source=self.target, listen=listen, environment=self.environment)

    def download(self, server: Server, point: str = "latest") -> str:
        """SHA-256 of what nbdcopy gets of one point."""
        target = self.context.directory / f"download-{random.randrange(1 << 40):x}"
        try:
            self.context.run("nbdcopy", server.uri(self.export(point)), target)
            return file_digest(target)
        except CheckFailedError as error:
            raise CheckFailedError(f"{error}; the server: {server.stderr()}") from error
        finally:
            target.unlink(missing_ok=True)

    def prove(self, server: Server, unheard: str | None = None) -> list[str]:
        """Every point that is listed reads as it was; return their ids.

        Args:
            server: that serves it.
            unheard: SHA-256 of the disk in a point whose maker did not live to tell its id.
        """
        points = self.points()
        for point in points:
            if point not in self.known and unheard is not None:
                self.known[point], unheard = unheard, None
            expect(self.known.get(point), self.download(server, point), f"sha256 of {point}")
        return points

    def stored_bytes(self) -> int:
        """What the files in its directory hold."""
        files = (path for path in self.path.rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files)

    def leases(self) -> list[Path]:
        """Of writers and readers, alive or dead."""
        return sorted((self.path / "leases").glob("*"))

    def let_a_day_pass(self) -> None:
        """Make what killed writers have left a day older, as a day would."""
        writers = [path for path in self.leases() if b'"reader"' not in path.read_bytes()]
        for path in (*writers, *(self.path / ".tmp").glob("*")):
            then = path.stat().st_mtime - DAY_S - 60
            os.utime(path, (then, then))


class World:
    """A repository with points of one disk, and the disk as it was at each.

    Attributes:
        repo: the repository.
        disk: the raw disk as it is now, as in the last point.
        states: of each point, from old to new: a copy of the disk.
        points: their ids.
    """

    def __init__(self, context: Context, points: int = 3) -> None:
        self.repo = Repository(context, f"repo:{context.directory / 'repo'}")
        self.disk = context.directory / "disk.img"
        self.states: list[Path] = []
        self.points: list[str] = []
        self._context = context
        self._source = random.Random(SEED)
        self.repo.init()
        self.backup(disk_of(self.disk, SIZE, self._source))
        for _ in range(points - 1):
            self.backup(rewrite(self.disk, self._source))

    def backup(self, digest: str) -> None:
        """One more point, of the disk as it is now."""
        report = self.repo.backup(self.disk, digest)
        copy = self._context.directory / f"state{len(self.states)}.img"
        self._context.run("cp", "--sparse=always", self.disk, copy)
        self.states.append(copy)
        self.points.append(report["point"])


def rows_of(text: str) -> list[dict[str, Any]]:
    """A listing, whether it is the list itself or the one list in an object."""
    found = json.loads(text)
    if isinstance(found, dict):
        found = next(value for value in found.values() if isinstance(value, list))
    return list(found)


def one_row(text: str) -> dict[str, Any]:
    """The only row of a listing."""
    rows = rows_of(text)
    expect(1, len(rows), "rows of the report")
    return rows[0]


def disk_of(path: Path, size: int, source: random.Random) -> str:
    """A new raw disk, a third of it random, a third text, the rest holes; its SHA-256."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, CHUNK):
            _fill(file, offset, CHUNK, source)
    return file_digest(path)


def rewrite(path: Path, source: random.Random, pieces: int = 6) -> str:
    """Write data and zeroes to a few random places of a disk; its SHA-256."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        for _ in range(pieces):
            length = source.randrange(512, 4 * CHUNK)
            offset = source.randrange(size - length)
            if source.random() < 0.3:
                file.seek(offset)
                file.write(bytes(length))
            else:
                _fill(file, offset, length, source)
    return file_digest(path)


def _fill(file: Any, offset: int, length: int, source: random.Random) -> None:
    kind = source.randrange(3)
    if kind == 0:
        return
    file.seek(offset)
    if kind == 1:
        file.write(source.randbytes(length))
        return
    words = b"".join(hashlib.sha256(source.randbytes(8)).hexdigest().encode() for _ in range(9))
    file.write((words * (length // len(words) + 1))[:length])
