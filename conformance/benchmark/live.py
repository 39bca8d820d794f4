"""Backing up a disk of a running domain, beside virtnbdbackup.

::

    libvirtd ── domain (QEMU, TCG) ── pull-mode backup ─┬─ nbdsrv backup libvirt:… ─> repository
                 vda: a VM-like qcow2                   └─ virtnbdbackup --compress ─> stream file

Full backups, each of the whole command, until the file system is synced; the one and the other in
turn first, each into an empty directory. Neither leaves the checkpoint that the other minds. What
ours has stored is compared with the disk, off the clock.
"""

import os
import shutil
import time
from pathlib import Path
from statistics import median

from conformance.benchmark import image
from conformance.benchmark.report import BenchmarkError, ProxySample, Report
from conformance.benchmark.rounds import Progress
from conformance.context import Context
from conformance.libvirtd import Domain, Libvirtd, bindings_directory
from conformance.outcome import CheckFailedError, MissingPeerError
from conformance.process import find_program
from conformance.repository import command
from conformance.server import server_environment

__all__ = ["live_tables", "run_live"]

OURS, THEIRS = "nbdsrv", "virtnbdbackup"
CELL = "full backup of a running domain's disk"
NEEDED = ("libvirtd", "virsh", "virtnbdbackup", "qemu-system-x86_64", "qemu-img")
BAR = 1.0
TIMEOUT_S = 600.0
MEGA = 1e6


def run_live(mixed: str, report: Report, progress: Progress, *, rounds: int) -> None:
    """Measure it; what fails is noted."""
    try:
        for program in NEEDED:
            find_program(program)
        with Context() as context:
            lane = _Lane(context, Path(mixed))
            for turn in range(rounds):
                for kind in (OURS, THEIRS) if turn % 2 else (THEIRS, OURS):
                    rate = lane.backup(kind)
                    report.proxy.append(ProxySample(CELL, kind, turn + 1, rate))
                    progress(f"round {turn + 1} {CELL}, {kind}: {rate:,.0f} MB/s")
    except (BenchmarkError, CheckFailedError, MissingPeerError) as error:
        report.failures.append(f"{CELL}: {error}")


class _Lane:
    """A domain with one disk."""

    def __init__(self, context: Context, mixed: Path) -> None:
        self._context = context
        self._mixed = mixed
        self._size = mixed.stat().st_size
        libvirtd = Libvirtd(context)
        disks = {"vda": (self._size, "qcow2")}
        self._domain = Domain(libvirtd, "vm", disks, content=mixed)
        bindings = bindings_directory(context)
        path = [server_environment()["PYTHONPATH"], *([str(bindings)] if bindings else [])]
        self._environment = {"PYTHONPATH": os.pathsep.join(path)}
        # QEMU, who may be another user, makes virtnbdbackup's socket and scratch files in it.
        self._shared = context.directory / "shared"
        self._shared.mkdir()
        self._shared.chmod(0o777)

    def backup(self, kind: str) -> float:
        """MB/s of the disk's size."""
        target = self._context.directory / "target"
        shutil.rmtree(target, ignore_errors=True)
        image.warm(str(self._domain.disks["vda"].path))
        os.sync()
        began = time.monotonic()
        if kind == OURS:
            self._run(*command("init", f"repo:{target}", "--quiet"))
            began = time.monotonic()
            where = f"libvirt:{self._domain.libvirtd.uri}&scratch={self._context.directory}#vm/vda"
            words = ["backup", where, "--to", f"repo:{target}", "--group", "vm", "--quiet"]
            self._run(*command(*words))
        else:
            shared = self._shared
            uri = self._domain.libvirtd.uri
            words = ["virtnbdbackup", "-U", uri, "-d", "vm", "-l", "full", "--compress"]
            words += ["-o", str(target), "--scratchdir", str(shared), "-f", str(shared / "theirs")]
            self._run(*words, environment={"PATH": f"/usr/bin:{os.environ['PATH']}"})
        os.sync()
        took = time.monotonic() - began
        for checkpoint in self._domain.checkpoints():
            self._domain.libvirtd.virsh("checkpoint-delete", "vm", checkpoint)
        if kind == OURS:
            self._run(*command("compare", f"repo:{target}#vm/vda@latest", self._mixed))
        return self._size / took / MEGA

    def _run(self, *words: str, environment: dict[str, str] | None = None) -> None:
        environment = environment or self._environment
        self._context.run(*words, environment=environment, timeout_s=TIMEOUT_S)


def live_tables(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header, lines: medians and their ratio; none if nothing was measured."""
    rates = {
        kind: {s.round: s.value for s in report.proxy if (s.cell, s.kind) == (CELL, kind)}
        for kind in (OURS, THEIRS)
    }
    if not rates[OURS] or not rates[THEIRS]:
        return []
    ours, theirs = (median(rates[kind].values()) for kind in (OURS, THEIRS))
    single = [rates[OURS][n] / rates[THEIRS][n] for n in rates[OURS].keys() & rates[THEIRS].keys()]
    spread = f"{min(single):.2f}-{max(single):.2f}" if single else "-"
    ratio = f"{ours / theirs:.2f} ({spread}), bar {BAR:g}"
    header = ["", f"{OURS} MB/s", f"{THEIRS} MB/s", f"{OURS} / {THEIRS}", "bar met"]
    line = [CELL, f"{ours:,.0f}", f"{theirs:,.0f}", ratio, "yes" if ours >= BAR * theirs else "NO"]
    return [("Live backups (libvirt, with compression)", header, [line])]
