"""Xen Orchestra's own backup code over repositories that nbdsrv has written.

::

    nbdsrv backup --to xo:/path ──> repository ── listVmBackups, readIncrementalVmBackup ──> SHA-256
                        ▲               └──────── deleteDeltaVmBackups, cleanVm: merged, no warning
                        └──── and on, upon what Xen Orchestra has merged

@xen-orchestra/backups, backup-archive, fs and vhd-lib are what xo-server runs. They are installed
once, by ``npm ci`` from the committed lock file, below ``$XDG_CACHE_HOME/nbdsrv``.
"""

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

from conformance import process
from conformance.context import Context
from conformance.download import cached
from conformance.image import MIB
from conformance.outcome import CheckFailedError
from conformance.process import PROJECT
from conformance.registry import Part, check, expect, expect_in
from conformance.repository import Repository

NEEDS = ("node", "npm")
SOURCES = PROJECT / "conformance" / "xo_backups"
NPM_TIMEOUT_S = 300.0
KEY = "0123456789abcdef0123456789abcdef"
SIZES = {"root": 20 * MIB, "odd": 9 * MIB + 512}


def _modules() -> Path:
    """The node_modules directory for the committed lock file, installed at first use."""

    def install(home: Path) -> None:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCES / name, home / name)
        shutil.copytree(SOURCES / "absent", home / "absent")
        words = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--legacy-peer-deps")
        process.run(words, directory=home, timeout_s=NPM_TIMEOUT_S)

    lock = (SOURCES / "package-lock.json").read_bytes()
    name = f"xo-backups-{hashlib.sha256(lock).hexdigest()[:16]}"
    return cached(name, install) / "node_modules"


class _Remote:
    """A remote, two disks, and what they were at each backup."""

    def __init__(self, context: Context, layout: str, *, key: str = "") -> None:
        self.context = context
        self.path = context.directory / "remote"
        self.path.mkdir()
        self.layout = layout
        self.key = key
        self.known: list[dict[str, str]] = []
        variables = {"NBDSRV_PASSPHRASE": key} if key else {}
        self.commands = Repository(context, f"xo:{self.path}", variables)
        self._dice = random.Random(6)
        self._disks = {name: context.directory / f"{name}.raw" for name in SIZES}
        for name, path in self._disks.items():
            content = bytearray(SIZES[name])
            content[: 3 * MIB] = self._dice.randbytes(3 * MIB)
            content[-700:] = self._dice.randbytes(700)
            path.write_bytes(content)

    def backup(self, *options: str) -> list[dict[str, Any]]:
        """Change the disks, but for the first time, and back them up."""
        for path in self._disks.values() if self.known else ():
            with path.open("r+b") as file:
                file.seek(MIB * self._dice.randrange(8))
                file.write(self._dice.randbytes(5000))
                file.seek(0)
                file.write(bytes(2 * MIB))
        words = ["backup", *map(str, self._disks.values()), "--to", f"xo:{self.path}"]
        finished = self.commands.run(*words, "--group", "web", "--json", "--quiet", *options)
        self.known.append(
            {
                name: hashlib.sha256(path.read_bytes()).hexdigest()
                for name, path in self._disks.items()
            }
        )
        rows: list[dict[str, Any]] = json.loads(finished.stdout)
        return rows

    def words(self, action: str, **more: Any) -> list[str | Path]:
        job = {"path": str(self.path), "action": action, **more}
        job["useVhdDirectory"] = self.layout != "vhd"
        if self.key:
            job["encryptionKey"] = self.key
        return ["node", SOURCES / "check.mjs", _modules(), json.dumps(job)]

    def drive(self, action: str, **more: Any) -> dict[str, Any]:
        """What Xen Orchestra finds; any warning fails the check."""
        finished = self.context.run(*self.words(action, **more), timeout_s=120, code=None)
        if finished.code != 0:
            raise CheckFailedError(process.tail(finished.stderr, lines=8))
        result: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
        expect([], result["warnings"], "warnings of cleanVm")
        return result

    def expect(self, result: dict[str, Any], first: int = 0) -> None:
        """All backups from ``first`` on, each disk bit for bit."""
        found = [
            {disk["name"]: disk["digest"] for disk in row["disks"]} for row in result["backups"]
        ]
        expect(self.known[first:], found, "SHA-256 of every disk of every backup")
        expect(["web"] * len(found), [row["vm"] for row in result["backups"]], "VMs")


