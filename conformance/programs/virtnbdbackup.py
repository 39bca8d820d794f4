"""Directories the real virtnbdbackup wrote, served to everybody's clients.

::

    disk.qcow2 ─ write ─ backup full ─ write, zero ─ backup inc ─> directory ── serve ──> nbdcopy
                    │                        │                          └── virtnbdrestore
              qemu-img convert         qemu-img convert                            the same bytes
"""

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from conformance.benchmark.repository import virtnbd_driver
from conformance.context import Context
from conformance.image import MIB, file_digest
from conformance.outcome import MissingPeerError
from conformance.registry import Part, check, expect, expect_in
from conformance.repository import Repository

PYTHON = "/usr/bin/python3"
"""The distribution's: it has virtnbdbackup's modules and libnbd's bindings."""
MODULES = "import libvirt, libvirtnbdbackup, nbd"
SIZE = 24 * MIB + 64 * 1024
CHECKPOINT = "virtnbdbackup.0"
NEEDS = ("virtnbdbackup", "qemu-img", "qemu-io", "qemu-nbd", "nbdcopy", "nbdinfo")
BOTH = (("plain", ""), ("lz4", "1"))


class Written:
    """Two directories, and what the disk was at each point.

    Attributes:
        directory: above both.
        digests: of the disk: at the full backup, at the increment.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.directory = context.directory / "backups"
        self._image = context.directory / "disk.qcow2"
        tried = context.run(PYTHON, "-c", MODULES, code=None)
        if tried.code:
            raise MissingPeerError(f"virtnbdbackup's modules: {tried.stderr.strip()[-200:]}")
        source = random.Random(6)
        raw = context.directory / "disk.raw"
        with raw.open("wb") as file:
            file.truncate(SIZE)
            for at in range(0, SIZE, MIB):
                file.seek(at)
                file.write(source.choice((b"", source.randbytes(700_000), b"text " * 150_000)))
            file.truncate(SIZE)
        context.run("qemu-img", "convert", "-O", "qcow2", raw, self._image)
        self.digests = [self._digest()]
        self._backup("full")
        context.run("qemu-img", "bitmap", "--add", self._image, CHECKPOINT)
        for command in ("write -P 7 5M 300k", "write -z 9M 2M", "write -P 9 23M 64k"):
            context.run("qemu-io", "-c", command, self._image)
        self.digests.append(self._digest())
        self._backup("inc")

    def _digest(self) -> str:
        raw = self._context.directory / "state.raw"
        self._context.run("qemu-img", "convert", "-O", "raw", self._image, raw)
        return file_digest(raw)

    def _backup(self, level: str) -> None:
        for name, compress in BOTH:
            target = self.directory / name
            target.mkdir(parents=True, exist_ok=True)
            words = ["backup", str(self._image), str(target), level, CHECKPOINT]
            self.drive(words, {"COMPRESS": compress})

    def drive(self, words: Sequence[str], environment: dict[str, str]) -> None:
        """Call virtnbdbackup's own functions."""
        # Its programs are scripts of the distribution's Python, whatever else is first on PATH.
        path = f"/usr/bin:{os.environ['PATH']}"
        self._context.run(
            PYTHON,
            virtnbd_driver.__file__,
            *words,
            environment={**environment, "PATH": path},
            timeout_s=120,
        )


@check("virtnbdbackup", "full and increment", needs=NEEDS, part=Part.REPOSITORY)
def points(context: Context) -> None:
    """Listed by name, bit for bit by nbdcopy, holes by nbdinfo; plain and lz4."""
    written = Written(context)
    repository = Repository(context, f"virtnbdbackup:{written.directory}")
    server = repository.serve()
    listed = context.run("nbdinfo", "--list", server.uri()).stdout
    for name, _ in BOTH:
        ids = (CHECKPOINT, f"{CHECKPOINT}+offline")
        for id_, digest in zip(ids, written.digests, strict=True):
            export = f"{name}/vda@{id_}"
            expect_in(export, listed, "what nbdinfo lists")
            uri = server.uri(export)
            context.run("nbdcopy", uri, "out.raw")
            expect(digest, file_digest(context.directory / "out.raw"), f"sha256 of {export}")
            expect_in("hole", context.run("nbdinfo", "--map", uri).stdout, "the map")
    for level in ("structure", "packs", "chunks"):
        repository.run("verify", repository.target, "--level", level)


@check("virtnbdbackup", "as virtnbdrestore", needs=(*NEEDS, "virtnbdrestore"), part=Part.REPOSITORY)
def restored(context: Context) -> None:
    """What its own restore makes of the files is what is served."""
    written = Written(context)
    server = Repository(context, f"virtnbdbackup:{written.directory}").serve()
    for name, _ in BOTH:
        target = context.directory / f"restored-{name}"
        target.mkdir()
        files = ["vda.full.data", f"vda.inc.{CHECKPOINT}.data"]
        written.drive(["restore", str(written.directory / name), str(target), *files], {})
        uri = server.uri(f"{name}/vda@latest")
        context.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", target / "vda", uri)


@check("virtnbdbackup", "damage", needs=NEEDS, part=Part.REPOSITORY)
def damage(context: Context) -> None:
    """A flipped bit in lz4 is an error where it is, and verify names the file."""
    written = Written(context)
    broken = context.directory / "broken"
    shutil.copytree(written.directory / "lz4", broken)
    _flip(broken / "vda.full.data")
    repository = Repository(context, f"virtnbdbackup:{broken}")
    uri = repository.serve().uri(f"broken/vda@{CHECKPOINT}")
    expect(1, context.run("nbdcopy", uri, "null:", code=None).code, "nbdcopy's exit code")
    said = repository.run("verify", repository.target, "--level", "chunks", code=3)
    expect_in("vda.full.data", said.stdout, "what verify says")
    (broken / "vda.full.data").unlink()
    repository.refused("copy", f"{repository.target}#@latest", "raw:x", saying="damaged")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
