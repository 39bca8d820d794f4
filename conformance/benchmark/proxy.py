"""The proxy beside what it stands before, and beside itself with a repository in trouble.

::

    passing on   fio, nbdcopy ── qemu-nbd                        direct
                 fio, nbdcopy ── nbdsrv proxy ── qemu-nbd        proxy

    tee          nbdcopy ── nbdsrv proxy ── qemu-nbd
                              ├── tee A     a repository in a directory
                              └── tee B     healthy | a hundred times slower | killed meanwhile

Repository B lies on a disk whose rate can be changed and that can be killed (``weakdisk``). In
every run both repositories are judged: what was stored is compared with the disk, and one that has
no point must have said why. Rounds are interleaved, in rotating order, and every run has processes
and repositories of its own.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from statistics import median

from conformance.benchmark import image
from conformance.benchmark.cells import Peer, Transport
from conformance.benchmark.load import copy_rate, start_fio
from conformance.benchmark.report import BenchmarkError, ProxySample, Report
from conformance.benchmark.rounds import Progress
from conformance.benchmark.servers import Server, serve
from conformance.context import Context
from conformance.outcome import CheckFailedError
from conformance.proxy import Proxy, Told
from conformance.repository import Repository
from conformance.weakdisk import WeakDisk, WeakDiskError, unavailable

__all__ = ["proxy_tables", "run_proxy"]

DIRECT, PROXY = "direct", "proxy"
LOADS = (
    ("nbdcopy to null, 1 connection", "copy", "", 1),
    ("nbdcopy to null, 4 connections", "copy", "", 4),
    ("256 KiB sequential read, depth 8", "read", "256k", 8),
    ("4 KiB random read, depth 1", "randread", "4k", 1),
)
LEAST_RATE, MOST_LATENCY = 0.6, 2.0
"""Bars: of the direct rate at least, of the direct median latency at most (depth 1)."""
HEALTHY, SLOW, DEAD = "both healthy", "one slow", "one dead"
KINDS = (HEALTHY, SLOW, DEAD)
FELT = 0.9
"""Bar: of the rate with both healthy, when one is in trouble, at least."""
SLOWER = 100
"""Times; of what the disk of the second repository takes when it is let."""
DIES_AFTER_S = 0.3
COPY_S = 120.0
MEGA = 1e6


def run_proxy(
    path: str,
    mixed: str,
    report: Report,
    progress: Progress,
    *,
    rounds: int,
    seconds: float,
) -> None:
    """Measure both; what fails is noted and the run goes on.

    Args:
        path: the raw image that is passed on.
        mixed: the VM-like one that is backed up.
        report: gets the samples.
        progress: gets lines.
        rounds: of each.
        seconds: of one load.
    """
    for turn in range(rounds):
        with _noting(report, f"proxy, round {turn + 1}"):
            _passing_on(path, turn, report, progress, seconds)
    why = unavailable()
    if why is not None:
        report.failures.append(f"a disk that fails: {why}")
        return
    rate = 0
    for turn in range(rounds):
        for kind in (*KINDS[turn % 3 :], *KINDS[: turn % 3]):
            with _noting(report, f"tee, {kind}, round {turn + 1}"):
                rate = rate or _disk_rate()
                found = _teed(kind, mixed, rate)
                report.proxy.append(ProxySample("nbdcopy beside two tees", kind, turn + 1, found))
                progress(f"round {turn + 1} tee, {kind}: {found:,.0f} MB/s")


def _passing_on(path: str, turn: int, report: Report, progress: Progress, seconds: float) -> None:
    with serve(Peer.QEMU, Transport.UNIX, {"": path}) as direct, Context() as context:
        target = context.directory / "p"
        proxy = Proxy(context, [direct.uri()], [], exports=1, listen=f"unix:{target}")
        passed = Server(
            Peer.OURS,
            Transport.UNIX,
            direct.directory,
            proxy.process,
            str(target),
            0,
            None,
        )
        both = [(DIRECT, direct, ""), (PROXY, passed, next(iter(proxy.uris)))]
        for name, rw, block, depth in LOADS:
            for kind, server, export in both if turn % 2 else reversed(both):
                image.warm(path)
                rate, latency = _load(server, export, rw, block, depth, path, seconds)
                report.proxy.append(ProxySample(name, kind, turn + 1, rate))
                if depth == 1 and latency:
                    sample = ProxySample(f"{name}, median latency", kind, turn + 1, latency)
                    report.proxy.append(sample)
                progress(f"round {turn + 1} {name} {kind}: {rate:,.0f}")
        proxy.end()


def _load(
    server: Server, export: str, rw: str, block: str, depth: int, path: str, seconds: float
) -> tuple[float, float]:
    size = os.path.getsize(path)
    if rw == "copy":
        return copy_rate(server, depth, size, seconds=seconds, export=export), 0.0
    with start_fio(server, export, rw, block, depth, seconds=seconds, size=size) as running:
        result = running.result()
    return (result.iops if block == "4k" else result.rate), result.p50_us


def _disk_rate() -> int:
    """Bytes a second that the disk of the second repository takes when it is let."""
    block, blocks = os.urandom(4 << 20), 32
    with WeakDisk() as disk:
        fd = os.open(disk.path / "probe", os.O_CREAT | os.O_WRONLY)
        try:
            began = time.monotonic()
            for _ in range(blocks):
                os.write(fd, block)
            os.fsync(fd)
            return round(len(block) * blocks / (time.monotonic() - began))
        finally:
            os.close(fd)


def _teed(kind: str, mixed: str, rate: int) -> float:
    """MB/s of a client, and both repositories judged."""
    with (
        WeakDisk() as disk,
        Context() as context,
        serve(Peer.QEMU, Transport.UNIX, {"": mixed}) as source,
    ):
        sound = Repository(context, f"repo:{context.directory / 'sound'}", group="vm")
        weak = Repository(context, f"repo:{disk.path / 'weak'}", group="vm")
        for repo in (sound, weak):
            repo.init_as_usual()
        image.warm(mixed)
        tees = [sound.target, weak.target]
        listen = f"unix:{context.directory / 'p'}"
        options = ("--group", "vm")
        proxy = Proxy(context, [source.uri()], tees, exports=1, listen=listen, options=options)
        if kind == SLOW:
            disk.slow(rate // SLOWER)
        timer = threading.Timer(DIES_AFTER_S, disk.die if kind == DEAD else _nothing)
        timer.start()
        (uri,) = proxy.uris.values()
        began = time.monotonic()
        context.run("nbdcopy", uri, "null:", timeout_s=COPY_S)
        took = time.monotonic() - began
        timer.join()
        if kind == SLOW:
            disk.mend()  # what it is behind with is of no interest
        told = proxy.end(code=3 if kind == DEAD else 0)
        _judge(told, sound, mixed)
        if kind != DEAD:
            _judge(told, weak, mixed)
        elif told.of(weak.target) or not told.failed(weak.target):
            raise BenchmarkError(f"the dead repository is not reported: {told.rows}")
        return os.path.getsize(mixed) / took / MEGA


def _judge(told: Told, repo: Repository, mixed: str) -> None:
    """Has it a point, with the content of the disk?"""
    if len(told.of(repo.target)) != 1:
        raise BenchmarkError(f"{repo.target} has no point: {told.rows}")
    disk = told.of(repo.target)[0]["disk"]
    repo.run("compare", f"{repo.target}#vm/{disk}@latest", mixed, timeout_s=COPY_S)


def _nothing() -> None:
    """Nobody dies."""


@contextlib.contextmanager
def _noting(report: Report, where: str) -> Iterator[None]:
    try:
        yield
    except (BenchmarkError, CheckFailedError, WeakDiskError) as error:
        report.failures.append(f"{where}: {error}")


def proxy_tables(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titles, headers, lines: medians, and their ratios with the bar."""
    found = []
    cells = dict.fromkeys(sample.cell for sample in report.proxy)
    lines = [_passed_line(report, cell) for cell in cells if _values(report, cell, DIRECT)]
    if lines:
        header = ["", "unit", DIRECT, PROXY, "proxy / direct", "bar met"]
        found.append(("nbdsrv proxy before qemu-nbd", header, lines))
    lines = [
        _teed_line(report, cell, kind)
        for cell in cells
        for kind in KINDS
        if _values(report, cell, kind)
    ]
    if lines:
        header = ["", "MB/s", f"to {HEALTHY}", "bar met"]
        found.append(("A client of nbdsrv proxy with two tees", header, lines))
    return found


