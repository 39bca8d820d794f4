"""Versions of storages: listed, read, compared, with keys and without."""

import base64
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError, PointMissing, RepositoryError
from nbdsrv.export.grammar import parse_source
from nbdsrv.repository.opening import open_repository
from nbdsrv.repository.passphrase import passphrase_of
from nbdsrv.repository.repository import CHANGED_SINCE, Repository
from nbdsrv.repository.selector import select
from protocol.contexts import ALLOCATION
from protocol.extents import DATA, HOLE
from tests.cli.program import nbdsrv, refusal, serving
from tests.disk.check_disk import check_disk, extent_map
from tests.disk.reading import content
from tests.repository.benji.storage import BLOCK, DATE, Agreed, Storage, Wrapped
from tests.repository.virtnbdbackup.backups import random_disk

SIZE = 12 * BLOCK + 5 * 512
KEY = bytes(range(32))


async def opened(path: Path, workers: Workers, passphrase: str = "") -> Repository:
    environment = {"NBDSRV_PASSPHRASE": passphrase} if passphrase else {}
    source = parse_source(f"benji:{path}")
    return await open_repository(source, workers, lambda: passphrase_of(environment))


def config(path: Path, storage: Path, transform: str = "", hmac: str = "") -> Path:
    """A benji.yaml."""
    path.write_text(
        f"""configurationVersion: '1'
databaseEngine: sqlite:///nowhere
defaultStorage: store
storages:
  - name: other
    module: s3
    configuration: {{bucketName: no}}
  - name: store
    module: file
    configuration:
      path: {storage}
      activeTransforms: [zs, crypt]
      {hmac}
transforms:
  - name: zs
    module: zstd
    configuration: {{level: 1}}
  {transform}
"""
    )
    return path


def three_versions(made: Storage) -> dict[str, bytes]:
    disk = random_disk(SIZE, 2)
    disk[BLOCK : 3 * BLOCK] = bytes(2 * BLOCK)
    made.version("first", disk, snapshot="before update", protected=True)
    disk[2 * BLOCK + 100 : 2 * BLOCK + 110] = b"0123456789"
    made.version("pool/vm 1-abc123", disk)
    disk[0:BLOCK] = bytes(BLOCK)
    disk += b"longer" * BLOCK
    made.version("last", disk)
    return made.golden


@pytest.mark.parametrize("lists_sparse", [True, False])
@pytest.mark.parametrize("packed", [True, False])
async def test_every_version_is_what_the_disk_was(
    tmp_path: Path, workers: Workers, *, lists_sparse: bool, packed: bool
) -> None:
    made = Storage(tmp_path, lists_sparse=lists_sparse, packed=packed)
    golden = three_versions(made)
    repository = await opened(tmp_path, workers)
    points = await repository.points()
    assert [point.id for point in points] == list(golden)
    for point in points:
        disk = await repository.open_disk(point, "disk")
        assert await content(disk, 0, disk.size) == golden[point.id]
        await disk.close()
    await check_disk(
        lambda: repository.open_disk(points[1], "disk"),
        golden[points[1].id],
        extents_granularity=BLOCK,
    )
    await repository.close()


async def test_what_is_said_of_versions(tmp_path: Path, workers: Workers) -> None:
    three_versions(Storage(tmp_path))
    repository = await opened(tmp_path, workers)
    points = await repository.points()
    assert {point.group for point in points} == {"pool/vm 1"}
    assert [point.stamp for point in points] == [DATE.replace(".000000", "") % n for n in (1, 2, 3)]
    assert points[0].flags == ("protected",)
    assert points[0].facts["snapshot"] == "before update"
    assert points[0].facts["labels"] == {"tier": "gold"}
    for selector, id_ in {
        "@before update": "first",
        "pool/vm 1/disk@pool/vm 1-abc123": "pool/vm 1-abc123",
        "pool/vm 1@latest": "last",
        "": "last",
        "@la": "last",
    }.items():
        assert (await select(repository, selector)).point.id == id_
    with pytest.raises(PointMissing):
        await repository.open_disk(points[0], "vda")
    await repository.close()


