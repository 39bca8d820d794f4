"""``nbdsrv copy`` beside ``qemu-img convert``: the same source, a new file each time.

Sources have mixed content (see ``formats``) and are warm. The time is from the start of the program
until its target is on the disk: ours syncs it by itself, qemu-img leaves that to the kernel and is
followed by a sync. The rate is the size of the disk by that time.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from conformance.benchmark import image
from conformance.benchmark.cells import Cell, Peer
from conformance.benchmark.formats import convert_command, make_images, mixed
from conformance.benchmark.report import BenchmarkError, Report, Sample
from conformance.benchmark.servers import ROOT

__all__ = ["run_conversions"]

TIMEOUT_S = 600
MEGA = 1e6

_OURS: dict[str, tuple[str, ...]] = {
    "raw": ("--to", "raw"),
    "qcow2-zlib": ("--to", "qcow2", "--compress", "zlib"),
    "qcow2-zstd": ("--to", "qcow2", "--compress", "zstd"),
}


def run_conversions(
    cells: Sequence[Cell],
    peers: Sequence[Peer],
    directory: str,
    size: int,
    rounds: int,
    report: Report,
    progress: Callable[[str], None],
) -> None:
    """Each conversion by both programs, one right after the other, in turn first."""
    raw = mixed(directory, size)
    qcow2 = make_images(["qcow2"], raw, directory)["qcow2"].path
    both = [peer for peer in peers if peer in {Peer.OURS, Peer.QEMU}]
    for turn in range(rounds):
        for cell in cells:
            first = turn % max(len(both), 1)
            for peer in [*both[first:], *both[:first]]:
                kind, _, target = cell.image.partition(" to ")
                source = raw if kind == "raw" else qcow2
                try:
                    rate = size / _timed(peer, source, kind, target, directory) / MEGA
                except BenchmarkError as error:
                    report.failures.append(f"{peer}, {cell.name}, round {turn + 1}: {error}")
                    continue
                report.samples.append(Sample(cell.name, peer, turn + 1, rate, 0.0, 0.0))
                progress(f"round {turn + 1} {cell.name} {peer}: {rate:,.0f} MB/s")


def _timed(peer: Peer, source: str, kind: str, target_kind: str, directory: str) -> float:
    image.warm(source)
    with tempfile.TemporaryDirectory(prefix="convert-", dir=directory) as scratch:
        target = os.path.join(scratch, "target")
        if peer is Peer.OURS:
            options = _OURS[target_kind]
            command = [sys.executable, "-m", "nbdsrv", "copy", "--quiet", *options, source, target]
        else:
            command = convert_command(target_kind, source, kind, target)
        start = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BenchmarkError(f"{command[0]}: {error}") from error
        if done.returncode:
            raise BenchmarkError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
        image.settle(target)
        return time.monotonic() - start