def _read(context: Context, layout: str, packing: str = "", *, algorithm: str = "") -> None:
    remote = _Remote(context, layout, key=KEY if algorithm else "")
    if algorithm:
        # Synced once by Xen Orchestra, which then has chosen the cipher and left its key check.
        note = remote.path / "encryption.json"
        note.write_text(json.dumps({"algorithm": algorithm}))
        remote.drive("read")
        expect(algorithm, json.loads(note.read_text())["algorithm"], "cipher")
    options = ["--layout", layout, *(["--packing", packing] if packing else [])]
    for number in range(3):
        modes = [row["mode"] for row in remote.backup(*options)]
        expect(["scan" if number else "full"] * 2, modes, "modes")
    remote.expect(remote.drive("read"))


@check("xo-backups", "brotli", needs=NEEDS, part=Part.REPOSITORY)
def brotli(context: Context) -> None:
    """A full and two deltas as Xen Orchestra itself stores them: listed, read, no warning."""
    _read(context, "vhd-directory", "brotli")


@check("xo-backups", "gzip", needs=NEEDS, part=Part.REPOSITORY)
def gzip(context: Context) -> None:
    """The same, packed by gzip."""
    _read(context, "vhd-directory", "gzip")


@check("xo-backups", "not packed", needs=NEEDS, part=Part.REPOSITORY)
def unpacked(context: Context) -> None:
    """The same, as it is."""
    _read(context, "vhd-directory", "none")


@check("xo-backups", "plain VHD", needs=NEEDS, part=Part.REPOSITORY)
def plain(context: Context) -> None:
    """One file a disk."""
    _read(context, "vhd")


@check("xo-backups", "chacha20-poly1305", needs=NEEDS, part=Part.REPOSITORY)
def chacha(context: Context) -> None:
    """An encrypted remote that Xen Orchestra has set up."""
    _read(context, "vhd-directory", algorithm="chacha20-poly1305")


@check("xo-backups", "restore stream", needs=(*NEEDS, "qemu-img"), part=Part.REPOSITORY)
def stream(context: Context) -> None:
    """What it would send to XAPI at a restore, compared by qemu-img."""
    remote = _Remote(context, "vhd-directory")
    for _ in range(2):
        remote.backup()
    streams = context.directory / "streams"
    streams.mkdir()
    remote.expect(remote.drive("read", streams=str(streams)))
    for name in SIZES:
        vhd = max(streams.glob(f"*-{name}.vhd"))
        options = f"driver=vpc,force_size_calc=current_size,file.filename={vhd}"
        raw = f"driver=raw,file.filename={context.directory / name}.raw"
        context.run("qemu-img", "compare", "--image-opts", options, raw)


@check("xo-backups", "merges", needs=NEEDS, part=Part.REPOSITORY)
def merges(context: Context) -> None:
    """It deletes our oldest points and merges; what is left is right, and we go on upon it."""
    for layout in ("vhd-directory", "vhd"):
        remote = _Remote(context, layout)
        for _ in range(4):
            remote.backup("--layout", layout)
        result = remote.drive("merge", count=2)
        expect(True, result["merged"], "did it merge?")
        remote.expect(result, first=2)
        modes = [row["mode"] for row in remote.backup()]
        expect(["scan"] * 2, modes, "modes upon what was merged")
        remote.expect(remote.drive("read"), first=2)
        shutil.rmtree(remote.path)


@check("xo-backups", "lock", needs=NEEDS, part=Part.REPOSITORY)
def lock(context: Context) -> None:
    """While one of its jobs has the VM, we refuse."""
    remote = _Remote(context, "vhd-directory")
    remote.backup()
    with subprocess.Popen(
        list(map(str, remote.words("hold"))), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        try:
            expect_in("held", holder.stdout.readline().decode(), "what the holder says")
            remote.commands.refused(
                "backup",
                context.directory / "root.raw",
                "--to",
                f"xo:{remote.path}",
                "--group",
                "web",
                "--quiet",
                saying="a job of Xen Orchestra",
            )
        finally:
            holder.stdin.close()
            holder.wait(30)
    remote.backup()
    remote.expect(remote.drive("read"))
