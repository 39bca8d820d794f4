"""Repositories that restic made, served while it goes on using them."""

import json
import os
import random
from pathlib import Path

from conformance.context import Context
from conformance.foreign import commands, listed, prove, read_only, state_of
from conformance.image import MIB
from conformance.outcome import CheckFailedError
from conformance.programs.nbdsh import libnbd_python
from conformance.registry import Part, check, expect, expect_in
from conformance.repository import SEED, SIZE, disk_of, rewrite

PASSWORD = "correct horse"
SECRET = {"RESTIC_PASSWORD": PASSWORD}
DISK = "vm one/disk.raw"
TAIL = 4 * MIB
"""Zeroes that are more than one piece, however they are cut."""
NEEDS = ("restic", "nbdcopy", "nbdinfo")
READING = """
import nbd
handle = nbd.NBD()
handle.connect_uri("{uri}")
with open("{output}", "wb") as file:
    for at in range({start}, {end}, 1 << 20):
        file.write(handle.pread(min(1 << 20, {end} - at), at))
"""


class Restic:
    """A repository with snapshots of one disk."""

    def __init__(self, context: Context, *options: str) -> None:
        self.context = context
        self.path = context.directory / "restic"
        self.files = context.directory / "files"
        self.disk = self.files / DISK
        self.disk.parent.mkdir(parents=True)
        self.source = random.Random(SEED)
        self.states: dict[str, Path] = {}
        self.run("init", *options)
        disk_of(self.disk, SIZE, self.source)
        os.truncate(self.disk, SIZE + TAIL)

    def run(self, *words: str | Path, code: int | None = 0) -> str:
        """Its output."""
        command = ("restic", "-q", "--no-cache", "-r", self.path, *words)
        return self.context.run(*command, environment=SECRET, code=code, timeout_s=120).stdout

    def backup(self, *options: str) -> str:
        """The short id of the snapshot."""
        before = self._ids()
        self.run("backup", "--host", "alpha", *options, self.files)
        (new,) = self._ids() - before
        state = self.context.directory / f"{new}.img"
        state.write_bytes(self.disk.read_bytes())
        self.states[self.name(new)] = state
        return new

    def _ids(self) -> set[str]:
        return {each["short_id"] for each in json.loads(self.run("snapshots", "--json"))}

    def name(self, snapshot: str) -> str:
        """Of the export: restic keeps absolute paths."""
        return f"alpha/{str(self.disk).lstrip('/')}@{snapshot}"

    def change(self) -> None:
        """Rewrite a part of the disk."""
        rewrite(self.disk, self.source)


@check("restic", "snapshots", needs=NEEDS, part=Part.REPOSITORY)
def snapshots(_: Context) -> None:
    """Versions 1 and 2, each compression: listed by readable names, bit for bit; no trace left."""
    for options, packing in (
        (("--repository-version", "1"), ()),
        (("--repository-version", "2"), ("--compression", "max")),
        (("--repository-version", "2"), ("--compression", "off")),
    ):
        with Context() as inner:
            restic = Restic(inner, *options)
            for number in range(3):
                if number:
                    restic.change()
                restic.backup(*packing)
            before = state_of(restic.path)
            server = inner.serve(source=f"restic:{restic.path}", environment=SECRET)
            latest = restic.name("latest")
            expect(sorted([*restic.states, latest]), listed(inner, server), "exports")
            newest = list(restic.states.values())[-1]
            prove(inner, server, {**restic.states, latest: newest})
            server.stop()
            expect(before, state_of(restic.path), "files of the repository")
            restic.run("check", "--read-data")


@check("restic", "prune meanwhile", needs=NEEDS, part=Part.REPOSITORY)
def prune(context: Context) -> None:
    """Snapshots come, go, and are repacked under a server; a lock of restic's stops nobody."""
    restic = Restic(context)
    first = restic.backup()
    for _ in range(2):
        restic.change()
        restic.backup()
    server = context.serve(source=f"restic:{restic.path}", environment=SECRET)
    prove(context, server, restic.states)
    restic.run("forget", "--prune", "--max-unused", "0", first)
    gone = restic.states.pop(restic.name(first))
    restic.change()
    restic.backup()
    prove(context, server, restic.states)
    text = context.run("nbdinfo", server.uri(restic.name(first)), code=None)
    expect(1, text.code, f"nbdinfo's exit code for a forgotten snapshot ({gone.name})")


@check("restic", "read-only mount", needs=(*NEEDS, "mount", "umount"), part=Part.REPOSITORY)
def mounted_read_only(context: Context) -> None:
    """As it is on an immutable medium."""
    restic = Restic(context)
    restic.backup()
    place = read_only(context, restic.path)
    server = context.serve(source=f"restic:{place}", environment=SECRET)
    prove(context, server, restic.states)
    server.stop()
    ours = commands(context, f"restic:{place}", SECRET)
    ours.run("verify", ours.target, "--level", "chunks")


@check("restic", "damage", needs=NEEDS)
def damage(context: Context) -> None:
    """A flipped byte: verify names pack, disk and range; only that range cannot be read."""
    restic = Restic(context)
    restic.backup()
    pack = max((restic.path / "data").rglob("?" * 64), key=lambda path: path.stat().st_size)
    pack.chmod(0o644)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 0x40
    pack.write_bytes(data)
    ours = commands(context, f"restic:{restic.path}", SECRET)
    done = ours.run("verify", ours.target, "--level", "chunks", "--json", code=3)
    (finding,) = json.loads(done.stdout)["findings"]
    expect_in(pack.name, finding["key"], "the object that is named")
    (hurt,) = finding["hurts"]
    ((offset, length),) = hurt["ranges"]
    server = context.serve(source=ours.target, environment=SECRET)
    (name, state) = next(iter(restic.states.items()))
    refused = context.run("nbdcopy", server.uri(name), "null:", code=None)
    expect(1, refused.code, "nbdcopy's exit code")
    golden = state.read_bytes()
    for start, end in ((0, offset), (offset + length, len(golden))):
        if start == end:
            continue
        output = context.directory / "part.img"
        reading = READING.format(uri=server.uri(name), start=start, end=end, output=output)
        context.run(libnbd_python(context), "-c", reading)
        if output.read_bytes() != golden[start:end]:
            raise CheckFailedError(f"bytes {start} to {end} are not what they were")


@check("restic", "passwords", needs=("restic",))
def passwords(context: Context) -> None:
    """Any of several; a wrong one and none are one line each."""
    restic = Restic(context)
    restic.backup()
    second = context.directory / "second"
    second.write_text("another one\n")
    restic.run("key", "add", "--new-password-file", second)
    target = f"restic:{restic.path}"
    for variables in (SECRET, {"NBDSRV_PASSPHRASE": "another one"}):
        commands(context, target, variables).run("ls", target)
    for variables, saying, code in (
        ({"RESTIC_PASSWORD": "wrong"}, "opens none of its 2 keys", 1),
        ({"RESTIC_PASSWORD": ""}, "NBDSRV_PASSPHRASE", 2),
    ):
        commands(context, target, variables).refused("ls", target, saying=saying, code=code)
