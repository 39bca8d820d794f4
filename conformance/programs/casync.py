"""casync's images: made by casync itself, served by us, and compared with what it extracts.

::

    disk ── casync make x 3 ──> vm1-2026-01-0N.caibx + default.castr ── serve ──> nbdcopy, nbdinfo
                                        └── casync extract ──> the same bytes
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from conformance.context import Context
from conformance.image import KIB, MIB, file_digest
from conformance.outcome import CheckFailedError
from conformance.registry import check, expect, expect_in
from conformance.repository import SEED, command, disk_of, rewrite
from conformance.server import Server, server_environment

SIZE = 24 * MIB + 1000
NEEDS = ("casync", "nbdcopy", "nbdinfo")
POINTS = ("2026-01-01", "2026-01-02", "2026-01-03")


class _World:
    """Three states of a disk, and casync's images of them."""

    def __init__(self, context: Context, *options: str) -> None:
        self.context = context
        self.directory = context.directory / "repo"
        self.directory.mkdir()
        self.states: list[Path] = []
        source = random.Random(SEED)
        disk = context.directory / "disk.img"
        disk_of(disk, SIZE, source)
        for point in POINTS:
            if self.states:
                rewrite(disk, source)
            state = context.directory / f"{point}.img"
            context.run("cp", "--sparse=always", disk, state)
            self.states.append(state)
            store = f"--store={self.directory / 'default.castr'}"
            context.run("casync", *options, store, "make", self.index(point), state)

    def index(self, point: str) -> Path:
        return self.directory / f"vm1-{point}.caibx"

    def serve(self) -> Server:
        return self.context.serve(source=f"casync:{self.directory}")

    def download(self, server: Server, point: str, code: int | None = 0) -> str:
        target = self.context.directory / "download.img"
        target.unlink(missing_ok=True)
        uri = server.uri(f"vm1/disk@{point}")
        finished = self.context.run("nbdcopy", uri, target, code=code)
        return file_digest(target) if not finished.code else ""


@check("casync", "points", needs=NEEDS)
def points(context: Context) -> None:
    """Each by its name; bit for bit what casync extracts; one that comes is listed at once."""
    world = _World(context)
    server = world.serve()
    listed = context.run("nbdinfo", "--list", "--json", server.uri()).stdout
    names = sorted(each["export-name"] for each in json.loads(listed)["exports"])
    expect(sorted(f"vm1/disk@{each}" for each in (*POINTS, "latest")), names, "exports")
    for point, state in zip(POINTS, world.states, strict=True):
        store = f"--store={world.directory / 'default.castr'}"
        context.run("casync", store, "extract", world.index(point), "extracted.img")
        extracted = context.directory / "extracted.img"
        expect(file_digest(state), file_digest(extracted), f"what casync extracts of {point}")
        extracted.unlink()
        expect(file_digest(state), world.download(server, point), f"sha256 of {point}")
    new = world.index("2026-01-04")
    new.write_bytes(world.index(POINTS[0]).read_bytes())
    expect(file_digest(world.states[0]), world.download(server, "latest"), "sha256 of a new one")


@check("casync", "maps", needs=NEEDS)
def maps(context: Context) -> None:
    """Holes hide no data, and are found; changed-since misses no change."""
    world = _World(context, "--chunk-size=4096:16384:65536")
    server = world.serve()
    states = [state.read_bytes() for state in world.states]
    for point, state in zip(POINTS, states, strict=True):
        rows = _map(context, server.uri(f"vm1/disk@{point}"))
        holes = [row for row in rows if row["type"] & 2]
        wrong = [row for row in holes if any(state[row["offset"] : _end(row)])]
        expect([], wrong, "ranges that are called holes and are not")
        if not holes:
            raise CheckFailedError("no holes at all")
        for other, before in zip(POINTS, states, strict=True):
            if other == point:
                continue
            uri = server.uri(f"vm1/disk@{point}")
            told = _map(context, uri, f"nbdsrv:changed-since:{other}")
            same = [row for row in told if not row["type"]]
            missed = [
                row
                for row in same
                if state[row["offset"] : _end(row)] != before[row["offset"] : _end(row)]
            ]
            expect([], missed, f"ranges called unchanged since {other} that have changed")
            expect(SIZE, sum(row["length"] for row in told), "bytes the map is about")
            if not same:
                raise CheckFailedError(f"all of {point} is called changed since {other}")


