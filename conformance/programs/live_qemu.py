"""``nbdsrv backup qemu:…`` of a QEMU whose guest writes all the time; and its ``kill -9``.

::

    guest   w w w w w w w w w w w w w w w w w w w w w w      never stops
    backup     full      inc     inc ✂   inc      inc ✂ ✂ inc
    point       │         │       │?      │        │           each is a prefix of the log of
                └─────────┴───────┴───────┴────────┴── replay  writes, on all disks at once

What a killed backup has committed counts like any other point. The one after it must be told only
what has changed since a point that is there: incremental, and exact.

``NBDSRV_KILLS_SECONDS`` gives the many kills of the slow part more time than twenty minutes.
``NBDSRV_KILLS_SEED`` repeats the writes and the moments of an earlier run, as far as a scheduler
lets anything be repeated; the seed is printed.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import click

from conformance.context import Context
from conformance.image import file_digest
from conformance.killing import fatal_call, run_killed
from conformance.outcome import CheckFailedError
from conformance.process import kill_group, tail
from conformance.registry import Part, check, expect, expect_in
from conformance.repository import CHUNK, Repository, command
from conformance.server import Server
from conformance.virtual_machine import DISKS, VM, Guest, Replay, touched

SEED_VARIABLE = "NBDSRV_KILLS_SEED"
INCREMENTALS = 5
REPOSITORIES = 2
QUICK_KILLS, SLOW_KILLS = 15, 300
TIME_VARIABLE = "NBDSRV_KILLS_SECONDS"
QUICK_S, SLOW_S = 45.0, float(os.environ.get(TIME_VARIABLE, "1200"))
"""Seconds for the kills: a machine that is busy with other things does fewer of them ..."""
LEAST = 5
"""... but a fifth at least, or the check fails."""
HANG_S = 90.0
MAX_CHECKPOINTS = 16
"""Of a disk in the end: what kills have left stays until there are so many, for a repository may
have a point of it."""
FATAL = (
    ("?sendto,?sendmsg,?write", 40),
    ("?sendto,?sendmsg", 25),
    ("?recvfrom,?recvmsg", 40),
    ("?link,?linkat,?rename,?renameat,?renameat2", 2),
    ("fdatasync,fsync", 5),
    ("?unlink,?unlinkat", 2),
)
"""System calls upon entering which a backup is killed, and the last of them that is fatal."""
NEEDS = ("qemu-system-x86_64", "qemu-img", "nbdcopy")


class Lane:
    """A VM, its repositories, and the points that are known to be exact."""

    def __init__(self, context: Context, seed: int, repositories: int) -> None:
        self.context = context
        self.repos = []
        for number in range(repositories):
            target = f"repo:{context.directory / f'repo{number}'}"
            self.repos.append(Repository(context, target, group=VM))
            self.repos[-1].init()
        self.guest = Guest(context, seed)
        self._scratch = context.directory / "scratch"
        self._scratch.mkdir()
        self.source = f"qemu:{self.guest.monitor}?scratch={self._scratch}"
        self.servers = [repo.serve() for repo in self.repos]
        self._replay = Replay(self.guest)
        self._proven: set[str] = set()
        self.guest.start()
        self.guest.await_writes(20)

    def words(self, *options: str) -> list[str]:
        """Of a backup."""
        to = [word for repo in self.repos for word in ("--to", repo.target)]
        return ["backup", self.source, *to, *options]

    def backup(self, *options: str) -> list[dict[str, Any]]:
        """One that lives; its report."""
        finished = self.repos[0].run(*self.words("--json", "--quiet", *options), timeout_s=HANG_S)
        rows: list[dict[str, Any]] = json.loads(finished.stdout)
        return rows

    def prove(self) -> list[int]:
        """Every point that is new is a state of the disks; after how many writes each was."""
        new = []
        for repo, server in zip(self.repos, self.servers, strict=True):
            points = [point for point in repo.points() if point not in self._proven]
            new += [(point, server) for point in points]
        found = []
        for point, server in sorted(new, key=lambda each: each[0]):  # as they were made
            self._replay.advance_to(
                {disk: self.content(server, disk, point) for disk in DISKS}, f"point {point}"
            )
            self._proven.add(point)
            found.append(self._replay.moment)
        return found

    def content(self, server: Server, disk: str, point: str) -> bytes:
        """Of a disk of a point, as nbdcopy gets it."""
        target = self.context.directory / "download"
        try:
            self.context.run("nbdcopy", server.uri(f"{VM}/{disk}@{point}"), target)
            return target.read_bytes()
        finally:
            target.unlink(missing_ok=True)

    def clean(self) -> None:
        """Nothing is left in QEMU, nor on the disk, nor in the repositories."""
        self.guest.stop()
        expect([], self.guest.leftovers(), "what backups have left in QEMU")
        found = [str(path) for path in self._scratch.rglob("*") if path.is_file()]
        expect([], found, "what backups have left on disk")
        checkpoints = self.guest.checkpoints()
        if checkpoints > MAX_CHECKPOINTS:
            raise CheckFailedError(f"{checkpoints} checkpoints are kept of a disk")
        for repo in self.repos:
            repo.run("verify", repo.target, "--level", "chunks")


@check("live QEMU", f"full and {INCREMENTALS} incrementals", needs=NEEDS)
def incrementals(context: Context) -> None:
    """Into two repositories at once; each point is the disks at one moment, bit for bit."""
    lane = Lane(context, 1, REPOSITORIES)
    rows = lane.backup()
    expect({"full"}, {row["mode"] for row in rows}, "modes of the first backup")
    moments = lane.prove()
    expect(REPOSITORIES, len(moments), "points of the first backup")
    for _ in range(INCREMENTALS):
        lane.guest.await_writes(30)
        before = moments[0]
        rows = lane.backup()
        expect({"incremental"}, {row["mode"] for row in rows}, f"modes: {_reasons(rows)}")
        moments = lane.prove()
        expect([moments[0]] * REPOSITORIES, moments, "moments of the points of one backup")
        if before == moments[0]:
            raise CheckFailedError("nothing was written between two backups")
        read = sum(row["read_bytes"] for row in rows if row["repository"] == lane.repos[0].target)
        allowed = touched(lane.guest.log[before : moments[0]], CHUNK)
        # The write under way as the checkpoint begins may count for both backups.
        slack = touched(lane.guest.log[max(before - 1, 0) : before + 1], CHUNK)
        if not 0 < read <= allowed + slack:
            text = f"{read} bytes were read where {allowed} lie in blocks that were written to"
            raise CheckFailedError(text)
    lane.clean()


def _reasons(rows: list[dict[str, Any]]) -> str:
    return "; ".join(row.get("reason", str(row)) for row in rows)


@check("live QEMU", "dry run, info, copy, serve", needs=NEEDS)
def looked_at(context: Context) -> None:
    """Each looks at one moment and leaves the backups' checkpoints as they were."""
    lane = Lane(context, 2, 1)
    repo = lane.repos[0]
    lane.backup()
    lane.prove()
    lane.guest.await_writes(20)
    rows = lane.backup("--dry-run")
    expect({"incremental"}, {row["mode"] for row in rows}, f"modes: {_reasons(rows)}")
    expect(1, len(repo.points()), "points after a dry run")
    replay = Replay(lane.guest)

    info = json.loads(repo.run("info", f"{lane.source}#vdb", "--json").stdout)
    expect(DISKS["vdb"], info["size"], "size that info tells")
    image = context.directory / "copy.img"
    repo.run("copy", f"{lane.source}#vda", image, "--quiet", timeout_s=HANG_S)
    # One disk says less than two about the moment, but a torn copy is no state at all.
    alone = Replay(lane.guest, {"vda": DISKS["vda"]})
    alone.advance_to({"vda": image.read_bytes()}, "what copy has copied")
    server = context.serve(source=lane.source)
    targets = {}
    for disk in DISKS:
        twice = []
        for _ in range(2):
            target = context.directory / f"served-{disk}"
            context.run("nbdcopy", server.uri(f"{VM}/{disk}"), target)
            twice.append(file_digest(target))
            lane.guest.await_writes(5)
        expect(twice[0], twice[1], f"{disk}, read twice")
        targets[disk] = target.read_bytes()
    replay.advance_to(targets, "what is served")
    said = repo.run(*lane.words("--quiet"), code=1)
    expect_in("has frozen this VM", said.stderr, "what a backup says meanwhile")
    server.stop()
    rows = lane.backup()
    expect({"incremental"}, {row["mode"] for row in rows}, f"modes: {_reasons(rows)}")
    lane.prove()
    lane.clean()


