"""A repository in trouble: a flipped bit, a read-only mount, a full disk; by everybody's clients.

::

    packs/3f/3f09...pk  ─ one bit ─>  EIO for one chunk      exact bytes everywhere else
    ENOSPC in a backup  ────────────> one line, exit code 1  older points as they were
"""

import hashlib
import os
import random
from pathlib import Path

from conformance.context import Context
from conformance.image import MIB, file_digest
from conformance.outcome import CheckFailedError, MissingPeerError
from conformance.process import Finished
from conformance.programs.nbdsh import libnbd_python
from conformance.registry import check, expect, expect_in
from conformance.repository import CHUNK, SEED, SIZE, Repository, World

BLOCKS = """\
import hashlib, sys, nbd
handle, step = nbd.NBD(), int(sys.argv[2])
handle.connect_uri(sys.argv[1])
for offset in range(0, handle.get_size(), step):
    length = min(step, handle.get_size() - offset)
    try:
        print(offset, hashlib.sha256(handle.pread(length, offset)).hexdigest())
    except nbd.Error as error:
        print(offset, error.errno)
"""
"""For libnbd's bindings: the SHA-256 of each block, or the errno it is answered with."""


@check("repository", "a flipped bit", needs=("nbdcopy", "qemu-io"))
def flipped(context: Context) -> None:
    """EIO for one chunk, by every client; exact bytes everywhere else; verify names it."""
    world = World(context, points=1)
    pack = max((world.repo.path / "packs").rglob("*.pk"), key=lambda path: path.stat().st_size)
    _flip(pack, pack.stat().st_size // 2)
    server = world.repo.serve()
    uri = server.uri(world.repo.export("latest"))
    bad = _bad_blocks(context, uri, world.states[-1].read_bytes())
    expect(1, len({offset // CHUNK for offset in bad}), "damaged chunks")
    expect(1, context.run("nbdcopy", uri, "null:", code=None).code, "nbdcopy's exit code")
    said = _qemu_read(context, uri, bad[0])
    expect_in("Input/output error", said.stdout + said.stderr, "qemu-io where it is damaged")
    said = _qemu_read(context, uri, bad[-1] + CHUNK if bad[-1] + 2 * CHUNK < SIZE else 0)
    expect(0, said.code, "qemu-io's exit code beside it")
    found = world.repo.run("verify", world.repo.target, "--level", "chunks", code=3)
    said_all = found.stdout + found.stderr
    for word in (pack.stem, world.points[-1], "disk"):
        expect_in(word, said_all, "what verify says of the damage")
    server.stop()
    _heals(world)


def _heals(world: World) -> None:
    """After verify a full backup stores the chunk anew, and the old point reads again.

    By a new server; one that has just looked for the chunk elsewhere looks again after a minute.
    """
    digest = file_digest(world.disk)
    world.repo.backup(world.disk, digest, "--since", "full")
    expect(2, len(world.repo.prove(world.repo.serve())), "points after it was healed")


def _flip(path: Path, offset: int) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def _bad_blocks(context: Context, uri: str, wanted: bytes, step: int = 16384) -> list[int]:
    """Offsets that are answered with EIO; what is answered with other content fails the check."""
    text = context.run(libnbd_python(context), "-c", BLOCKS, uri, str(step)).stdout
    bad: list[int] = []
    rows = [line.split() for line in text.splitlines()]
    expect(-(-len(wanted) // step), len(rows), "blocks read")
    for place, said in rows:
        offset = int(place)
        if said == "EIO":
            bad.append(offset)
        else:
            expect(hashlib.sha256(wanted[offset : offset + step]).hexdigest(), said, place)
    if not bad:
        raise CheckFailedError("nothing is damaged")
    return bad


def _qemu_read(context: Context, uri: str, offset: int) -> Finished:
    command = f"read {offset} 4096"
    return context.run("qemu-io", "-r", "-f", "raw", "-c", command, uri, code=None)


@check("repository", "read-only mount", needs=("nbdcopy", "mount"))
def read_only(context: Context) -> None:
    """Served as it is, verified too; a backup into it is refused with one line."""
    if os.geteuid() != 0:
        raise MissingPeerError("a read-only mount needs root")
    world = World(context, points=2)
    place = context.directory / "ro"
    place.mkdir()
    context.run("mount", "--bind", world.repo.path, place)
    context.at_end(context.run, "umount", place)
    context.run("mount", "-o", "remount,bind,ro", place)
    repo = Repository(context, f"repo:{place}", known=world.repo.known)
    server = repo.serve()
    expect(world.points, repo.prove(server), "points on the read-only mount")
    server.stop()
    repo.run("verify", repo.target)
    repo.refused(*repo.backup_words(world.disk), saying="read-only")


@check("repository", "full disk", needs=("nbdcopy", "mount"))
def full(context: Context) -> None:
    """ENOSPC in a backup: one line, exit code 1, the older points intact; then there is space."""
    repo = Repository(context, f"repo:{context.directory / 'small' / 'repo'}")
    disk = context.directory / "disk.img"
    source = random.Random(SEED)
    place = _small_file_system(context, "24m")
    ballast = place / "ballast"
    ballast.write_bytes(bytes(12 * MIB))
    repo.init()
    disk.write_bytes(source.randbytes(3 * MIB))
    first = repo.backup(disk, file_digest(disk))["point"]
    disk.write_bytes(source.randbytes(12 * MIB))
    repo.refused(*repo.backup_words(disk), saying="no space left")
    server = repo.serve()
    expect([first], repo.prove(server), "points when it is full")
    ballast.unlink()
    second = repo.backup(disk, file_digest(disk))["point"]
    expect([first, second], repo.prove(server), "points when there is space again")
    repo.run("verify", repo.target, "--level", "chunks")
    server.stop()


def _small_file_system(context: Context, size: str) -> Path:
    if os.geteuid() != 0:
        raise MissingPeerError("a small file system needs root")
    place = context.directory / "small"
    place.mkdir()
    context.run("mount", "-t", "tmpfs", "-o", f"size={size}", "nbdsrv-conformance", place)
    context.at_end(context.run, "umount", place)
    return place