def _map(context: Context, uri: str, name: str = "base:allocation") -> list[dict[str, Any]]:
    text = context.run("nbdinfo", f"--map={name}", "--json", uri).stdout
    rows: list[dict[str, Any]] = json.loads(text)
    return rows


def _end(row: dict[str, Any]) -> int:
    return int(row["offset"] + row["length"])


@check("casync", "compressions and digests", needs=NEEDS)
def variants(context: Context) -> None:
    """xz, gzip, zstd; SHA-256 and SHA-512/256; chunks of other sizes."""
    raw = context.directory / "raw.img"
    digest = disk_of(raw, 3 * MIB + 77, random.Random(SEED))
    for number, options in enumerate(
        (
            ("--compression=xz",),
            ("--compression=gzip", "--digest=sha256"),
            ("--compression=zstd", "--chunk-size=1048576"),
            ("--chunk-size=1024:4096:16384", "--digest=sha512-256"),
        )
    ):
        name = f"variant{number}"
        store = f"--store={context.directory / name}.castr"
        context.run("casync", *options, store, "make", f"{name}.caibx", raw)
        server = context.serve(source=f"casync:{context.directory / name}.caibx#{name}/disk")
        target = context.directory / f"{name}.out"
        context.run("nbdcopy", server.uri(), target)
        expect(digest, file_digest(target), f"sha256 with {' '.join(options)}")
        server.stop()


@check("casync", "damage", needs=NEEDS)
def damage(context: Context) -> None:
    """A changed chunk is an error for its range alone, is named by verify, exit code 3."""
    world = _World(context)
    chunks = sorted((world.directory / "default.castr").rglob("*.cacnk"))
    victim = max(chunks, key=lambda path: path.stat().st_size)
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    server = world.serve()
    hurt = 0
    for point, state in zip(POINTS, world.states, strict=True):
        found = world.download(server, point, code=None)
        if found not in {"", file_digest(state)}:
            raise CheckFailedError(f"wrong content of {point} without an error")
        hurt += not found
    if not hurt:
        raise CheckFailedError("the damage was not noticed")
    left = context.directory / "left.img"
    content = world.states[0].read_bytes()
    uri = server.uri(f"vm1/disk@{POINTS[0]}")
    script = (
        "import nbd, sys, hashlib\n"
        "h = nbd.NBD(); h.connect_uri(sys.argv[1]); good = bad = 0\n"
        f"for at in range(0, {len(content)}, {64 * KIB}):\n"
        f"    n = min({64 * KIB}, {len(content)} - at)\n"
        "    try: data = h.pread(n, at)\n"
        "    except nbd.Error: bad += 1; continue\n"
        "    open(sys.argv[2], 'ab').write(at.to_bytes(8, 'big') + hashlib.sha256(data).digest())\n"
        "print(bad)\n"
    )
    said = context.run("/usr/bin/python3", "-c", script, uri, left).stdout
    if not 1 <= int(said) <= 8:
        raise CheckFailedError(f"{said.strip()} pieces of 64 KiB cannot be read")
    rows = left.read_bytes()
    for at in range(0, len(rows), 40):
        offset = int.from_bytes(rows[at : at + 8], "big")
        wanted = hashlib.sha256(content[offset : offset + 64 * KIB]).digest()
        expect(wanted.hex(), rows[at + 8 : at + 40].hex(), f"sha256 of 64 KiB at {offset}")
    source = f"casync:{world.directory}"
    words = command("verify", source, "--level", "chunks", "--json")
    finished = context.run(*words, code=None, environment=server_environment())
    expect(3, finished.code, "exit code of verify")
    expect_in(victim.stem, finished.stdout, "what verify names")
