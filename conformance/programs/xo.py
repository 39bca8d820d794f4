"""Xen Orchestra's repositories, written by its own code, served to everybody's clients.

::

    fixtures ── nbdsrv serve xo:... ── nbdinfo --list, nbdcopy, nbdinfo --map ──> EXPECTED.json
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from conformance.context import Context
from conformance.fixtures import unpacked
from conformance.foreign import listed, read_only, state_of
from conformance.outcome import MissingPeerError
from conformance.process import Finished
from conformance.registry import check, expect, expect_in
from conformance.repository import command
from conformance.server import Server, server_environment

VM = "research-vm"
WHOLE, BROKEN = "xo-repositories.tar.zst", "xo-damaged.tar.zst"
NEEDS = ("nbdinfo", "nbdcopy", "zstd")
FIRST, SECOND, THIRD = (f"2026010{day}T020304Z" for day in (1, 2, 3))

Points = dict[str, dict[str, Any]]


def _expected(context: Context) -> dict[str, Any]:
    whole = unpacked(context, WHOLE)
    found: dict[str, Any] = json.loads((whole / "repos" / "EXPECTED.json").read_text())
    return found


def _run(context: Context, *words: str | Path) -> Finished:
    """One of our commands, to its end."""
    return context.run(*command(*words), code=None, environment=server_environment())


def _key(row: dict[str, Any]) -> dict[str, str]:
    return {"NBDSRV_PASSPHRASE": row["key"]} if row["key"] else {}


def _digest(path: Path, size: int) -> str:
    """Of the first ``size`` bytes: in an XVA disks are padded."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(size)).hexdigest()


def _prove(context: Context, server: Server, points: Points) -> None:
    """nbdcopy of every disk of these points gives the expected content."""
    target = context.directory / "download.img"
    for point, disks in points.items():
        for name, disk in disks.items():
            context.run("nbdcopy", "-C", "2", server.uri(f"{VM}/{name}@{point}"), target)
            what = f"SHA-256 of {name} at {point}"
            expect(disk["sha256"], _digest(target, disk["size"]), what)
            target.unlink()


@check("xo", "every point", needs=NEEDS)
def every_point(context: Context) -> None:
    """Every layout, cipher, merge and the XVA, bit for bit; the repository is as it was."""
    for name, row in _expected(context).items():
        root = context.directory / "repos" / name
        before = state_of(root)
        server = context.serve(source=f"xo:{root}", environment=_key(row))
        names = {f"{VM}/{disk}@{p}" for p, disks in row["points"].items() for disk in disks}
        names |= {f"{VM}/{disk}@latest" for disks in row["points"].values() for disk in disks}
        expect(sorted(names), listed(context, server), f"exports of {name}")
        _prove(context, server, row["points"])
        server.close()
        expect(before, state_of(root), f"the files of {name}")


@check("xo", "holes and changes", needs=NEEDS)
def holes_and_changes(context: Context) -> None:
    """base:allocation shows the holes, changed-since the blocks of the deltas."""
    _expected(context)
    server = context.serve(source=f"xo:{context.directory / 'repos' / 'vhddir-brotli'}")
    uri = server.uri(f"{VM}/root@{THIRD}")
    rows = json.loads(context.run("nbdinfo", "--map", "--json", uri).stdout)
    holes = sum(row["length"] for row in rows if row["type"] & 2)
    expect((64 - 2 * 8) << 20, holes, "bytes of holes")
    since = f"--map=nbdsrv:changed-since:{SECOND}"
    rows = json.loads(context.run("nbdinfo", since, "--json", uri).stdout)
    expect(3 * 2 << 20, sum(row["length"] for row in rows if row["type"]), "bytes that changed")


@check("xo", "read-only places", needs=NEEDS)
def read_only_places(context: Context) -> None:
    """A read-only mount, and files nobody may change: what Xen Orchestra itself refuses."""
    expected = _expected(context)
    root = context.directory / "repos" / "plain-vhd"
    points = {THIRD: expected["plain-vhd"]["points"][THIRD]}
    frozen = context.run("chattr", "-R", "+i", root, code=None)
    context.at_end(lambda: context.run("chattr", "-R", "-i", root, code=None))
    if not frozen.code:
        server = context.serve(source=f"xo:{root}")
        _prove(context, server, points)
        server.close()
    server = context.serve(source=f"xo:{read_only(context, root)}")
    _prove(context, server, points)
    server.close()
    if frozen.code:
        raise MissingPeerError(f"no immutable files here: {frozen.stderr.strip()}")


@check("xo", "damage", needs=NEEDS)
def damage(context: Context) -> None:
    """What is broken is refused or an error, by name; all else is exact, and verify tells."""
    expected = _expected(context)["plain-vhd"]["points"]
    broken = unpacked(context, BROKEN) / "broken"
    for name, good in (
        ("midmerge", {SECOND: ("root", "odd"), THIRD: ("root", "odd")}),
        ("nofooter", {FIRST: ("root",), SECOND: ("root",), THIRD: ("root", "odd")}),
        ("partialbitmap", {FIRST: ("root",), SECOND: ("root", "odd"), THIRD: ("root",)}),
        ("wrongparent", {FIRST: ("odd",), SECOND: ("odd",), THIRD: ("odd",)}),
        ("missingblock", {FIRST: ("odd",), SECOND: ("odd",), THIRD: ("odd",)}),
    ):
        server = context.serve(source=f"xo:{broken / name}")
        points = {p: {disk: expected[p][disk] for disk in disks} for p, disks in good.items()}
        _prove(context, server, points)
        server.close()
    for name, export, said in (
        ("midmerge", f"root@{FIRST}", "being merged"),
        ("wrongparent", f"root@{FIRST}", "another disk is under its name"),
        ("wrongparent", f"root@{THIRD}", "another disk is under the parent's name"),
        ("missingblock", f"root@{THIRD}", "blocks/0/15"),
    ):
        source = f"xo:{broken / name}#{VM}/{export}"
        done = _run(context, "copy", source, context.directory / "x.img")
        expect(1, done.code, f"exit code of copying {export} of {name}")
        expect_in(said, done.stderr, f"what is said of {export} of {name}")
    for name, code, said in (
        ("bitrot", 0, "a flipped bit in a block cannot be seen"),
        ("missingblock", 3, "blocks/0/15"),
        ("wrongparent", 3, "another disk"),
        ("midmerge", 3, "being merged"),
    ):
        done = _run(context, "verify", f"xo:{broken / name}")
        expect(code, done.code, f"exit code of verify of {name}")
        expect_in(said, done.stdout, f"what verify says of {name}")
