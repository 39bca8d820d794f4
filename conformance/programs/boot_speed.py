"""How long a restore point takes to boot, beside the same disk on local storage and other servers.

::

    local qcow2        QEMU ─────────────────────────────── first sector ── init
    nbdsrv             serve ── listens ── QEMU ─────────── first sector ── init
    nbdkit cow         nbdkit --filter=cow file ── QEMU ─── first sector ── init
    Benji              benji nbd ── QEMU ────────────────── first sector ── init

Interleaved, ``ROUNDS`` each, the best of them: emulated machines on a busy host vary. The bar is
ours beside the local image's, from the start of QEMU to init: at most 1.2 times.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from conformance.benchmark.report import BenchmarkError
from conformance.benchmark.repository.benji_setup import benji_command
from conformance.boot.disk import NEEDS
from conformance.boot.machine import BootedMachine, drive_of
from conformance.boot.point import EXPORT, RestorePoint
from conformance.context import Context
from conformance.outcome import CheckFailedError, MissingPeerError
from conformance.process import find_program, kill_group
from conformance.registry import Part, check
from conformance.service import free_ports, is_listening

ROUNDS = 3
BAR = 1.2
READY_S = 20.0
LOCAL, OURS, COW, BENJI = "local qcow2", "nbdsrv, repository", "nbdkit cow, raw", "Benji"


@dataclass(frozen=True, slots=True)
class Boot:
    """Seconds: until the server listened, then from QEMU's start to first sector and to init."""

    serving: float
    first: float
    init: float


@check("boot", "as fast as a local image", needs=(*NEEDS, "nbdkit"), part=Part.BOOT)
def as_fast(context: Context) -> None:
    """Prints the table; ours takes at most 1.2 times what a local qcow2 does."""
    point = RestorePoint(context, f"repo:{context.directory}/repo")
    local = context.directory / "local.qcow2"
    context.run("qemu-img", "convert", "-O", "qcow2", point.disk, local, timeout_s=60)
    ways: dict[str, Callable[[], Boot]] = {
        LOCAL: lambda: _local(context, local),
        OURS: lambda: _ours(context, point),
        COW: lambda: _cow(context, point.disk),
    }
    benji = _benji_storage(context, point.disk)
    if benji is not None:
        ways[BENJI] = lambda: _benji(context, benji)
    taken: dict[str, list[Boot]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name in list(ways):
            try:
                taken[name].append(ways[name]())
            except CheckFailedError as error:
                if name != BENJI:
                    raise
                click.echo(f"Benji cannot: {error}")
                del ways[name], taken[name]
    best = {name: min(boots, key=lambda boot: boot.init) for name, boots in taken.items()}
    _print(best)
    ratio = best[OURS].init / best[LOCAL].init
    if ratio > BAR:
        raise CheckFailedError(f"boots in {ratio:.2f} times what a local qcow2 takes, bar {BAR}")


def _print(best: dict[str, Boot]) -> None:
    local = best[LOCAL].init
    click.echo(
        f"{'best of ' + str(ROUNDS):20} {'listens':>8} {'sector':>8} {'init':>8} {'ratio':>6}"
    )
    for name, boot in best.items():
        cells = (f"{boot.serving:.2f} s", f"{boot.first:.2f} s", f"{boot.init:.2f} s")
        click.echo(f"{name:20} {' '.join(f'{c:>8}' for c in cells)} {boot.init / local:6.2f}")


def _booted(context: Context, drive: str, serving: float) -> Boot:
    machine = BootedMachine(context, drive)
    try:
        machine.await_first_sector()
        machine.await_boot()
    finally:
        machine.kill()
    return Boot(serving, machine.first_sector_s, machine.booted_s)


def _local(context: Context, image: Path) -> Boot:
    above = context.directory / "above.qcow2"
    words = ("-q", "-f", "qcow2", "-b", image, "-F", "qcow2", above)
    context.run("qemu-img", "create", *words)
    return _booted(context, drive_of(above, format_="qcow2"), 0.0)


def _ours(context: Context, point: RestorePoint) -> Boot:
    served = point.serve()
    try:
        return _booted(context, drive_of(served.socket, export=EXPORT), served.started_s)
    finally:
        served.stop()
        nothing_left = served.overlay(EXPORT.replace("/", "%2F"))
        if nothing_left.exists():
            point.run("overlay", "drop", nothing_left, "--quiet")


def _cow(context: Context, disk: Path) -> Boot:
    path = context.directory / f"k{time.monotonic_ns() % 10**9}"
    words: list[str | Path] = ["nbdkit", "-f", "-U", path, "--filter=cow", "file", disk]
    with _running(words, path.exists) as serving:
        return _booted(context, drive_of(path, export=""), serving)


@contextmanager
def _running(words: list[str | Path], ready: Callable[[], bool]) -> Iterator[float]:
    """Another server until the end of the block; seconds until it was ready."""
    began = time.monotonic()
    process = subprocess.Popen(
        [find_program(str(words[0])), *map(str, words[1:])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not ready():
            if process.poll() is not None or time.monotonic() > began + READY_S:
                raise CheckFailedError(f"{words[0]} does not serve")
            time.sleep(0.01)
        yield time.monotonic() - began
    finally:
        kill_group(process)


def _benji_storage(context: Context, disk: Path) -> list[str] | None:
    """Benji's words over a storage that holds the disk; None where it cannot be installed."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = os.path.join(base, "nbdsrv", "benchmark")
    os.makedirs(cache, exist_ok=True)
    try:
        command = benji_command(cache)
    except BenchmarkError as error:
        click.echo(f"Benji cannot be installed: {error}")
        return None
    storage = {"name": "s", "storageId": 1, "module": "file"}
    (context.directory / "benji").mkdir()
    said = {
        "configurationVersion": "1",
        "databaseEngine": f"sqlite:///{context.directory}/benji.sqlite",
        "defaultStorage": "s",
        "storages": [{**storage, "configuration": {"path": str(context.directory / "benji")}}],
        "ios": [{"name": "file", "module": "file"}],
        "nbd": {"blockCache": {"directory": str(context.directory / "bc")}},
    }
    path = context.directory / "benji.yaml"
    path.write_text(json.dumps(said))
    words = [*command, "-c", str(path), "--log-level", "ERROR"]
    context.run(*words, "database-init", timeout_s=60)
    context.run(*words, "backup", "-u", "web", f"file:{disk}", "vm", timeout_s=120)
    return words


def _benji(context: Context, words: list[str]) -> Boot:
    (port,) = free_ports(1)
    serve: list[str | Path] = [*words, "nbd", "--bind-port", str(port)]
    drive = f"file=nbd://127.0.0.1:{port}/web,format=raw,if=none,id=disk"
    try:
        with _running(serve, lambda: is_listening(port)) as serving:
            return _booted(context, drive, serving)
    except MissingPeerError as error:
        raise CheckFailedError(str(error)) from error
