"""Our client beside nbdcopy: both read the same export of qemu-nbd and throw away what they read.

::

    nbdsrv copy URI null:  ┐                        ┌ qemu-nbd -f raw
    nbdcopy URI null:      ┴─ socket ─ [50 ms] ─────┘

The server is the same for both, the image is warm, and they run one right after the other, each as
often as fits into the seconds of a cell. Of both the time is that of the whole program: ours pays
for Python's start, some tenth of a second. Cells called ``library`` leave that out: there a small
program reads by our library or by libnbd's, and tells how long the reading took (``libraries``).
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from conformance.benchmark import image
from conformance.benchmark.cells import DELAYED, Cell, Peer, Transport
from conformance.benchmark.report import BenchmarkError, Report, Sample
from conformance.benchmark.servers import ROOT, Server, serve, stop

__all__ = ["run_clients"]

DELAY_MS = 50
TIMEOUT_S = 300.0
READY_S = 20.0
MEGA = 1e6
SYSTEM_PYTHON = "/usr/bin/python3"
"""The distribution's: it has libnbd's module."""


def run_clients(
    cells: Sequence[Cell],
    peers: Sequence[Peer],
    path: str,
    size: int,
    rounds: int,
    seconds: float,
    report: Report,
    progress: Callable[[str], None],
) -> None:
    """Each cell by both programs, in turn first."""
    both = [peer for peer in peers if peer in {Peer.OURS, Peer.NBDCOPY}]
    _compile()
    for turn in range(rounds):
        for cell in cells:
            try:
                with (
                    serve(Peer.QEMU, cell.transport, {"": path}) as server,
                    _way(server, cell) as uri,
                ):
                    first = turn % max(len(both), 1)
                    for peer in [*both[first:], *both[:first]]:
                        image.warm(path)
                        _sample(cell, peer, server, uri, size, turn, seconds, report, progress)
            except BenchmarkError as error:
                report.failures.append(f"{cell.name}, round {turn + 1}: {error}")


def _sample(
    cell: Cell,
    peer: Peer,
    server: Server,
    uri: str,
    size: int,
    turn: int,
    seconds: float,
    report: Report,
    progress: Callable[[str], None],
) -> None:
    copied, spent, used, began = 0, 0.0, server.cpu_seconds(), time.monotonic()
    try:
        while spent < seconds:
            spent += _read(peer, cell, uri)
            copied += size
    except BenchmarkError as error:
        report.failures.append(f"{peer}, {cell.name}, round {turn + 1}: {error}")
        return
    cores = (server.cpu_seconds() - used) / (time.monotonic() - began)
    rate = copied / spent / MEGA
    report.samples.append(Sample(cell.name, peer, turn + 1, rate, cores, 0.0))
    progress(f"round {turn + 1} {cell.name} {peer}: {rate:,.0f} MB/s")


def _read(peer: Peer, cell: Cell, uri: str) -> float:
    """Seconds it took to read everything once."""
    options = [f"--connections={cell.depth}", uri, "null:"]
    if cell.rw == "library" and peer is Peer.OURS:
        command = [sys.executable, "-m", "conformance.benchmark.libraries", "nbdsrv", uri]
    elif cell.rw == "library":
        program = os.path.join(os.path.dirname(__file__), "libraries.py")
        command = [SYSTEM_PYTHON, program, "libnbd", uri]
    elif peer is Peer.OURS:
        command = [sys.executable, "-m", "nbdsrv", "copy", "--quiet", *options]
    else:
        command = ["nbdcopy", *options]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchmarkError(f"{command[0]}: {error}") from error
    elapsed = time.monotonic() - start
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
    return float(done.stdout) if cell.rw == "library" else elapsed


def _compile() -> None:
    """What Python would otherwise compile within the first copy, as no installed program does."""
    for package in ("nbdsrv", "protocol"):
        subprocess.run([sys.executable, "-m", "compileall", "-q", package], cwd=ROOT, check=False)


@contextlib.contextmanager
def _way(server: Server, cell: Cell) -> Iterator[str]:
    """The URI to read from: the server's own, or that of a relay which takes its time."""
    if cell.image != DELAYED:
        yield server.uri()
        return
    assert cell.transport is Transport.UNIX
    path = os.path.join(server.directory, "delayed")
    command = [sys.executable, "-m", "conformance.delay", path, server.socket_path, str(DELAY_MS)]
    relay = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, process_group=0)
    try:
        deadline = time.monotonic() + READY_S
        while not os.path.exists(path):
            if relay.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError("the delaying relay did not start")
            time.sleep(0.02)
        yield f"nbd+unix:///?socket={path}"
    finally:
        stop(relay)