def _passed_line(report: Report, cell: str) -> list[str]:
    direct, passed = (median(_values(report, cell, kind)) for kind in (DIRECT, PROXY))
    ratio = passed / direct
    latency = cell.endswith("latency")
    met = ratio <= MOST_LATENCY if latency else ratio >= LEAST_RATE
    bar = f"{MOST_LATENCY:g} at most" if latency else f"{LEAST_RATE:g}"
    if cell.startswith("4 KiB") and not latency:
        met, bar = True, "none"
    unit = "us" if latency else "IOPS" if cell.startswith("4 KiB") else "MB/s"
    shown = f"{ratio:.2f} ({_spread(report, cell, PROXY, DIRECT)}), bar {bar}"
    return [cell, unit, f"{direct:,.0f}", f"{passed:,.0f}", shown, _verdict(met)]


def _teed_line(report: Report, cell: str, kind: str) -> list[str]:
    rate = median(_values(report, cell, kind))
    name = f"{cell}: {kind}"
    healthy = _values(report, cell, HEALTHY)
    if kind == HEALTHY or not healthy:
        return [name, f"{rate:,.0f}", "-", "-"]
    ratio = rate / median(healthy)
    shown = f"{ratio:.2f} ({_spread(report, cell, kind, HEALTHY)}), bar {FELT:g}"
    return [name, f"{rate:,.0f}", shown, _verdict(ratio >= FELT)]


def _verdict(met: bool) -> str:  # noqa: FBT001
    return "yes" if met else "NO"


def _spread(report: Report, cell: str, kind: str, to: str) -> str:
    """The lowest and the highest quotient of a single round."""
    by: dict[int, dict[str, float]] = {}
    for sample in report.proxy:
        if sample.cell == cell:
            by.setdefault(sample.round, {})[sample.kind] = sample.value
    quotients = [each[kind] / each[to] for each in by.values() if kind in each and to in each]
    return f"{min(quotients):.2f}-{max(quotients):.2f}" if quotients else "-"


def _values(report: Report, cell: str, kind: str) -> list[float]:
    return [s.value for s in report.proxy if (s.cell, s.kind) == (cell, kind)]
