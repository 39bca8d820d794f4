"""Does a cold file stall another connection? Two clients of one server.

::

    client B   4 KiB random reads, depth 1, of a cached export      <- its latency is the result
    client A   nothing | reads a cached file | reads a cold one | reads one on a slow disk

A's file is evicted again and again while A reads, and what the server's process fetched from
storage is shown beside A's rate: it proves that A's reads were cold. The two processors are
shared by server, A and B, so B is slower whenever A does anything; *A cached* is therefore the
line to compare *A cold* with, not *alone*. On the slow disk (see ``slowdisk``) one blocking
read on an event loop, or one wait for a thread that A keeps, is a stall of up to its delay.
nbdkit, which has threads, serves a directory for comparison; qemu-nbd serves one image only.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from conformance.benchmark import image, slowdisk
from conformance.benchmark.cells import Peer, Transport
from conformance.benchmark.load import FioResult, start_fio
from conformance.benchmark.report import BenchmarkError, ColdSample, Report
from conformance.benchmark.rounds import Progress
from conformance.benchmark.servers import Server, serve

__all__ = ["run_cold"]

PEERS = (Peer.OURS, Peer.NBDKIT)
NEAR, FAR, SLOW = "near", "far", "slow"
HEAD_START_S = 0.5
"""A runs that long before and after B, so that all of B's time is beside A."""
EVICT_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class Phase:
    """What client A does meanwhile; ``export`` None is nothing."""

    title: str
    export: str | None
    rw: str = "randread"
    block: str = "64k"
    depth: int = 16
    cold: bool = True


PHASES = (
    Phase("nothing (B alone)", None),
    Phase("64 KiB random, cached", FAR, cold=False),
    Phase("64 KiB random, cold", FAR),
    Phase("2 MiB sequential, cold", FAR, "read", "2m", 4),
    Phase(f"64 KiB random, cold, {slowdisk.DELAY_MS} ms disk", SLOW),
    Phase(f"256 KiB sequential, cold, {slowdisk.DELAY_MS} ms disk", SLOW, "read", "256k", 8),
)


def run_cold(
    peers: Sequence[Peer],
    near: str,
    far: str,
    cache: str,
    report: Report,
    progress: Progress,
    *,
    rounds: int,
    seconds: float,
) -> None:
    """Measure all phases against each server that serves several files, round by round."""
    exports = {NEAR: near, FAR: far}
    with contextlib.ExitStack() as stack:
        why = slowdisk.unavailable()
        if why is None:
            try:
                exports[SLOW] = stack.enter_context(slowdisk.mounted(cache))
            except BenchmarkError as error:
                why = str(error)
        if why is not None:
            report.notes.append(f"cold reads from a slow disk left out: {why}")
        for turn in range(rounds):
            for peer in PEERS:
                if peer in peers:
                    _measure(peer, exports, turn, report, progress, seconds)


def _measure(
    peer: Peer,
    exports: Mapping[str, str],
    turn: int,
    report: Report,
    progress: Progress,
    seconds: float,
) -> None:
    try:
        with serve(peer, Transport.UNIX, exports) as server:
            for phase in PHASES:
                if phase.export is None or phase.export in exports:
                    sample = _beside(server, phase, exports, turn, seconds)
                    report.cold.append(sample)
                    progress(f"round {turn + 1} {peer} beside {phase.title}: {sample}")
    except BenchmarkError as error:
        report.failures.append(f"{peer}, beside cold reads, round {turn + 1}: {error}")


def _beside(
    server: Server, phase: Phase, exports: Mapping[str, str], turn: int, seconds: float
) -> ColdSample:
    near = exports[NEAR]
    image.warm(near)
    if phase.export is None:
        return _as_sample(server, phase, turn, _near(server, near, seconds), 0.0, 0.0)
    path = exports[phase.export]
    if not phase.cold:
        image.warm(path)
    with _evicting(path) if phase.cold else contextlib.nullcontext():
        started, fetched = time.monotonic(), server.storage_bytes()
        with start_fio(
            server,
            phase.export,
            phase.rw,
            phase.block,
            phase.depth,
            seconds=seconds + 2 * HEAD_START_S,
            size=os.path.getsize(path),
        ) as far:
            time.sleep(HEAD_START_S)
            result = _near(server, near, seconds)
            neighbour = far.result().rate
        elapsed = time.monotonic() - started
        disk = (server.storage_bytes() - fetched) / elapsed / 1e6
    return _as_sample(server, phase, turn, result, neighbour, disk)


def _near(server: Server, path: str, seconds: float) -> FioResult:
    """Client B."""
    size = os.path.getsize(path)
    with start_fio(server, NEAR, "randread", "4k", 1, seconds=seconds, size=size) as fio:
        return fio.result()


@contextlib.contextmanager
def _evicting(path: str) -> Iterator[None]:
    """Keep a file out of the page cache, as far as its readers allow."""
    done = threading.Event()

    def evict() -> None:
        while not done.wait(EVICT_EVERY_S):
            image.evict(path)

    image.evict(path)
    thread = threading.Thread(target=evict)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _as_sample(
    server: Server, phase: Phase, turn: int, result: FioResult, neighbour: float, disk: float
) -> ColdSample:
    return ColdSample(
        server=server.peer,
        phase=phase.title,
        round=turn + 1,
        iops=result.iops,
        p50_us=result.p50_us,
        p99_us=result.p99_us,
        p999_us=result.p999_us,
        max_us=result.max_us,
        neighbour_rate=neighbour,
        disk_rate=disk,
    )
