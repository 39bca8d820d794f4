"""Repositories that borg made, served while it goes on using them."""

import os
import random
from pathlib import Path

from conformance.context import Context
from conformance.foreign import commands, listed, prove, read_only, state_of
from conformance.image import MIB
from conformance.registry import Part, check, expect, expect_in
from conformance.repository import SEED, SIZE, disk_of, rewrite

PASSPHRASE = "correct horse"
DISK = "vm one/disk.raw"
TAIL = 8 * MIB
"""Zeroes that are a piece of their own where pieces are all of a size."""
NEEDS = ("borg", "nbdcopy", "nbdinfo")


class Borg:
    """A repository with archives of one disk."""

    def __init__(self, context: Context, encryption: str = "none") -> None:
        self.context = context
        self.path = context.directory / "borg"
        self.files = context.directory / "files"
        self.disk = self.files / DISK
        self.disk.parent.mkdir(parents=True)
        self.source = random.Random(SEED)
        self.states: dict[str, Path] = {}
        self.environment = {
            "BORG_BASE_DIR": str(context.directory / "base"),
            "BORG_HOSTNAME_IS_UNIQUE": "yes",
            "BORG_REPO": str(self.path),
            "BORG_PASSPHRASE": PASSPHRASE,
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        self.host = ""
        self.run("init", "-e", encryption)
        disk_of(self.disk, SIZE, self.source)
        os.truncate(self.disk, SIZE + TAIL)

    def run(self, *words: str | Path) -> str:
        """Its output."""
        return self.context.run("borg", *words, environment=self.environment, timeout_s=120).stdout

    def create(self, *options: str) -> str:
        """The name of the new archive."""
        name = f"night-{len(self.states)}"
        self.run("create", *options, f"::{name}", self.files)
        self.host = self.host or self.run("list", "--format", "{hostname}", "--last", "1").strip()
        state = self.context.directory / f"{name}.img"
        state.write_bytes(self.disk.read_bytes())
        self.states[self.name(name)] = state
        return name

    def name(self, archive: str) -> str:
        """Of the export: borg keeps absolute paths, without the slash in front."""
        return f"{self.host}/{str(self.disk).lstrip('/')}@{archive}"

    def change(self) -> None:
        """Rewrite a part of the disk."""
        rewrite(self.disk, self.source)

    @property
    def ours(self) -> dict[str, str]:
        """What our commands need: where its keys are, and the passphrase."""
        return {
            "BORG_BASE_DIR": self.environment["BORG_BASE_DIR"],
            "NBDSRV_PASSPHRASE": PASSPHRASE,
        }


@check("borg", "archives", needs=NEEDS, part=Part.REPOSITORY)
def archives(_: Context) -> None:
    """Encryptions, chunkers, compressions: listed, bit for bit; nothing written, nothing asked."""
    for encryption, packing in (
        ("none", ("-C", "lz4", "--chunker-params", "fixed,1048576")),
        ("repokey", ("-C", "zstd,3", "--chunker-params", "fixed,4194304")),
        ("keyfile-blake2", ("-C", "none")),
        ("authenticated", ("-C", "zlib", "--chunker-params", "buzhash,15,21,18,4095")),
    ):
        with Context() as inner:
            borg = Borg(inner, encryption)
            for number in range(2):
                if number:
                    borg.change()
                borg.create(*packing)
            before = state_of(inner.directory / "base"), state_of(borg.path)
            server = inner.serve(source=f"borg:{borg.path}", environment=borg.ours)
            latest = borg.name("latest")
            expect(sorted([*borg.states, latest]), listed(inner, server), "exports")
            newest = list(borg.states.values())[-1]
            fixed = "fixed" in " ".join(packing)
            prove(inner, server, {**borg.states, latest: newest}, holes=fixed)
            server.stop()
            after = state_of(inner.directory / "base"), state_of(borg.path)
            expect(before, after, "files of the repository, and of borg's own directories")
            borg.run("check", "--verify-data")


@check("borg", "compaction meanwhile", needs=NEEDS, part=Part.REPOSITORY)
def compaction(context: Context) -> None:
    """Archives come, go, and segments are compacted under a server; a lock stops nobody."""
    borg = Borg(context)
    first = borg.create()
    for _ in range(2):
        borg.change()
        borg.create()
    server = context.serve(source=f"borg:{borg.path}", environment=borg.ours)
    prove(context, server, borg.states, holes=False)
    borg.run("delete", f"::{first}")
    borg.run("compact", "--threshold", "0")
    del borg.states[borg.name(first)]
    borg.change()
    borg.states[borg.name("extra")] = context.directory / "extra.img"
    borg.states[borg.name("extra")].write_bytes(borg.disk.read_bytes())
    borg.run("create", "::extra", borg.files)
    prove(context, server, borg.states, holes=False)


@check("borg", "read-only mount", needs=(*NEEDS, "mount", "umount"), part=Part.REPOSITORY)
def mounted_read_only(context: Context) -> None:
    """As it is on an immutable medium; also without its index."""
    borg = Borg(context, "repokey")
    borg.create()
    place = read_only(context, borg.path)
    for number in range(2):
        if number:
            next(borg.path.glob("index.*")).unlink()
        server = context.serve(source=f"borg:{place}", environment=borg.ours)
        prove(context, server, borg.states, holes=False)
        server.stop()


@check("borg", "damage", needs=NEEDS)
def damage(context: Context) -> None:
    """A flipped byte in a segment: verify says which disk and range."""
    borg = Borg(context)
    borg.create("-C", "none", "--chunker-params", "fixed,1048576")
    segment = max((borg.path / "data" / "0").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(segment.read_bytes())
    golden = borg.disk.read_bytes()
    data[data.index(golden[:64]) + 5] ^= 0x40
    segment.write_bytes(data)
    ours = commands(context, f"borg:{borg.path}", borg.ours)
    for level in ("packs", "chunks"):
        done = ours.run("verify", ours.target, "--level", level, code=3)
        expect_in("hurts", done.stdout, "what verify says")
        expect_in("1048576 at 0", done.stdout, "the range that verify names")
    server = context.serve(source=ours.target, environment=borg.ours)
    refused = context.run("nbdcopy", server.uri(borg.name("night-0")), "null:", code=None)
    expect(1, refused.code, "nbdcopy's exit code")


@check("borg", "passphrases", needs=("borg",))
def passphrases(context: Context) -> None:
    """A wrong one, none, and no key file are one line each, at once."""
    borg = Borg(context, "repokey")
    target = f"borg:{borg.path}"
    commands(context, target, borg.ours).run("ls", target)
    wrong = {**borg.ours, "NBDSRV_PASSPHRASE": "wrong"}
    commands(context, target, wrong).refused("ls", target, saying="does not open it")
    none = {**borg.ours, "NBDSRV_PASSPHRASE": ""}
    commands(context, target, none).refused("ls", target, saying="NBDSRV_PASSPHRASE", code=2)
