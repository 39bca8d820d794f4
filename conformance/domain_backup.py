"""Backups of a domain by our ``libvirt:`` source, step by step, and what they must have made.

::

    Backup ── a process: domain_copy ── frozen | go | read | succeed ── killed wherever one likes
    exact  ── writes before and during ── the point is the model at the moment of the freeze
"""

import contextlib
import json
import os
import queue
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from conformance.context import Context
from conformance.image import KIB, MIB, file_digest
from conformance.libvirtd import Domain, Libvirtd, bindings_directory
from conformance.outcome import CheckFailedError
from conformance.process import kill_group, tail
from conformance.registry import expect, expect_in
from conformance.server import server_environment

__all__ = [
    "ANSWER_S",
    "GRAIN",
    "Backup",
    "change",
    "digests",
    "exact",
    "latest",
    "make_domain",
    "nothing_left",
]

GRAIN = 64 * KIB
"""Of QEMU's bitmaps."""
SIZE = 32 * MIB
ANSWER_S = 60.0


class Backup:
    """One run of our reader: frozen when it is made."""

    def __init__(
        self,
        domain: Domain,
        home: Path,
        *,
        expecting: str = "",
        killed_after_s: float = 0,
        parameters: str = "",
        only: str = "",
    ) -> None:
        """Freeze.

        Args:
            domain: it.
            home: where its points are.
            expecting: a word of the error that is to come; nothing is frozen then.
            killed_after_s: SIGKILL comes so many seconds from now, whatever it is doing then.
            only: name of the one disk to be backed up.
            parameters: more for the address, each with its ``&``.
        """
        context = domain.libvirtd.context
        environment = {**os.environ, **server_environment()}
        bindings = bindings_directory(context)
        if bindings is not None:
            environment["PYTHONPATH"] += f"{os.pathsep}{bindings}"
        location = f"{domain.libvirtd.uri}&scratch={context.directory}{parameters}"
        self.home = home
        self.process = subprocess.Popen(
            (*_reader(), location, f"{domain.name}{only and '/'}{only}", home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        context.at_end(self.kill)
        if killed_after_s:
            threading.Timer(killed_after_s, self.process.kill).start()
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        if expecting:
            error = self._end(1)
            expect_in(expecting, error, "what is said")
            return
        told = self.hear()
        self.disks: dict[str, dict[str, str]] = told["frozen"]
        self.consistency: str = told["consistency"]

    def modes(self) -> dict[str, str]:
        """By disk, ``full`` or ``incremental``."""
        return {name: facts["mode"] for name, facts in self.disks.items()}

    def read(self) -> dict[str, int]:
        """Read; the bytes by disk."""
        self.tell("go")
        found: dict[str, int] = self.hear("read")
        return found

    def succeed(self) -> None:
        """Commit and confirm."""
        self.tell("succeed")
        self.hear("committed")
        self.hear("done")
        self._end(0)

    def leave(self) -> None:
        """Give it up."""
        self.tell("leave")
        self.hear("done")
        self._end(0)

    def tell(self, word: str) -> None:
        """The next word."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{word}\n".encode())
            self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL."""
        kill_group(self.process)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self.process.stdout:
                self._lines.put(line)
        self._lines.put(b"")

    def hear(self, key: str = "") -> Any:
        """What it says next, or what it says under this key."""
        try:
            line = self._lines.get(timeout=ANSWER_S)
        except queue.Empty:
            line = b""
        if not line:
            kill_group(self.process)
            assert self.process.stderr is not None
            said = tail(self.process.stderr.read().decode(errors="replace"))
            raise CheckFailedError(f"the reader ended before it said {key!r}: {said}")
        said = json.loads(line)
        return said[key] if key else said

    def _end(self, code: int) -> str:
        assert self.process.stderr is not None
        error = self.process.stderr.read().decode(errors="replace")
        expect(code, self.process.wait(ANSWER_S), f"exit code of the reader ({tail(error)})")
        if "Traceback" in error:
            raise CheckFailedError(f"a traceback: {tail(error)}")
        return error


def _reader() -> tuple[str, ...]:
    return (sys.executable, "-m", "conformance.domain_copy")


def make_domain(context: Context, pki: Path | None = None) -> Domain:
    """A running domain with two disks that can be tracked and one that cannot, all empty."""
    disks = {"vda": (SIZE, "qcow2"), "vdb": (8 * MIB, "qcow2"), "vdc": (2 * MIB, "raw")}
    return Domain(Libvirtd(context, pki), "web", disks)


def change(domain: Domain, source: random.Random, pieces: int = 4) -> int:
    """Write to all disks; bytes of vda that a bitmap must call changed at most."""
    grains: set[int] = set()
    for name, disk in domain.disks.items():
        for _ in range(pieces):
            length = 512 * source.randrange(1, 256)
            offset = 512 * source.randrange((len(disk.content) - length) // 512)
            if source.random() < 0.25:
                domain.zero(name, offset, length)
            else:
                domain.write(name, offset, length, source.randrange(1, 256))
            if name == "vda":
                grains.update(range(offset // GRAIN, (offset + length - 1) // GRAIN + 1))
    return len(grains) * GRAIN


def digests(domain: Domain) -> dict[str, str]:
    """SHA-256 of what the disks must be now."""
    return {name: disk.digest() for name, disk in domain.disks.items()}


def latest(domain: Domain, home: Path) -> dict[str, str]:
    """SHA-256 of the disks in the latest point."""
    return {name: file_digest(home / f"{name}.latest") for name in domain.disks}


def exact(domain: Domain, home: Path, source: random.Random, mode: str, limit: int = SIZE) -> str:
    """One backup with writes before and during; its point must be of the moment of the freeze.

    Returns:
        The name of the checkpoint.
    """
    backup = Backup(domain, home)
    expect({"vda": mode, "vdb": mode, "vdc": "full"}, backup.modes(), f"modes {backup.disks}")
    then = digests(domain)
    change(domain, source)
    done = backup.read()
    change(domain, source, 1)
    backup.succeed()
    expect(then, latest(domain, home), "SHA-256 at the moment of the freeze")
    if done["vda"] > limit:
        raise CheckFailedError(f"{done['vda']} bytes of vda were read for {limit} that changed")
    nothing_left(domain)
    return backup.disks["vda"]["checkpoint"]


def nothing_left(domain: Domain, notes: int = 0) -> None:
    """Backups have left no job, and so many directories."""
    expect(False, domain.has_job(), "a backup job is left")
    left = list(domain.libvirtd.context.directory.glob("nbdsrv-libvirt-*"))
    expect(notes, len(left), "directories left")
