"""Overlays beside the base they lie over, nbdkit's ``cow`` filter, and qemu-nbd on a qcow2 overlay.

::

    reads    base raw     nbdsrv serve IMAGE          | the same with --overlay, untouched
             base point   nbdsrv serve POINT          | the same with --overlay, untouched
    writes   over raw     nbdsrv serve IMAGE --overlay | nbdkit --filter=cow | qemu-nbd O.qcow2
               first   into a fresh overlay, so that most blocks are met for the first time
               again   on into the same one

Everything that one program writes lies in one directory, the same file system for all; it is
removed, and the file system synced, before the next one's turn. Servers run one at a time, in
rotating order.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from conformance.benchmark import image
from conformance.benchmark.cells import Peer, Transport
from conformance.benchmark.client import attach
from conformance.benchmark.load import start_fio
from conformance.benchmark.report import BenchmarkError, OverlaySample, Report
from conformance.benchmark.rounds import Progress
from conformance.benchmark.servers import GREETING, ROOT, Server, receive, stop

__all__ = ["overlay_table", "run_overlay"]

SETTLING = ("randread", "4k", 16)
SETTLE_S = 1.0
"""Long enough for any recording of a boot to end by its own bound."""

READY_S = 20.0
COMMAND_S = 300.0
READS = (
    ("randread", "4k", 1),
    ("randread", "4k", 16),
    ("randread", "64k", 16),
    ("read", "256k", 8),
)
WRITES = (("randwrite", "4k", 1), ("randwrite", "4k", 16))
BASE, OVERLAY, COW, QCOW2 = "base alone", "nbdsrv overlay", "nbdkit cow", "qemu-nbd qcow2"
BARS = {BASE: 0.8, COW: 1.0, QCOW2: 1.0}
"""Our overlay's rate over the other's, medians."""


@dataclass(frozen=True, slots=True)
class Bases:
    """What overlays lie over: SOURCEs of ours by name, and the raw image."""

    sources: dict[str, str]
    path: str
    size: int


def run_overlay(
    path: str,
    cache: str,
    report: Report,
    progress: Progress,
    *,
    rounds: int,
    seconds: float,
) -> None:
    """Measure all of it, round by round; what fails is noted and the run goes on."""
    with tempfile.TemporaryDirectory(prefix="overlay-", dir=cache) as directory:
        size = os.path.getsize(path)
        point = _point(path, directory)
        bases = Bases({"raw": path, "point": point}, path, size)
        for turn in range(rounds):
            for base, source in bases.sources.items():
                for kind in _rotated((BASE, OVERLAY), turn):
                    with _noting(report, f"{kind}, {base}, round {turn + 1}"):
                        _reads(kind, base, source, bases, directory, turn, report, seconds)
                        progress(f"round {turn + 1} reads {base} {kind}")
            for load in WRITES:
                for kind in _rotated((OVERLAY, COW, QCOW2), turn):
                    with _noting(report, f"{kind}, writes, round {turn + 1}"):
                        _writes(kind, load, bases, directory, turn, report, seconds)
                        progress(f"round {turn + 1} {load[0]} qd{load[2]} {kind}")


def _point(path: str, directory: str) -> str:
    """The image as a restore point."""
    repository = f"repo:{os.path.join(directory, 'repository')}"
    for words in (
        ("init", repository, "--quiet"),
        ("backup", path, "--to", repository, "--group", "vm", "--quiet"),
    ):
        _command(sys.executable, "-m", "nbdsrv", *words)
    return f"{repository}#vm"


def _command(*words: str) -> None:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=COMMAND_S, cwd=ROOT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchmarkError(f"{words[0]}: {error}") from error
    if done.returncode:
        raise BenchmarkError(f"{' '.join(words[:4])} failed: {done.stderr.strip()[-300:]}")


def _rotated(kinds: Sequence[str], turn: int) -> list[str]:
    first = turn % len(kinds)
    return [*kinds[first:], *kinds[:first]]


def _reads(
    kind: str,
    base: str,
    source: str,
    bases: Bases,
    directory: str,
    turn: int,
    report: Report,
    seconds: float,
) -> None:
    with _serving(kind, source, bases, directory) as server, contextlib.ExitStack() as settled:
        image.warm(bases.path)
        # One client stays, as a VM does, and has been there for a moment: what an overlay does
        # while a system boots (it records what is read) is not what is measured.
        settled.enter_context(attach(server))
        with start_fio(server, "", *SETTLING, seconds=SETTLE_S, size=bases.size) as running:
            running.result()
        for rw, block, depth in READS:
            name = f"{base}: {rw} {block} depth {depth}"
            _sample(server, kind, name, (rw, block, depth), bases.size, turn, report, seconds)


def _writes(
    kind: str,
    load: tuple[str, str, int],
    bases: Bases,
    directory: str,
    turn: int,
    report: Report,
    seconds: float,
) -> None:
    with _serving(kind, bases.path, bases, directory) as server:
        image.warm(bases.path)
        for times in ("first", "again"):
            name = f"over raw: {load[0]} {load[1]} depth {load[2]}, {times}"
            _sample(server, kind, name, load, bases.size, turn, report, seconds)
    os.sync()  # nobody is to pay for what another has left in the page cache


def _sample(
    server: Server,
    kind: str,
    name: str,
    load: tuple[str, str, int],
    size: int,
    turn: int,
    report: Report,
    seconds: float,
) -> None:
    rw, block, depth = load
    with start_fio(server, "", rw, block, depth, seconds=seconds, size=size) as running:
        result = running.result()
    rate = result.iops if block == "4k" else result.rate
    report.overlay.append(OverlaySample(name, kind, turn + 1, rate))


@contextlib.contextmanager
def _serving(kind: str, source: str, bases: Bases, directory: str) -> Iterator[Server]:
    """One server, ready, with a directory of its own for what is written."""
    with tempfile.TemporaryDirectory(prefix="run-", dir=directory) as scratch:
        path = os.path.join(scratch, "s")
        command = _words(kind, source, bases, scratch, path)
        environment = {**os.environ, "TMPDIR": scratch, "PYTHONPATH": ROOT}
        with open(os.path.join(scratch, "log"), "wb") as log:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=scratch,
                    env=environment,
                )
            except OSError as error:
                raise BenchmarkError(f"{command[0]}: {error}") from error
        server = Server(Peer.OURS, Transport.UNIX, scratch, process, path, 0, None)
        try:
            _await_ready(server, kind)
            yield server
        finally:
            stop(process)


def _words(kind: str, source: str, bases: Bases, scratch: str, path: str) -> list[str]:
    if kind in {BASE, OVERLAY}:
        words = [sys.executable, "-m", "nbdsrv", "serve", source, "--listen", f"unix:{path}"]
        return words if kind == BASE else [*words, "--overlay", os.path.join(scratch, "overlays")]
    if kind == COW:  # keeps what is written in an unlinked file in $TMPDIR
        return ["nbdkit", "-f", "-U", path, "--filter=cow", "file", bases.path]
    top = os.path.join(scratch, "top.qcow2")
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", bases.path, "-F", "raw", top]
    _command(*words)
    return ["qemu-nbd", "--persistent", "--shared=8", "-f", "qcow2", "-k", path, top]


def _await_ready(server: Server, kind: str) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise BenchmarkError(f"{kind} has ended by itself: {server.log()}")
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(server.socket_path)
            if receive(probe, len(GREETING)) == GREETING:
                return
        time.sleep(0.05)
    raise BenchmarkError(f"{kind} did not get ready: {server.log()}")


@contextlib.contextmanager
def _noting(report: Report, where: str) -> Iterator[None]:
    try:
        yield
    except BenchmarkError as error:
        report.failures.append(f"{where}: {error}")


def overlay_table(report: Report) -> tuple[str, list[str], list[list[str]]]:
    """Title, header, lines: medians, and our ratio to each of the others with its bar."""
    columns = [OVERLAY, *BARS]
    lines = []
    for cell in dict.fromkeys(sample.cell for sample in report.overlay):
        middle = {
            kind: median(found)
            for kind in columns
            if (found := [s.rate for s in report.overlay if (s.cell, s.kind) == (cell, kind)])
        }
        shown = [f"{middle[kind]:,.0f}" if kind in middle else "-" for kind in columns]
        ratios = []
        for kind, bar in BARS.items():
            if kind in middle and OVERLAY in middle:
                ratio = middle[OVERLAY] / middle[kind]
                ratios.append(f"{'' if ratio >= bar else '! '}{ratio:.2f} of {bar:g}")
        unit = "IOPS" if " 4k " in cell else "MB/s"
        lines.append([cell, unit, *shown, ", ".join(ratios)])
    return (
        "Overlays: medians, and ours over the others",
        ["", "unit", *columns, "ratio, bar"],
        lines,
    )