@check("live QEMU", "proxy with tee, and nbdcopy", needs=NEEDS)
def proxied(context: Context) -> None:
    """A client and two repositories have the same moment by one read of it."""
    lane = Lane(context, 3, REPOSITORIES)
    lane.backup()
    lane.prove()
    for _ in range(2):
        lane.guest.await_writes(30)
        copied, rows = _through_proxy(context, lane)
        expect({"incremental"}, {row["mode"] for row in rows}, f"modes: {_reasons(rows)}")
        moments = lane.prove()
        expect([moments[0]] * REPOSITORIES, moments, "moments of the points of one proxy")
        for disk in DISKS:
            for repo, server in zip(lane.repos, lane.servers, strict=True):
                what = f"{disk} of {repo.target}, and what the client has read"
                stored = hashlib.sha256(lane.content(server, disk, "latest")).hexdigest()
                expect(copied[disk], stored, what)
    lane.clean()


def _through_proxy(context: Context, lane: Lane) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """SHA-256 of the disks as nbdcopy gets them, and what the proxy says at its end."""
    path = context.directory / f"proxy{time.monotonic_ns() % 10**6}"
    tees = [word for repo in lane.repos for word in ("--tee", repo.target)]
    process = subprocess.Popen(
        command("proxy", lane.source, *tees, "--listen", f"unix:{path}", "--json"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **lane.repos[0].variables()},
        start_new_session=True,
    )
    context.at_end(kill_group, process)
    assert process.stdout is not None
    uris = [process.stdout.readline().decode().strip() for _ in DISKS]
    if not all(uris):
        _, said = process.communicate(timeout=HANG_S)
        raise CheckFailedError(f"the proxy did not start: {tail(said.decode())}")
    digests = {}
    for disk, uri in zip(DISKS, uris, strict=True):
        target = context.directory / f"copied-{disk}"
        context.run("nbdcopy", uri, target)
        digests[disk] = file_digest(target)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=HANG_S)
    if process.returncode:
        raise CheckFailedError(f"the proxy exited {process.returncode}: {tail(said.decode())}")
    rows: list[dict[str, Any]] = json.loads(out)
    return digests, rows