async def test_holes_and_changes(tmp_path: Path, workers: Workers) -> None:
    golden = three_versions(Storage(tmp_path))
    repository = await opened(tmp_path, workers)
    first, second, last = await repository.points()
    disk = await repository.open_disk(second, "disk")
    states = await extent_map(disk, ALLOCATION)
    assert states[BLOCK : 2 * BLOCK] == bytes([HOLE]) * BLOCK
    assert states[2 * BLOCK : 2 * BLOCK + 9] == bytes([DATA]) * 9
    since = await extent_map(disk, CHANGED_SINCE + first.id)
    assert since == bytes(2 * BLOCK) + b"\1" * BLOCK + bytes(SIZE - 3 * BLOCK)
    await disk.close()
    disk = await repository.open_disk(last, "disk")
    since = await extent_map(disk, CHANGED_SINCE + second.id)
    for at, (a, b) in enumerate(zip(golden["last"], golden[second.id], strict=False)):
        assert since[at] or a == b, at
    assert since[:BLOCK] == b"\1" * BLOCK
    assert since[BLOCK : SIZE // BLOCK * BLOCK] == bytes(SIZE // BLOCK * BLOCK - BLOCK)
    assert since[SIZE:] == b"\1" * (disk.size - SIZE)
    assert disk.contexts[2:] == (CHANGED_SINCE + second.id, CHANGED_SINCE + first.id)
    await disk.close()
    await repository.close()


async def test_a_master_key(tmp_path: Path, workers: Workers) -> None:
    golden = three_versions(Storage(tmp_path, Wrapped(KEY)))
    with pytest.raises(ConfigError, match="NBDSRV_BENJI_CONFIG"):
        await opened(tmp_path, workers)
    with pytest.raises(ConfigError, match="no master key"):
        await opened(tmp_path, workers, "a password")
    with pytest.raises(RepositoryError, match="not the one it was encrypted with"):
        await opened(tmp_path, workers, base64.b64encode(KEY[::-1]).decode())
    repository = await opened(tmp_path, workers, base64.b64encode(KEY).decode())
    for point in await repository.points():
        disk = await repository.open_disk(point, "disk")
        assert await content(disk, 0, disk.size) == golden[point.id]
        await disk.close()
    await repository.close()


SALT = base64.b64encode(b"salt" * 8).decode()


@pytest.mark.parametrize("given", [True, False])
async def test_a_password_and_its_salt_and_the_hmac(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, *, given: bool
) -> None:
    storage, etc = tmp_path / "data", tmp_path / "etc"
    etc.mkdir()
    master = hashlib.pbkdf2_hmac("sha512", b"correct horse", b"salt" * 8, 1000, 32)
    sealed = hashlib.pbkdf2_hmac("sha512", b"hmac secret", b"salt" * 8, 1000, 32)
    golden = three_versions(Storage(storage, Wrapped(master), sealed))
    kdf = f"kdfSalt: '{SALT}', kdfIterations: 1000"
    password = "" if given else ", password: correct horse"
    file = config(
        etc / "benji.yaml",
        storage,
        f"- {{name: crypt, module: aes_256_gcm, configuration: {{{kdf}{password}}}}}",
        f"hmac: {{password: hmac secret, {kdf}}}",
    )
    secret = "correct horse" if given else ""
    for source in (etc, file, storage):
        if source is storage:
            monkeypatch.setenv("NBDSRV_BENJI_CONFIG", str(file))
        repository = await opened(source, workers, secret)
        point = (await repository.points())[-1]
        disk = await repository.open_disk(point, "disk")
        assert await content(disk, 0, disk.size) == golden[point.id]
        await disk.close()
        check = await repository.verify("chunks")
        assert check.findings == []
        assert not any("no HMAC key" in sentence for sentence in check.unchecked)
        await repository.close()
    for meta in storage.glob("versions/*/*/first.meta"):
        meta.write_text(meta.read_text().replace('"2.0.0"', '"2.0.1"'))
    repository = await opened(storage, workers, secret)
    damaged = [point for point in await repository.points() if "damaged" in point.flags]
    assert [point.id for point in damaged] == ["first"]
    assert "HMAC is wrong" in str(damaged[0].facts["reason"])
    await repository.close()
    config(file, storage, "", f"hmac: {{password: another, {kdf}}}")
    with pytest.raises(RepositoryError, match="HMAC is wrong"):
        await opened(storage, workers, secret)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
async def test_elliptic_curves(tmp_path: Path, workers: Workers, curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    made = Storage(tmp_path, Agreed(key))
    disk = random_disk(3 * BLOCK)
    made.version("v1", disk)
    repository = await opened(tmp_path, workers, _der(key))
    (point,) = await repository.points()
    opened_disk = await repository.open_disk(point, "disk")
    assert await content(opened_disk, 0, opened_disk.size) == bytes(disk)
    await opened_disk.close()
    await repository.close()
    with pytest.raises(RepositoryError, match="is the key the right one"):
        await opened(tmp_path, workers, _der(ec.generate_private_key(curve)))
    with pytest.raises(ConfigError, match="no private key"):
        await opened(tmp_path, workers, "AAAA")


def _der(key: ec.EllipticCurvePrivateKey) -> str:
    none = serialization.NoEncryption()
    der, pkcs = serialization.Encoding.DER, serialization.PrivateFormat.PKCS8
    return base64.b64encode(key.private_bytes(der, pkcs, none)).decode()


async def test_metadata_of_the_first_version(tmp_path: Path, workers: Workers) -> None:
    made = Storage(tmp_path, metadata="1.1.0")
    disk = random_disk(2 * BLOCK + 512, 5)
    made.version(
        "V0000000007",
        disk,
        uid=7,
        name="old volume",
        snapshot_name="snap",
        labels=[{"name": "a", "value": "b"}],
        date="2018-05-01T10:00:00",
    )
    repository = await opened(tmp_path, workers)
    (point,) = await repository.points()
    assert (point.group, point.id, point.stamp) == (
        "old volume",
        "V0000000007",
        "2018-05-01T10:00:00Z",
    )
    assert point.facts["labels"] == {"a": "b"}
    opened_disk = await repository.open_disk(point, "disk")
    assert await content(opened_disk, 0, opened_disk.size) == bytes(disk)
    await opened_disk.close()
    await repository.close()


async def test_versions_come_and_go(tmp_path: Path, workers: Workers) -> None:
    made = Storage(tmp_path)
    (tmp_path / "versions").mkdir(parents=True)
    repository = await opened(tmp_path, workers)
    assert await repository.points() == []
    path = made.version("one", random_disk(SIZE))
    made.version("two", random_disk(SIZE))
    one, two = await repository.points()
    disk = await repository.open_disk(one, "disk")
    path.unlink()
    assert await repository.points() == [two]
    assert await content(disk, 0, SIZE) == made.golden["one"]
    await disk.close()
    with pytest.raises(PointMissing):
        await repository.open_disk(one, "disk")
    await repository.close()
    await repository.close()
    with pytest.raises(DiskError):
        await repository.open_disk(two, "disk")


def test_on_the_command_line(tmp_path: Path) -> None:
    storage = tmp_path / "data"
    golden = three_versions(Storage(storage, Wrapped(KEY)))
    secret = {"NBDSRV_PASSPHRASE": base64.b64encode(KEY).decode()}
    rows = json.loads(nbdsrv("ls", f"benji:{storage}", "--json", env=secret).stdout)
    assert [row["point"] for row in rows] == list(golden)
    assert "no storage of Benji's" in refusal(1, "ls", f"benji:{tmp_path}")
    assert "NBDSRV_PASSPHRASE" in refusal(2, "ls", f"benji:{storage}")
    if shutil.which("nbdcopy") is None:
        pytest.skip("nbdcopy is not installed")
    with serving(f"benji:{storage}", "--listen", f"unix:{tmp_path / 's'}", env=secret):
        for uid, disk in golden.items():
            name = f"pool/vm%201/disk@{uid.replace(' ', '%20')}"
            uri = f"nbd+unix:///{name}?socket={tmp_path / 's'}"
            out = tmp_path / "out"
            subprocess.run(["nbdcopy", uri, out], check=True, timeout=60, capture_output=True)
            assert hashlib.sha256(out.read_bytes()).digest() == hashlib.sha256(disk).digest()
