"""A served repository, by everybody's clients: listed, read, mapped, mounted, encrypted.

::

    disk, changed, changed ── backup x 3 ──> repository ── serve ──> vm one/disk@01J...  x 3
                                                                     vm one/disk@latest
"""

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

from conformance.context import Context
from conformance.image import MIB, file_digest
from conformance.outcome import CheckFailedError, MissingPeerError
from conformance.programs.nbdfuse import fuse_mount, loop_mount
from conformance.registry import check, expect, expect_in
from conformance.repository import CHUNK, SEED, SIZE, Repository, World, disk_of, rewrite


@check("repository", "listed", needs=("nbdinfo",))
def listed(context: Context) -> None:
    """Every point and the latest of them by readable name; a new one without a restart."""
    world = World(context, points=2)
    server = world.repo.serve(listen=("unix", "tcp"))
    expect(1, len(server.printed), "URIs printed for a repository")
    expect(_names(world), _listed_names(context, server.uri()), "exports over a Unix socket")
    expect(_names(world), _listed_names(context, server.uri(tcp=True)), "exports over TCP")
    world.backup(rewrite(world.disk, random.Random(5)))
    expect(_names(world), _listed_names(context, server.uri()), "exports after a backup")
    for name in _names(world):
        text = context.run("nbdinfo", "--json", server.uri(name)).stdout
        facts = json.loads(text)["exports"][0]
        expect(SIZE, facts["export-size"], f"size of {name}")
        expect(True, facts["is_read_only"], f"{name} is read-only")
        expect_in("base:allocation", str(facts["contexts"]), f"contexts of {name}")
    finished = context.run("nbdinfo", server.uri("vm one/disk@never"), code=None)
    expect(1, finished.code, "nbdinfo's exit code for a point that is not there")


def _names(world: World) -> list[str]:
    return sorted(world.repo.export(point) for point in (*world.points, "latest"))


def _listed_names(context: Context, uri: str) -> list[str]:
    text = context.run("nbdinfo", "--list", "--json", uri).stdout
    return sorted(each["export-name"] for each in json.loads(text)["exports"])


@check("repository", "content", needs=("nbdcopy", "qemu-img", "qemu-io"))
def content(context: Context) -> None:
    """nbdcopy over four connections, qemu-img, qemu-io and restore: each point, bit for bit."""
    world = World(context)
    server = world.repo.serve()
    for point, state in zip(world.points, world.states, strict=True):
        uri = server.uri(world.repo.export(point))
        context.run("nbdcopy", "-C", "4", "--sync", uri, "download.img")
        expect(file_digest(state), file_digest(context.directory / "download.img"), point)
        context.run("qemu-img", "compare", "-f", "raw", "-F", "raw", state, uri)
        world.repo.run("restore", world.repo.source(point), "restored.img")
        expect(file_digest(state), file_digest(context.directory / "restored.img"), "restored")
        (context.directory / "restored.img").unlink()
    uri = server.uri(world.repo.export("latest"))
    context.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, "copy.qcow2")
    context.run("qemu-img", "compare", "-F", "raw", "copy.qcow2", world.states[-1])
    ends = ("-c", f"read 0 {SIZE}", "-c", f"read {SIZE - 512} 512", "-c", "aio_read 1M 3M")
    said = context.run("qemu-io", "-r", "-f", "raw", *ends, uri)
    expect(False, "failed" in said.stdout + said.stderr, "qemu-io's reads fail")
    refused = context.run("qemu-io", "-f", "raw", "-c", "write 0 512", uri, code=None)
    expect(1, refused.code, "qemu-io's exit code for a write")


@check("repository", "maps", needs=("nbdinfo",))
def maps(context: Context) -> None:
    """base:allocation hides no data; changed-since says what has changed, and not much more."""
    world = World(context)
    server = world.repo.serve()
    states = [state.read_bytes() for state in world.states]
    for point, state in zip(world.points, states, strict=True):
        uri = server.uri(world.repo.export(point))
        holes = [row for row in _map(context, uri) if row["type"] & 2]
        wrong = [row for row in holes if any(state[row["offset"] : _end(row)])]
        expect([], wrong, "ranges that are called zero and are not")
        if not holes:
            raise CheckFailedError("no holes at all")
        for other, before in zip(world.points, states, strict=True):
            if other != point:
                _judge_changes(context, uri, other, before, state)


