"""``kill -9`` of backup, prune and gc, on a repository that is being served.

::

    disk changes ── backup ──✂     every point that ls shows reads as it was, by nbdcopy
                    prune  ──✂     the next backup succeeds
                    gc     ──✂     ... and in the end gc frees what the dead have left, verify is
                                   clean, and no more is stored than by a repository made afresh

Half of the kills come at a random time, half when a random one of the calls is entered by which
files come into being, go, and are made durable.

Each lane has a repository, a disk and a server of its own; both cores of a small machine are busy.
``NBDSRV_KILLS_SEED`` repeats the disks and the moments of an earlier run, as far as a scheduler
lets anything be repeated; the seed is printed.
"""

import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click

from conformance.context import Context
from conformance.image import MIB, file_digest
from conformance.killing import fatal_call, run_killed
from conformance.outcome import CheckFailedError
from conformance.registry import Part, check, expect
from conformance.repository import Repository, command, disk_of, rewrite
from conformance.server import Server

SEED_VARIABLE = "NBDSRV_KILLS_SEED"
LANES = 2
QUICK_KILLS, SLOW_KILLS = 30, 200
SIZE = 8 * MIB
KEPT = 3
"""Points that prune leaves."""
SLACK = 256 << 10
"""Bytes that may be stored more than needed: the index, points, maps in their packs."""
HANG_S = 60.0
DURABLE = (
    ("?link,?linkat", 2),
    ("?rename,?renameat,?renameat2", 2),
    ("?unlink,?unlinkat", 4),
    ("fdatasync", 3),
    ("fsync", 6),
)
"""System calls between which lie all states of a repository in a directory, and the last of them
that is fatal, as each thread counts."""
PRUNING = (("?unlink,?unlinkat", 2),)
"""Of prune, which makes nothing."""
MAX_TURNS = 3
"""Turns for a kill, at most: a command may end before it comes to that."""


@dataclass
class Timing:
    """How long a command takes here and now, so that kills fall into its work.

    Attributes:
        seconds: of the last run that was let finish.
        killed: how many were.
        ended: how many ended before it came to that.
    """

    seconds: float
    killed: int = 0
    ended: int = 0


@dataclass
class Lane:
    """One repository and its life.

    Attributes:
        repo: the repository, with the disk of every point ever made.
        disk: what is backed up.
        source: of all that is random.
        server: the repository, served all the time.
        timings: by command.
    """

    repo: Repository
    disk: Path
    source: random.Random
    server: Server
    timings: dict[str, Timing] = field(default_factory=dict)

    def words(self, kind: str) -> list[str]:
        """The command line."""
        return {
            "backup": self.repo.backup_words(self.disk),
            "prune": ["prune", self.repo.target, "--keep-last", str(KEPT)],
            "gc": ["gc", self.repo.target, "--grace", "0s"],
        }[kind]

    def turn(self, kind: str) -> bool:
        """Kill one, then prove that nothing is lost and that the next backup succeeds.

        Returns:
            False if it had ended before.
        """
        digest = rewrite(self.disk, self.source) if kind == "backup" else None
        if kind == "gc":
            self.repo.let_a_day_pass()
        killed = self._kill(kind)
        # A point may have been committed, whether or not its maker lived to say so.
        self.repo.prove(self.server, unheard=digest)
        if killed:
            self._finish_backup()
        return killed

    def _kill(self, kind: str) -> bool:
        """At a moment of its second half, or when it is about to make something durable."""
        words, timing = command(*self.words(kind)), self.timings[kind]
        delay = None
        if self.source.random() < 0.5:
            calls = PRUNING if kind == "prune" else DURABLE
            words = [*fatal_call(self.source, calls), *words]
        else:
            # The first half is an interpreter starting up, where nothing can be lost.
            delay = timing.seconds * self.source.uniform(0.45, 1.0)
        began = time.monotonic()
        if run_killed(kind, words, self.repo.variables(), hang_s=HANG_S, kill_s=delay):
            timing.killed += 1
            return True
        timing.ended += 1
        if delay is not None:
            timing.seconds = time.monotonic() - began
        return False

    def _finish_backup(self) -> None:
        began = time.monotonic()
        self.repo.backup(self.disk, rewrite(self.disk, self.source))
        self.timings["backup"].seconds = time.monotonic() - began

    def measure(self) -> None:
        """One of each, let finish."""
        for kind in ("backup", "prune", "gc"):
            began = time.monotonic()
            if kind == "backup":
                self.repo.backup(self.disk, file_digest(self.disk))
            else:
                self.repo.run(*self.words(kind))
            self.timings[kind] = Timing(time.monotonic() - began)

    def clean(self, context: Context, name: str) -> None:
        """Garbage goes away, the rest stays and is sound."""
        self.repo.run(*self.words("prune"))
        self.repo.let_a_day_pass()
        self.repo.run(*self.words("gc"))
        points = self.repo.prove(self.server)
        expect(KEPT, len(points), "points left in the end")
        self.repo.run("verify", self.repo.target, "--level", "chunks")
        dead = [path for path in self.repo.leases() if b'"reader"' not in path.read_bytes()]
        expect([], [path.name for path in dead], "leases of killed writers that gc leaves")
        self._compare_with_fresh(context, name, points)

    def _compare_with_fresh(self, context: Context, name: str, points: list[str]) -> None:
        fresh = Repository(context, f"repo:{context.directory / f'fresh{name}'}")
        fresh.init()
        for point in points:
            state = context.directory / f"state{name}.img"
            self.repo.run("restore", "--force", "--quiet", self.repo.source(point), state)
            fresh.backup(state, self.repo.known[point])
        # A pack is rewritten when less than half of it is live, so twice as much may be stored.
        allowed = 2 * fresh.stored_bytes() + SLACK
        if self.repo.stored_bytes() > allowed:
            text = f"{self.repo.stored_bytes()} bytes are stored where {allowed} would do"
            raise CheckFailedError(text)


