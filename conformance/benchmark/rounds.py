"""The interleaving: rounds, then cells, then servers in rotating order.

::

    round 1   start nbdsrv nbdkit qemu-nbd        (all idle but the one measured)
                cell 1:  nbdsrv   nbdkit   qemu-nbd
                cell 2:  nbdsrv   nbdkit   qemu-nbd  ...
              stop all
    round 2   start all afresh
                cell 1:  nbdkit   qemu-nbd nbdsrv    ...

The three runs of a cell in a round lie seconds apart, so a noisy minute hits all three; the
order rotates, so that none is always first; and every round has fresh processes, so that one
process's luck (memory layout, thread placement) does not decide a column. For the cells that
write, servers run one at a time, on the same copy of the image (qemu-nbd locks it), which is
synced after each.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from conformance.benchmark import image
from conformance.benchmark.cells import Cell, Peer
from conformance.benchmark.formats import FormatImage
from conformance.benchmark.load import measure
from conformance.benchmark.report import BenchmarkError, Report, Sample
from conformance.benchmark.servers import Server, serve

__all__ = ["Plan", "Progress", "run_rounds"]

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run: the servers and cells, the images, how often and how long.

    ``copy`` is written to; None when no cell writes. ``images`` are those of the cells that have
    one of their own.
    """

    peers: Sequence[Peer]
    cells: Sequence[Cell]
    path: str
    copy: str | None
    size: int
    rounds: int
    seconds: float
    images: Mapping[str, FormatImage]

    def file(self, cell: Cell, peer: Peer) -> FormatImage:
        """What ``peer`` serves for this cell; the ceiling knows no formats, only the content."""
        if cell.image and peer is not Peer.CEILING:
            return self.images[cell.image]
        return FormatImage(self.copy if cell.writes and self.copy else self.path, "raw", self.size)

    def order(self, turn: int) -> list[Peer]:
        """The servers, a different one first each turn."""
        first = turn % len(self.peers)
        return [*self.peers[first:], *self.peers[:first]]


def run_rounds(plan: Plan, report: Report, progress: Progress) -> None:
    """Run all rounds, adding samples; a cell that fails is noted and the run goes on."""
    for turn in range(plan.rounds):
        kinds = groupby(plan.cells, key=lambda c: (c.image, c.transport, c.writes))
        for (_, _, writes), group in kinds:
            cells = list(group)
            if writes:
                _write_group(plan, cells, turn, report, progress)
            else:
                _read_group(plan, cells, turn, report, progress)


def _read_group(
    plan: Plan, cells: list[Cell], turn: int, report: Report, progress: Progress
) -> None:
    with contextlib.ExitStack() as stack:
        running: dict[Peer, Server] = {}
        for peer in plan.peers:
            if not cells[0].takes(peer):
                continue
            file = plan.file(cells[0], peer)
            with _noting(report, f"{peer}, {cells[0].name}, round {turn + 1}"):
                context = serve(peer, cells[0].transport, {"": file.path}, form=file.form)
                running[peer] = stack.enter_context(context)
        for cell in cells:
            for peer in plan.order(turn):
                if peer in running:
                    others = [s for p, s in running.items() if p is not peer]
                    _sample(plan, cell, running[peer], others, turn, report, progress)


def _write_group(
    plan: Plan, cells: list[Cell], turn: int, report: Report, progress: Progress
) -> None:
    assert plan.copy is not None
    for cell in cells:
        for peer in plan.order(turn):
            with (
                _noting(report, f"{peer}, {cell.name}, round {turn + 1}"),
                serve(peer, cell.transport, {"": plan.copy}, write=True) as server,
            ):
                _sample(plan, cell, server, [], turn, report, progress)
            image.settle(plan.copy)


def _sample(
    plan: Plan,
    cell: Cell,
    server: Server,
    others: list[Server],
    turn: int,
    report: Report,
    progress: Progress,
) -> None:
    with _noting(report, f"{server.peer}, {cell.name}, round {turn + 1}"):
        # Every time: some kernels (DAMON) reclaim what lay unused for seconds.
        file = plan.file(cell, server.peer)
        (image.evict if cell.cold else image.warm)(file.path)
        start, used = time.monotonic(), server.cpu_seconds()
        waste = sum(other.cpu_seconds() for other in others)
        rate, detail = measure(server, cell, file.size, seconds=plan.seconds)
        elapsed = time.monotonic() - start
        sample = Sample(
            cell=cell.name,
            server=server.peer,
            round=turn + 1,
            rate=rate,
            server_cores=(server.cpu_seconds() - used) / elapsed,
            idle_cores=(sum(other.cpu_seconds() for other in others) - waste) / elapsed,
            p50_us=detail.p50_us if detail else None,
            p99_us=detail.p99_us if detail else None,
        )
        report.samples.append(sample)
        progress(f"round {turn + 1} {cell.name} {server.peer}: {rate:,.0f} {cell.unit}")


@contextlib.contextmanager
def _noting(report: Report, where: str) -> Iterator[None]:
    try:
        yield
    except BenchmarkError as error:
        report.failures.append(f"{where}: {error}")
