"""Backups, prune and gc of one repository at the same time, all real processes.

::

    vm a   backup  backup  backup  backup ...     each succeeds, and each point
    vm b   backup  backup  backup  backup ...     that is left reads as it was
    gc     prune gc prune gc prune gc     ...     with no grace at all

The same content is in both VMs' disks, so that one's chunks lie in packs the other has made, and
what one VM drops is now and then just what the other is about to use.

::

    vm one  backup prune gc  backup prune gc ...   one after another; what is left of a pack moves
    nbdcopy   latest latest latest latest    ...   by a server that runs all the time: no error
"""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conformance.context import Context
from conformance.image import MIB, file_digest
from conformance.outcome import CheckFailedError
from conformance.registry import Part, check, expect
from conformance.repository import Repository, disk_of, rewrite
from conformance.server import Server

QUICK_BACKUPS, SLOW_BACKUPS = 4, 40
QUICK_MOVES, SLOW_MOVES = 12, 120
SIZE = 4 * MIB
STATES = 4
"""Of the disk; both VMs' go from one to another of them at random."""
KEPT = 2
MAX_CARE = 1000


def _write(repo: Repository, states: list[Path], source: random.Random, backups: int) -> None:
    for _ in range(backups):
        state = source.choice(states)
        repo.backup(state, file_digest(state))


def _care(repo: Repository, over: threading.Event) -> int:
    """Prune and collect until the writers are through; how often."""
    for turn in range(MAX_CARE):
        if over.is_set():
            return turn
        repo.run("prune", repo.target, "--keep-last", str(KEPT))
        repo.run("gc", repo.target, "--grace", "0s")
    raise CheckFailedError(f"the writers are not through after {MAX_CARE} collections")


def _run(context: Context, backups: int) -> None:
    source = random.Random(8)
    states = [context.directory / f"state{number}.img" for number in range(STATES)]
    for state in states:
        disk_of(state, SIZE, source)
    target = f"repo:{context.directory / 'repo'}"
    repos = [Repository(context, target, group=group) for group in ("vm a", "vm b")]
    repos[0].init()
    over = threading.Event()
    with ThreadPoolExecutor(len(repos) + 1) as threads:
        care = threads.submit(_care, repos[0], over)
        writers = [
            threads.submit(_write, repo, states, random.Random(number), backups)
            for number, repo in enumerate(repos)
        ]
        try:
            for writer in writers:
                writer.result()
        finally:
            over.set()
        turns = care.result()
    if not turns:
        raise CheckFailedError("there was not one collection meanwhile")
    server = repos[0].serve()
    for repo in repos:
        repo.run("prune", target, "--keep-last", str(KEPT))
        repo.run("gc", target, "--grace", "0s")
        expect(KEPT, len(repo.prove(server)), f"points of {repo.group}")
    repos[0].run("verify", target, "--level", "chunks")


def _read_on(repo: Repository, server: Server, known: set[str], over: threading.Event) -> int:
    """Download the latest point until the others are through; how often."""
    turns = 0
    while not over.is_set():
        digest = repo.download(server)
        if digest not in known:
            raise CheckFailedError(f"sha256 {digest} of the latest point is none of a disk's")
        turns += 1
    return turns


def _move(context: Context, moves: int) -> None:
    source = random.Random(9)
    repo = Repository(context, f"repo:{context.directory / 'repo'}")
    repo.init()
    disk = context.directory / "disk.img"
    known = {disk_of(disk, SIZE, source)}
    repo.backup(disk, *known)
    over, server = threading.Event(), repo.serve()
    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(_read_on, repo, server, known, over)
        try:
            for _ in range(moves):
                digest = rewrite(disk, source)
                known.add(digest)
                repo.backup(disk, digest)
                repo.run("prune", repo.target, "--keep-last", str(KEPT))
                repo.run("gc", repo.target, "--grace", "0s", "--repack-below", "95")
        finally:
            over.set()
        if reader.result() < moves:
            raise CheckFailedError(f"{reader.result()} downloads in {moves} turns prove little")


@check("repository", "all at once", needs=("nbdcopy",))
def quick(context: Context) -> None:
    """Some backups of two VMs."""
    _run(context, QUICK_BACKUPS)


@check("repository", "all at once, for long", needs=("nbdcopy",), part=Part.REPOSITORY)
def slow(context: Context) -> None:
    """Many."""
    _run(context, SLOW_BACKUPS)


@check("repository", "read while it moves", needs=("nbdcopy",))
def quick_reader(context: Context) -> None:
    """A few seconds of it."""
    _move(context, QUICK_MOVES)


@check("repository", "read while it moves, for long", needs=("nbdcopy",), part=Part.REPOSITORY)
def slow_reader(context: Context) -> None:
    """A minute."""
    _move(context, SLOW_MOVES)