def _lane(context: Context, seed: int, name: str) -> Lane:
    repo = Repository(context, f"repo:{context.directory / f'repo{name}'}")
    repo.init()
    source = random.Random(f"{seed}/{name}")
    disk = context.directory / f"disk{name}.img"
    repo.backup(disk, disk_of(disk, SIZE, source))
    lane = Lane(repo, disk, source, repo.serve())
    lane.measure()
    return lane


def _live(context: Context, seed: int, name: str, kills: int) -> list[Timing]:
    """One lane from its beginning to its end.

    Raises:
        CheckFailedError: with the seed and the turn.
    """
    lane = _lane(context, seed, name)
    for turn in range(kills * MAX_TURNS):
        if sum(timing.killed for timing in lane.timings.values()) == kills:
            break
        kind = lane.source.choices(("backup", "prune", "gc"), (5, 3, 3))[0]
        try:
            lane.turn(kind)
        except CheckFailedError as error:
            where = f"seed {seed}, lane {name}, turn {turn}, {kind} killed"
            raise CheckFailedError(f"{where}: {error}") from error
    lane.clean(context, name)
    return list(lane.timings.values())


def _run(context: Context, kills: int) -> None:
    given = os.environ.get(SEED_VARIABLE)
    seed = int(given) if given else random.SystemRandom().randrange(1 << 32)
    with ThreadPoolExecutor(LANES) as threads:
        lanes = [
            threads.submit(_live, context, seed, str(number), kills // LANES)
            for number in range(LANES)
        ]
    timings = [timing for lane in lanes for timing in lane.result()]
    killed, ended = sum(each.killed for each in timings), sum(each.ended for each in timings)
    text = f"kills: {SEED_VARIABLE}={seed}: {killed} killed, {ended} had ended before"
    click.echo(text, file=sys.stderr)
    if killed < kills // LANES * LANES:
        raise CheckFailedError(f"{text}: this machine's moods are too much for it")


@check("kill -9", f"{QUICK_KILLS} times", needs=("nbdcopy", "strace"))
def quick(context: Context) -> None:
    """In every run."""
    _run(context, QUICK_KILLS)


@check("kill -9", f"{SLOW_KILLS} times", needs=("nbdcopy", "strace"), part=Part.REPOSITORY)
def slow(context: Context) -> None:
    """Minutes of it."""
    _run(context, SLOW_KILLS)
