"""A running VM read through ``nbdsrv proxy --tee A --tee B`` by other people's clients.

::

    QEMU, written to all the time ── frozen ── nbdsrv proxy ── nbdcopy, @vates/nbd-client
                                                 ├── tee A     a repository in a directory
                                                 └── tee B     one on a disk that gets slow, or dies

Every client has the disks as they were at one moment, and so has each point: the moment is found
by playing back the log of writes. A repository that cannot have it has no point, the report says
why, and nobody else notices.
"""

import hashlib
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from conformance.context import Context
from conformance.image import KIB, MIB, file_digest
from conformance.outcome import CheckFailedError, MissingPeerError
from conformance.programs.live_qemu import NEEDS as QEMU
from conformance.programs.live_qemu import Lane
from conformance.programs.xen_orchestra import NEEDS as NODE
from conformance.programs.xen_orchestra import drive
from conformance.proxy import Proxy, Told
from conformance.registry import Part, check, expect, expect_in
from conformance.repository import Repository
from conformance.virtual_machine import DISKS, VM, Guest
from conformance.weakdisk import WeakDisk, unavailable

REPOSITORIES = 2
CLIENTS = (("single", 64 * KIB), ("multi", 2 * MIB))
"""Xen Orchestra's classes, and bytes of the blocks they are asked for."""
LARGER = {"vda": 96 * MIB, "vdb": 5 * MIB + 512}
"""Disks whose repository is still busy when the client is through."""
SLOW_RATE = 4 << 20
"""Bytes a second: hundreds of times less than the disk gives otherwise."""


def _proxy(context: Context, lane: Lane) -> Proxy:
    tees = [repo.target for repo in lane.repos]
    return Proxy(context, [lane.source], tees, exports=len(DISKS))


def _settings(uri: str) -> dict[str, Any]:
    parts = urlsplit(uri)
    name = unquote(parts.path.removeprefix("/"))
    return {"address": parts.hostname, "port": parts.port, "exportname": name}


def _of_disk(proxy: Proxy, disk: str) -> str:
    """The URI of one of the VM's disks."""
    found = [uri for name, uri in proxy.uris.items() if name.rpartition("/")[2] == disk]
    expect(1, len(found), f"exports of {disk} among {sorted(proxy.uris)}")
    return found[0]


def _modes(told: Told) -> set[str]:
    return {row["mode"] for row in told.rows if "mode" in row}


def _expect_stored(lane: Lane, digests: dict[str, set[str]]) -> None:
    """All clients and all points have the same bytes, and these are of one moment."""
    moments = lane.prove()
    expect([moments[0]] * len(lane.repos), moments, "moments of the points of one proxy")
    for disk, found in digests.items():
        expect(1, len(found), f"different contents that clients have of {disk}")
        for repo, server in zip(lane.repos, lane.servers, strict=True):
            stored = hashlib.sha256(lane.content(server, disk, "latest")).hexdigest()
            expect(found, {stored}, f"{disk} of {repo.target}, and what clients have")


@check("live proxy", "nbdcopy and @vates/nbd-client", needs=(*QEMU, *NODE, "nbdinfo"))
def clients(context: Context) -> None:
    """Full, then incremental: both of its clients and nbdcopy, at once, beside two tees."""
    lane = Lane(context, 11, REPOSITORIES)
    for mode in ("full", "incremental"):
        lane.guest.await_writes(30)
        proxy = _proxy(context, lane)
        digests: dict[str, set[str]] = {disk: set() for disk in DISKS}
        for disk in DISKS:
            uri = _of_disk(proxy, disk)
            target = context.directory / "copied"
            copying = threading.Thread(target=context.run, args=("nbdcopy", uri, target))
            copying.start()
            for kind, block in CLIENTS:
                result = drive(context, kind, _settings(uri), block)
                expect(DISKS[disk], result["size"], f"size of {disk} for {kind}")
                digests[disk].add(result["digest"])
            copying.join()
            digests[disk].add(file_digest(target))
        told = proxy.end()
        expect({mode}, _modes(told), f"modes: {told.rows}")
        _expect_stored(lane, digests)
    lane.clean()


# --- a store in trouble ---------------------------------------------------------------------------


