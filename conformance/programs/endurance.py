"""200 clients of 50 exports, while everything about them changes: no error, no leak.

::

    fio x 200     4 KiB random reads of 40 images and 10 restore points, at a set rate
    nbdcopy       one export after the other, its SHA-256 compared
    reload        exports and a repository come and go, terms change; every other time by SIGHUP
    backup, prune, gc --grace 0    of another VM in the same repository
    watcher       memory and descriptors of the server, once a second

The rate is set so that the load is the same for the whole time and on every machine that keeps up;
fio says how long reads took.
"""

import json
import random
import signal
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from conformance.configured import ConfiguredServer
from conformance.context import Context
from conformance.image import KIB, MIB, file_digest
from conformance.outcome import CheckFailedError
from conformance.registry import Part, check, expect
from conformance.repository import DISK, Repository, disk_of, rewrite

QUICK_S, LONG_S = 20, 600
IMAGES, POINTS, CLIENTS_EACH = 40, 10, 4
SIZE = 8 * MIB
RATE = 10
"""Reads a second of each client."""
DEPTH = 2
CACHE_MIB = 16
"""Small: it must be full before memory is looked at."""
GROWTH = {QUICK_S: 24 * MIB, LONG_S: 8 * MIB}
"""Of memory between the second quarter and the last that is no leak: caches that fill, and what
the allocator does. Twenty seconds are not enough to tell a small leak from that."""


@dataclass
class _World:
    """What is served, and what it holds."""

    server: ConfiguredServer
    digests: dict[str, str] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)
    reloads: int = 0
    collections: int = 0
    copies: int = 0
    resident: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)


def _config(tables: list[str], turn: int, directory: Path, target: str) -> str:
    head = f"""\
listen = ["unix:{directory}/nbd"]
[admin]
socket = "{directory}/admin"
[audit]
file = "{directory}/audit"
[limits]
cache = {CACHE_MIB}
"""
    changing = "".join(
        f'[[export]]\nname = "extra{n}"\nsource = "{directory}/image{n}.img"\n'
        for n in range(turn % 5)
    )
    if turn % 3 == 1:
        changing += f'[repository.whole]\nlocation = "{target}"\n'
    terms = f'description = "turn {turn}"\nallow = [{{uid = {turn + 1}, access = "none"}}, {{}}]\n'
    return head + "".join(f"{table}{terms}" for table in tables) + changing


def _reload(world: _World, tables: list[str], target: str) -> None:
    directory = world.server.config.parent
    while not world.over.wait(1.0):
        world.reloads += 1
        world.server.write(_config(tables, world.reloads, directory, target))
        if world.reloads % 2:
            world.server.nbdsrv("reload")
            continue
        before = world.server.status()["server"]["reloads"]["succeeded"]
        world.server.signal(signal.SIGHUP)
        deadline = time.monotonic() + 20
        while world.server.status()["server"]["reloads"]["succeeded"] == before:
            if time.monotonic() > deadline:
                raise CheckFailedError(f"SIGHUP did nothing: {world.server.stderr()}")
            time.sleep(0.2)


def _collect(world: _World, repo: Repository, disk: Path, source: random.Random) -> None:
    while not world.over.wait(0.5):
        repo.backup(disk, rewrite(disk, source))
        repo.run("prune", f"{repo.target}#{repo.group}", "--keep-last", "2")
        repo.run("gc", repo.target, "--grace", "0s")
        world.collections += 1


def _copy(world: _World, context: Context, source: random.Random) -> None:
    target = context.directory / "copy"
    while not world.over.wait(0.2):
        name = source.choice(list(world.digests))
        context.run("nbdcopy", world.server.uri(name), target, timeout_s=120)
        expect(world.digests[name], file_digest(target), f"sha256 of {name}")
        world.copies += 1


def _watch(world: _World) -> None:
    while not world.over.wait(1.0):
        world.resident.append(world.server.resident())
        world.descriptors.append(world.server.descriptors())


def _fio(world: _World, context: Context, seconds: int) -> dict[str, Any]:
    job = [
        "[global]",
        "ioengine=nbd",
        "rw=randread",
        "bs=4k",
        f"iodepth={DEPTH}",
        f"numjobs={CLIENTS_EACH}",
        f"rate_iops={RATE}",
        "rate_process=poisson",
        "thread=1",
        "time_based=1",
        f"runtime={seconds}",
        "group_reporting=1",
        f"size={SIZE}",
    ]
    for number, name in enumerate(world.digests):
        job += [f"[e{number}]", f"uri={world.server.uri(name)}"]
    path = context.directory / "load.fio"
    path.write_text("\n".join(job) + "\n")
    words = ("fio", "--output-format=json", "--max-jobs=1000", path)
    text = context.run(*words, timeout_s=seconds + 120).stdout
    (done,) = json.loads(text[text.index("{") :])["jobs"]
    expect(0, done["error"], "fio's error")
    read: dict[str, Any] = done["read"]
    return read


