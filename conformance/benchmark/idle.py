"""What connections cost that do nothing, and ones that never read their replies.

::

    alone            4 KiB reads, depth 1, by fio            RSS, IOPS
    1000 idle        the same beside 1 000 attached clients  RSS, IOPS
    closed again     the same after they left                RSS, IOPS, descriptors
    (a fresh server)
    1 not reading    a client has sent reads until the server took no more, and reads nothing
    16 not reading   sixteen of them

RSS counts the interpreter too. A server is asked for what its documentation says it can do:
it is told the number of connections where it has a limit. A peer that cannot take them is a
note, not a failure.
"""

import contextlib
import resource
from collections.abc import Sequence
from statistics import median

from conformance.benchmark import image
from conformance.benchmark.cells import Peer, Transport
from conformance.benchmark.client import attach, pour_reads
from conformance.benchmark.load import start_fio
from conformance.benchmark.report import BenchmarkError, IdleSample, Report
from conformance.benchmark.rounds import Progress
from conformance.benchmark.servers import Server, serve

__all__ = ["run_idle"]

SPARE = 64
"""Connections and descriptors beyond the idle ones: fio, the harness itself."""
UNREAD = (1, 16)


def run_idle(
    peers: Sequence[Peer],
    path: str,
    report: Report,
    progress: Progress,
    *,
    size: int,
    rounds: int,
    seconds: float,
    connections: int,
) -> None:
    """Measure each server in turn; a failure of ours is one of the run's."""
    _allow_descriptors(connections + SPARE)
    image.warm(path)
    for peer in peers:
        try:
            with _serve(peer, path, connections) as server:
                _idle(server, report, progress, size, rounds, seconds, connections)
            with _serve(peer, path, connections) as server:
                _unread(server, report, progress, size, rounds, seconds)
        except BenchmarkError as error:
            where = report.failures if peer is Peer.OURS else report.notes
            where.append(f"idle connections, {peer}: {error}")


def _serve(peer: Peer, path: str, connections: int) -> contextlib.AbstractContextManager[Server]:
    return serve(peer, Transport.UNIX, {"": path}, connections=connections + SPARE)


def _idle(
    server: Server,
    report: Report,
    progress: Progress,
    size: int,
    rounds: int,
    seconds: float,
    connections: int,
) -> None:
    def note(state: str, count: int) -> None:
        report.idle.append(_look(server, state, count, 0, size, rounds, seconds))
        progress(f"{server.peer} {state}: {report.idle[-1]}")

    note("alone", 0)
    with contextlib.ExitStack() as stack:
        for _ in range(connections):
            stack.enter_context(attach(server))
        note(f"{connections} idle", connections)
    note("closed again", 0)


def _unread(
    server: Server, report: Report, progress: Progress, size: int, rounds: int, seconds: float
) -> None:
    with contextlib.ExitStack() as stack:
        taken = attached = 0
        for count in UNREAD:
            for _ in range(count - attached):
                taken += pour_reads(stack.enter_context(attach(server)), size)
            attached = count
            state = f"{count} not reading"
            report.idle.append(_look(server, state, count, taken, size, rounds, seconds))
            progress(f"{server.peer} {state}: {report.idle[-1]}")


def _look(
    server: Server, state: str, count: int, taken: int, size: int, rounds: int, seconds: float
) -> IdleSample:
    """Another client's speed (the median of ``rounds`` runs) and then the memory."""
    speeds = []
    for _ in range(rounds):
        with start_fio(server, "", "randread", "4k", 1, seconds=seconds, size=size) as fio:
            speeds.append(fio.result().iops)
    return IdleSample(
        server=server.peer,
        state=state,
        connections=count,
        resident=server.status("VmRSS"),
        peak=server.status("VmHWM"),
        descriptors=server.descriptors(),
        threads=server.status("Threads"),
        iops=median(speeds),
        accepted=taken,
    )


def _allow_descriptors(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise BenchmarkError(f"{needed} descriptors needed, the limit is {hard} (ulimit -Hn)")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