class Trouble:
    """A VM, a sound repository, and one on a weak disk."""

    def __init__(self, context: Context, seed: int) -> None:
        why = unavailable()
        if why is not None:
            raise MissingPeerError(f"a disk that fails: {why}")
        self.context = context
        self.disk = WeakDisk()
        self.disk.__enter__()
        context.at_end(self.disk.__exit__, None, None, None)
        self.sound = Repository(context, f"repo:{context.directory / 'sound'}", group=VM)
        self.weak = Repository(context, f"repo:{self.disk.path / 'weak'}", group=VM)
        for repo in (self.sound, self.weak):
            repo.init()
        self.guest = Guest(context, seed, LARGER)
        scratch = context.directory / "scratch"
        scratch.mkdir()
        self.source = f"qemu:{self.guest.monitor}?scratch={scratch}"
        self.guest.start()
        self._fill()
        self.guest.await_writes(30)

    def _fill(self) -> None:
        """Enough that does not compress, so that a slow store is busy with it."""
        source, piece = random.Random(1), self.context.directory / "piece"
        for offset in range(0, LARGER["vda"] - MIB, 2 * MIB):
            piece.write_bytes(source.randbytes(MIB))
            self.guest.load("vda", offset, piece)

    def through(self, trouble: Callable[[], None], *, code: int) -> tuple[Told, dict[str, str]]:
        """Read both disks through the proxy; in the middle of the first, there is trouble."""
        tees = [self.sound.target, self.weak.target]
        proxy = Proxy(self.context, [self.source], tees, exports=len(LARGER))
        digests = {}
        timer = threading.Timer(0.05, trouble)
        timer.start()
        for disk in LARGER:
            target = self.context.directory / f"copied-{disk}"
            self.context.run("nbdcopy", _of_disk(proxy, disk), target)
            digests[disk] = file_digest(target)
        timer.join()
        return proxy.end(code=code), digests

    def stored(self, repo: Repository, disk: str) -> str:
        """SHA-256 of a disk of the latest point."""
        target = self.context.directory / f"restored-{disk}"
        source = f"{repo.target}#{VM}/{disk}@latest"
        repo.run("restore", "--force", "--quiet", source, target)
        return file_digest(target)

    def expect_stored(self, repo: Repository, digests: dict[str, str]) -> None:
        """The point has what the client has."""
        for disk, digest in digests.items():
            expect(digest, self.stored(repo, disk), f"{disk} of {repo.target}")


@check("live proxy", "a store becomes slow", needs=QEMU, part=Part.LIVE)
def slow(context: Context) -> None:
    """It falls behind, is given what it has missed from the frozen VM, and is exact."""
    world = Trouble(context, 12)
    world.disk.slow(SLOW_RATE)
    told, digests = world.through(lambda: None, code=0)
    world.disk.mend()
    for repo in (world.sound, world.weak):
        expect(len(LARGER), len(told.of(repo.target)), f"rows of {repo.target}: {told.rows}")
        world.expect_stored(repo, digests)
    world.guest.stop()


@check("live proxy", "a store dies", needs=QEMU, part=Part.LIVE)
def dead(context: Context) -> None:
    """It has no point and the report says why; the other, and the client, are exact."""
    world = Trouble(context, 13)
    told, digests = world.through(world.disk.die, code=3)
    expect(len(LARGER), len(told.of(world.sound.target)), f"rows of the sound one: {told.rows}")
    expect([], told.of(world.weak.target), "rows of the dead one")
    expect_in("weak", told.failed(world.weak.target), "why the dead one has no point")
    world.expect_stored(world.sound, digests)
    # Whatever the dead one has cost, the next backup of the other has lost no change.
    world.guest.await_writes(30)
    proxy = Proxy(context, [world.source], [world.sound.target], exports=len(LARGER))
    again = {}
    for disk in LARGER:
        target = Path(context.directory) / f"again-{disk}"
        context.run("nbdcopy", _of_disk(proxy, disk), target)
        again[disk] = file_digest(target)
    told = proxy.end()
    expect({"incremental"}, _modes(told), f"modes: {json.dumps(told.rows)}")
    world.expect_stored(world.sound, again)
    world.guest.stop()
    if again == digests:
        raise CheckFailedError("nothing was written between two backups")