def _judge_changes(context: Context, uri: str, other: str, before: bytes, now: bytes) -> None:
    rows = _map(context, uri, f"nbdsrv:changed-since:{other}")
    expect(len(now), sum(row["length"] for row in rows), "bytes the map is about")
    wanted = {
        offset
        for offset in range(0, len(now), CHUNK)
        if now[offset : offset + CHUNK] != before[offset : offset + CHUNK]
    }
    told: set[int] = set()
    for row in rows:
        if row["type"]:
            told.update(range(row["offset"], _end(row), CHUNK))
    expect(sorted(wanted), sorted(told), f"chunks changed since {other}")


def _map(context: Context, uri: str, name: str = "base:allocation") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(
        context.run("nbdinfo", f"--map={name}", "--json", uri).stdout
    )
    return rows


def _end(row: dict[str, Any]) -> int:
    return int(row["offset"] + row["length"])


@check("repository", "ext4 on a loop mount", needs=("nbdfuse", "mkfs.ext4", "debugfs", "mount"))
def mounted(context: Context) -> None:
    """The files of both points, mounted; the file that was changed between them differs."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        raise MissingPeerError("loop mounts need root and /dev/loop-control")
    files = context.directory / "files"
    files.mkdir()
    source = random.Random(SEED)
    for index in range(40):
        (files / f"file{index}").write_bytes(source.randbytes(source.randrange(100_000)))
    before = _tree(files)
    repo = Repository(context, f"repo:{context.directory / 'repo'}")
    disk = context.directory / "disk.img"
    disk.touch()
    os.truncate(disk, 32 * MIB)
    context.run("mkfs.ext4", "-q", "-d", files, disk)
    repo.init()
    points = [repo.backup(disk, "")["point"]]
    (files / "news").write_bytes(b"written between two backups\n" * 1000)
    for line in ("rm file7", f"write {files / 'news'} news"):
        context.run("debugfs", "-w", "-R", line, disk)
    (files / "file7").unlink()
    points.append(repo.backup(disk, "")["point"])
    server = repo.serve()
    for index, (point, wanted) in enumerate(zip(points, (before, _tree(files)), strict=True)):
        place = f"fuse{index}"
        path, _ = fuse_mount(context, server, "-r", name=repo.export(point), place=place)
        found = loop_mount(context, path, "ro", place=f"mnt{index}")
        expect(wanted, _tree(found), f"files of point {index}")


def _tree(root: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.iterdir())
        if path.is_file()
    }


@check("repository", "encrypted", needs=("nbdcopy", "nbdinfo"))
def encrypted(context: Context) -> None:
    """With the passphrase as without encryption; without it one line; nothing is legible."""
    secret = {"NBDSRV_PASSPHRASE": "correct horse"}
    repo = Repository(context, f"repo:{context.directory / 'repo'}", secret)
    repo.init("--encrypt")
    disk = context.directory / "disk.img"
    disk_of(disk, 8 * MIB, random.Random(SEED))
    with disk.open("r+b") as file:
        file.write(b"a legible secret " * 4000)
    report = repo.backup(disk, file_digest(disk))
    expect([report["point"]], repo.prove(repo.serve()), "points of the encrypted repository")
    stored = b"".join(path.read_bytes() for path in repo.path.rglob("*") if path.is_file())
    expect(False, b"a legible secret" in stored, "the disk's content is legible")
    for passphrase, saying in (("wrong", "passphrase"), ("", "NBDSRV_PASSPHRASE")):
        other = Repository(context, repo.target, {"NBDSRV_PASSPHRASE": passphrase})
        finished = other.run("ls", other.target, code=None)
        expect(1, len(finished.stderr.splitlines()), f"lines of {finished.stderr!r}")
        expect_in(saying, finished.stderr, f"what is said of the passphrase {passphrase!r}")
        expect(False, finished.code == 0, "a wrong passphrase is taken")