def _flat(samples: list[int], slack: float, what: str) -> None:
    """Compares the second quarter, when all is warm, with the last."""
    quarter = max(1, len(samples) // 4)
    before = statistics.median(samples[quarter : 2 * quarter])
    after = statistics.median(samples[-quarter:])
    if after > before + slack:
        raise CheckFailedError(f"{what} grew from {before:.0f} to {after:.0f}: {samples[::10]}")


def _endure(context: Context, seconds: int) -> None:
    directory, source = context.directory, random.Random(6)
    repo = Repository(context, f"repo:{directory / 'repo'}", group="kept")
    repo.init()
    digests, tables = {}, []
    for number in range(IMAGES):
        path = directory / f"image{number}.img"
        digests[f"image{number}"] = disk_of(path, SIZE, source)
        tables.append(f'[[export]]\nname = "image{number}"\nsource = "{path}"\n')
    state = directory / "state.img"
    disk_of(state, SIZE, source)
    for number in range(POINTS):
        digest = rewrite(state, source)
        point = repo.backup(state, digest)["point"]
        digests[f"point{number}"] = digest
        text = f"{repo.target}#{repo.group}/{DISK}@{point}"
        tables.append(f'[[export]]\nname = "point{number}"\nsource = "{text}"\n')
    server = ConfiguredServer(
        context, _config(tables, 0, directory, repo.target), lines=IMAGES + POINTS
    ).begin()
    world = _World(server, digests)
    other = Repository(context, repo.target, group="other")
    idle = server.descriptors()
    with ThreadPoolExecutor(4) as threads:
        work = [
            threads.submit(_reload, world, tables, repo.target),
            threads.submit(_collect, world, other, state, random.Random(7)),
            threads.submit(_copy, world, context, random.Random(8)),
            threads.submit(_watch, world),
        ]
        try:
            read = _fio(world, context, seconds)
            attached = max(world.descriptors)
        finally:
            world.over.set()
        for each in work:
            each.result()
    _judge(world, read, seconds, idle, attached)


def _judge(world: _World, read: dict[str, Any], seconds: int, idle: int, attached: int) -> None:
    clients = (IMAGES + POINTS) * CLIENTS_EACH
    if attached < clients:
        raise CheckFailedError(f"{attached} descriptors cannot be {clients} clients")
    if not (world.reloads and world.collections and world.copies):
        raise CheckFailedError(f"not everything happened: {world}")
    expected = clients * RATE * seconds
    if read["total_ios"] < expected * 0.5:
        raise CheckFailedError(f"{read['total_ios']} reads of {expected}: it does not keep up")
    _flat(world.resident, GROWTH.get(seconds, GROWTH[QUICK_S]), "memory")
    _flat(world.descriptors, 16, "descriptors")
    deadline = time.monotonic() + 10
    while world.server.descriptors() > idle:  # all clients have left
        if time.monotonic() > deadline:
            raise CheckFailedError(f"{world.server.descriptors()} descriptors, {idle} at first")
        time.sleep(0.1)
    document = world.server.status()
    expect(0, document["server"]["reloads"]["failed"], "failed reloads")
    failed = sum(export.get("failed", 0) for export in document["exports"])
    expect(0, failed, "requests that failed")
    waits = {name: value / 1e6 for name, value in read["clat_ns"]["percentile"].items()}
    lag = document["server"]["loop_lag"]
    click.echo(
        f"service: {clients} clients, {seconds} s, {read['total_ios']} reads; "
        f"p50 {waits['50.000000']:.2f} ms, p99 {waits['99.000000']:.2f} ms, "
        f"p99.9 {waits['99.900000']:.2f} ms; loop lag p99 {lag['p99'] * 1e3:.1f} ms; "
        f"{world.reloads} reloads, {world.collections} times backup, prune and gc, "
        f"{world.copies} copies; memory {max(world.resident) // KIB} KiB at most, "
        f"descriptors {max(world.descriptors)} at most, {world.server.descriptors()} in the end"
    )


@check("service", "200 clients, 50 exports", needs=("fio", "nbdcopy"))
def quick(context: Context) -> None:
    """Twenty seconds of it."""
    _endure(context, QUICK_S)


@check("service", "for ten minutes", needs=("fio", "nbdcopy"), part=Part.SERVICE)
def slow(context: Context) -> None:
    """Ten minutes."""
    _endure(context, LONG_S)