# --- kill -9 --------------------------------------------------------------------------------------


class Killer:
    """Kills backups at random moments.

    Attributes:
        killed: how many.
        ended: how many had ended before.
    """

    def __init__(self, lane: Lane, seed: int) -> None:
        self.killed = self.ended = 0
        self.seconds = 2.0
        self._lane = lane
        self._source = random.Random(seed)

    def kill(self) -> bool:
        """Begin a backup and kill it; False if it had ended before."""
        lane, source = self._lane, self._source
        words, delay = command(*lane.words("--quiet")), None
        if source.random() < 0.5:
            words = [*fatal_call(source, FATAL), *words]
        else:
            # The first part is an interpreter starting up, where nothing can be lost.
            delay = self.seconds * source.uniform(0.25, 1.0)
        variables = lane.repos[0].variables()
        if run_killed("a backup", words, variables, hang_s=HANG_S, kill_s=delay):
            self.killed += 1
            return True
        self.ended += 1
        return False

    def turn(self) -> None:
        """One kill, sometimes two in a row, and a backup that must be incremental and exact."""
        self.kill()
        if self._source.random() < 0.25:
            self.kill()
        self._lane.prove()
        began = time.monotonic()
        rows = self._lane.backup()
        self.seconds = time.monotonic() - began
        expect({"incremental"}, {row["mode"] for row in rows}, f"modes: {_reasons(rows)}")
        if not self._lane.prove():
            raise CheckFailedError("a backup that says it has succeeded has made no point")


def _kills(context: Context, kills: int, seconds: float) -> None:
    given = os.environ.get(SEED_VARIABLE)
    seed = int(given) if given else random.SystemRandom().randrange(1 << 32)
    lane = Lane(context, seed, REPOSITORIES)
    lane.backup()
    lane.prove()
    killer = Killer(lane, seed)
    began, turn = time.monotonic(), 0
    while killer.killed < kills and time.monotonic() - began < seconds:
        try:
            killer.turn()
        except CheckFailedError as error:
            raise CheckFailedError(f"seed {seed}, turn {turn}: {error}") from error
        turn += 1
        for repo in lane.repos:
            repo.run("prune", repo.target, "--keep-last", "8", "--quiet")
    text = f"live QEMU: {SEED_VARIABLE}={seed}: {killer.killed} killed, {killer.ended} had ended"
    click.echo(text, file=sys.stderr)
    if killer.killed < kills // LEAST:
        raise CheckFailedError(f"{text}: this machine's moods are too much for it")
    lane.clean()


@check("live QEMU", f"kill -9, {QUICK_KILLS} times", needs=(*NEEDS, "strace"))
def quick(context: Context) -> None:
    """In every run."""
    _kills(context, QUICK_KILLS, QUICK_S)


@check("live QEMU", f"kill -9, {SLOW_KILLS} times", needs=(*NEEDS, "strace"), part=Part.REPOSITORY)
def slow(context: Context) -> None:
    """Minutes of it."""
    _kills(context, SLOW_KILLS, SLOW_S)
