"""Proxmox Backup Server's datastores: **no genuine tool** was there to make them.

::

    disk ── an encoder written from the description of the format ──> datastore ── serve ──> nbdcopy

Proxmox's client is in none of the registries these checks are installed from. So what is read here
was written by ``tests/repository/pbs/encoder.py``, which shares no line with the reader and is
held against the known answers of Proxmox's own tests. The clients are real.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

from conformance.context import Context
from conformance.image import MIB, file_digest
from conformance.outcome import CheckFailedError
from conformance.registry import check, expect, expect_in
from conformance.repository import SEED, command, disk_of, rewrite
from conformance.server import server_environment
from tests.repository.pbs.encoder import Datastore, Key, chunk_file, key_file, stamp

SIZE = 24 * MIB + 5 * 512
CHUNK = 4 * MIB
NEEDS = ("nbdcopy", "nbdinfo")
T0 = 1767225600
WRITTEN = "(no genuine tool)"


class _World:
    """Three snapshots of a VM's disk, and the disk as it was at each."""

    def __init__(self, context: Context, key: Key | None = None, group: str = "lab/vm/100") -> None:
        self.context = context
        self.group = group
        self.store = Datastore(context.directory / "store", chunk=CHUNK)
        self.states: list[Path] = []
        self.points: list[str] = []
        source = random.Random(SEED)
        disk = context.directory / "disk.img"
        disk_of(disk, SIZE, source)
        for day in range(3):
            if day:
                rewrite(disk, source, pieces=2)
            state = context.directory / f"{day}.img"
            context.run("cp", "--sparse=always", disk, state)
            self.states.append(state)
            seconds = T0 + 86400 * day
            self.store.snapshot(group, seconds, {"drive-scsi0": disk.read_bytes()}, key=key)
            self.points.append(stamp(seconds))

    @property
    def source(self) -> str:
        return f"pbs:{self.store.root}"

    def name(self, point: str) -> str:
        return f"{self.group}/drive-scsi0@{point}"


def _read_back(world: _World, environment: dict[str, str]) -> None:
    context = world.context
    server = context.serve(source=world.source, environment=environment)
    listed = context.run("nbdinfo", "--list", "--json", server.uri()).stdout
    names = sorted(each["export-name"] for each in json.loads(listed)["exports"])
    expect(sorted(world.name(each) for each in (*world.points, "latest")), names, "exports")
    for point, state in zip(world.points, world.states, strict=True):
        target = context.directory / "download.img"
        context.run("nbdcopy", server.uri(world.name(point)), target)
        expect(file_digest(state), file_digest(target), f"sha256 of {point}")
        target.unlink()


@check("Proxmox Backup Server", f"points {WRITTEN}", needs=NEEDS)
def points(context: Context) -> None:
    """Snapshots in a namespace, each by its time; bit for bit."""
    _read_back(_World(context), {})


@check("Proxmox Backup Server", f"encrypted {WRITTEN}", needs=NEEDS)
def encrypted(context: Context) -> None:
    """With a key file under a passphrase as without; without the key one line."""
    key = Key(b"an encryption key of 32 bytes...")
    kdf = {"Scrypt": {"n": 65536, "r": 8, "p": 1, "salt": "c2FsdA=="}}
    path = context.directory / "key.json"
    path.write_text(key_file(key, kdf, b"correct horse"))
    world = _World(context, key)
    secret = {"NBDSRV_PBS_KEYFILE": str(path), "PBS_ENCRYPTION_PASSWORD": "correct horse"}
    _read_back(world, secret)
    for environment, saying in (
        ({}, "NBDSRV_PBS_KEYFILE"),
        (secret | {"PBS_ENCRYPTION_PASSWORD": "wrong"}, "does not open it"),
    ):
        variables = {**server_environment(), **environment}
        words = command("info", f"{world.source}#{world.group}")
        finished = context.run(*words, code=None, environment=variables)
        expect(1, finished.code, "exit code")
        expect(1, len(finished.stderr.splitlines()), f"lines of {finished.stderr!r}")
        expect_in(saying, finished.stderr, "what is said")


@check("Proxmox Backup Server", f"maps {WRITTEN}", needs=NEEDS)
def maps(context: Context) -> None:
    """Zero chunks are holes; changed-since names the chunks that differ, and no others."""
    world = _World(context)
    server = context.serve(source=world.source)
    states = [state.read_bytes() for state in world.states]
    for point, state in zip(world.points, states, strict=True):
        uri = server.uri(world.name(point))
        for row in _map(context, uri, "base:allocation"):
            if row["type"] & 2 and any(state[row["offset"] : row["offset"] + row["length"]]):
                raise CheckFailedError(f"data where a hole is told: {row}")
        for other, before in zip(world.points, states, strict=True):
            if other == point:
                continue
            told: set[int] = set()
            for row in _map(context, uri, f"nbdsrv:changed-since:{other}"):
                if row["type"]:
                    told.update(range(row["offset"], row["offset"] + row["length"], CHUNK))
            wanted = {
                at
                for at in range(0, SIZE, CHUNK)
                if state[at : at + CHUNK] != before[at : at + CHUNK]
            }
            expect(sorted(wanted), sorted(told), f"chunks changed since {other}")


def _map(context: Context, uri: str, name: str) -> list[dict[str, Any]]:
    text = context.run("nbdinfo", f"--map={name}", "--json", uri).stdout
    rows: list[dict[str, Any]] = json.loads(text)
    return rows


@check("Proxmox Backup Server", f"damage {WRITTEN}", needs=NEEDS)
def damage(context: Context) -> None:
    """A changed chunk: those who have it fail, others are exact, verify names it; exit code 3."""
    world = _World(context)
    victim = max(
        (chunk_file(world.store.root, digest) for digest in world.store.chunks),
        key=lambda path: path.stat().st_size,
    )
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    os.chmod(victim, 0o644)
    victim.write_bytes(raw)
    server = context.serve(source=world.source)
    failed = 0
    for point, state in zip(world.points, world.states, strict=True):
        target = context.directory / "download.img"
        target.unlink(missing_ok=True)
        finished = context.run("nbdcopy", server.uri(world.name(point)), target, code=None)
        failed += finished.code != 0
        if not finished.code:
            expect(file_digest(state), file_digest(target), f"sha256 of {point}")
    if not failed:
        raise CheckFailedError("the damage was not noticed")
    words = command("verify", world.source, "--level", "chunks", "--json")
    finished = context.run(*words, code=None, environment=server_environment())
    expect(3, finished.code, "exit code of verify")
    expect_in(victim.name, finished.stdout, "what verify names")
