"""Storages the real Benji wrote, served to everybody's clients.

::

    disk ── benji backup x 3 ──> storage (zstd, AES, ECC) ── serve ──> nbdcopy ──> SHA-256

Benji is installed from the package index, once, into the cache the benchmark uses.
"""

import base64
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from conformance.benchmark.report import BenchmarkError
from conformance.benchmark.repository.benji_setup import benji_command
from conformance.context import Context
from conformance.image import MIB, file_digest
from conformance.outcome import MissingPeerError
from conformance.registry import Part, check, expect, expect_in
from conformance.repository import Repository, disk_of, rewrite

SIZE = 21 * MIB + 5 * 512
VOLUME = "pool/vm-1"
SALT = base64.b64encode(b"conformance salt").decode()
PASSWORD = "correct horse battery"  # not a secret
KDF = {"kdfSalt": SALT, "kdfIterations": 1000}
NEEDS = ("nbdcopy", "nbdinfo")


class World:
    """A storage, and what the disk was at each version.

    Attributes:
        configuration: the path of benji.yaml.
        storage: the directory.
        digests: by version.
    """

    def __init__(
        self,
        context: Context,
        transforms: Mapping[str, tuple[str, Mapping[str, object]]],
        hmac: Mapping[str, object] | None = None,
    ) -> None:
        self._context = context
        try:
            self._command = benji_command(_cache())
        except BenchmarkError as error:
            raise MissingPeerError(f"Benji cannot be installed: {error}") from error
        self.storage = context.directory / "data"
        self.storage.mkdir()
        self.configuration = context.directory / "benji.yaml"
        said = {
            "configurationVersion": "1",
            "databaseEngine": f"sqlite:///{context.directory}/benji.sqlite",
            "defaultStorage": "store",
            "storages": [
                {
                    "name": "store",
                    "storageId": 1,
                    "module": "file",
                    "configuration": {
                        "path": str(self.storage),
                        "activeTransforms": list(transforms),
                        **({"hmac": hmac} if hmac else {}),
                    },
                }
            ],
            "transforms": [
                {"name": name, "module": module, "configuration": settings}
                for name, (module, settings) in transforms.items()
            ],
            "ios": [{"name": "file", "module": "file"}],
        }
        self.configuration.write_text(json.dumps(said))  # JSON is YAML
        self._benji("database-init")
        self.digests: dict[str, str] = {}
        source = random.Random(9)
        disk = context.directory / "disk.raw"
        digest = disk_of(disk, SIZE, source)
        for uid in ("first", "second", "third"):
            self._benji("backup", "-u", uid, "-s", f"snap-{uid}", f"file:{disk}", VOLUME)
            self.digests[uid] = digest
            digest = rewrite(disk, source)

    def _benji(self, *words: str) -> None:
        options = ("-c", str(self.configuration), "--log-level", "ERROR")
        self._context.run(*self._command, *options, *words, timeout_s=120)

    def repository(self, target: Path, **environment: str) -> Repository:
        """Ours, of the storage or of the configuration."""
        return Repository(self._context, f"benji:{target}", environment, group=VOLUME)


def _cache() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(base, "nbdsrv", "benchmark")
    os.makedirs(path, exist_ok=True)
    return path


def _prove(context: Context, world: World, repository: Repository) -> None:
    server = repository.serve()
    listed = context.run("nbdinfo", "--list", server.uri()).stdout
    for uid, digest in world.digests.items():
        export = f"{VOLUME}/disk@{uid}"
        expect_in(export, listed, "what nbdinfo lists")
        context.run("nbdcopy", server.uri(export), "out.raw")
        expect(digest, file_digest(context.directory / "out.raw"), f"sha256 of {export}")
    since = "nbdsrv:changed-since:first"
    told = repository.run("map", f"{repository.target}#@second", "--json", "--context", since)
    changed = sum(row["length"] for row in json.loads(told.stdout) if row["type"])
    expect(True, 0 < changed < SIZE, f"{changed} bytes have changed, some and not all")
    repository.run("verify", repository.target, "--level", "chunks")
    server.stop()


@check("Benji", "versions", needs=NEEDS, part=Part.REPOSITORY)
def versions(context: Context) -> None:
    """Three versions of a volume, by name, bit for bit; by the storage and the configuration."""
    world = World(context, {"zs": ("zstd", {"level": 1})})
    _prove(context, world, world.repository(world.storage))
    _prove(context, world, world.repository(world.configuration))
    repository = world.repository(world.storage)
    repository.run("info", f"{repository.target}#@snap-second")


@check("Benji", "encrypted", needs=NEEDS, part=Part.REPOSITORY)
def encrypted(context: Context) -> None:
    """AES by a password, metadata by HMAC; a wrong password is one line."""
    settings: Mapping[str, object] = {**KDF, "password": PASSWORD}
    packed: Mapping[str, object] = {"level": 3}
    transforms = {"zs": ("zstd", packed), "crypt": ("aes_256_gcm", settings)}
    world = World(context, transforms, {**KDF, "password": "for the metadata"})
    _prove(context, world, world.repository(world.configuration))
    named = {"NBDSRV_BENJI_CONFIG": str(world.configuration)}
    _prove(context, world, world.repository(world.storage, **named))
    wrong = world.repository(world.storage, NBDSRV_PASSPHRASE="another password", **named)
    wrong.refused("ls", wrong.target, saying="not the one it was encrypted with")
    without = world.repository(world.storage)
    without.refused("ls", without.target, saying="NBDSRV_BENJI_CONFIG", code=2)


@check("Benji", "encrypted by ECC", needs=NEEDS, part=Part.REPOSITORY)
def by_ecc(context: Context) -> None:
    """AES by an elliptic curve's key: P-384, Benji's default."""
    key = ec.generate_private_key(ec.SECP384R1())
    der = key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    settings = {"eccKey": base64.b64encode(der).decode()}
    world = World(context, {"ecc": ("aes_256_gcm_ecc", settings)})
    _prove(context, world, world.repository(world.configuration))
    secret = {"NBDSRV_PASSPHRASE": settings["eccKey"]}
    _prove(context, world, world.repository(world.storage, **secret))


@check("Benji", "damage", needs=NEEDS, part=Part.REPOSITORY)
def damage(context: Context) -> None:
    """A broken block is an error where it is, everything else is served; verify names it."""
    world = World(context, {"zs": ("zstd", {"level": 1})})
    block = max((world.storage / "blocks").rglob("*-*"), key=lambda path: path.stat().st_size)
    data = bytearray(block.read_bytes())
    data[len(data) // 2] ^= 8
    block.write_bytes(data)
    repository = world.repository(world.storage)
    said = repository.run("verify", repository.target, "--level", "chunks", code=3)
    expect_in(block.name, said.stdout, "what verify says")
    server = repository.serve()
    codes = [
        context.run("nbdcopy", server.uri(f"{VOLUME}/disk@{uid}"), "null:", code=None).code
        for uid in world.digests
    ]
    expect(True, 1 in codes, f"exit codes of nbdcopy: {codes}")
