"""Points of mode full: plain, packed, encrypted, in a bucket; and their damage."""

import gzip
import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

import pytest
import xxhash
import zstandard

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage
from nbdsrv.overlay.description import Description, identity_of
from nbdsrv.store.directory_tree import DirectoryTree
from nbdsrv.store.store import StoreError
from tests.disk.check_disk import check_disk
from tests.repository.xo.made import Layer, Made
from tests.repository.xo.opened import contents, opened, opener

A = "20260201T000000Z"
MIB = 1 << 20


def content(seed: int, size: int) -> bytes:
    chance = random.Random(seed)
    pieces = [chance.randbytes(1000) * 1049, bytes(MIB)]
    return b"".join(chance.choice(pieces)[:MIB] for _ in range(size // MIB + 1))[:size]


DISKS = {"Ref:2": ("root", content(1, 3 * MIB)), "Ref:4": ("data", content(2, 2 * MIB))}


def ova() -> bytes:
    def value(text: object) -> str:
        return f"<value>{text}</value>"

    def struct(**fields: object) -> str:
        rows = "".join(
            f"<member><name>{name}</name>{value(field)}</member>" for name, field in fields.items()
        )
        return f"<struct>{rows}</struct>"

    vdis = [
        struct(
            **{"class": "VDI", "id": ref},
            snapshot=struct(
                uuid=f"{ref[-1] * 8}-0000-4000-8000-000000000000",
                name_label=name,
                virtual_size=len(data),
            ),
        )
        for ref, (name, data) in DISKS.items()
    ]
    vm = struct(**{"class": "VM", "id": "Ref:0"}, snapshot=struct(name_label="web"))
    objects = "".join(value(each) for each in [vm, *vdis])
    array = f"<array><data>{objects}</data></array>"
    version = struct(product_brand="XCP-ng", product_version="8.3")
    return f"<?xml version='1.0'?>{value(struct(version=version, objects=array))}".encode()


def archive(kind: str = "xxhash") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        add("ova.xml", ova())
        for ref, (_, data) in DISKS.items():
            for number in range(0, len(data), MIB):
                chunk = data[number : number + MIB]
                last = number + MIB >= len(data)
                if any(chunk) or not number or last:
                    add(f"{ref}/{number // MIB:08}", chunk)
                    digest = xxhash.xxh64_hexdigest(chunk).upper()
                    if kind == "checksum":
                        digest = hashlib.sha1(chunk, usedforsecurity=False).hexdigest()
                    add(f"{ref}/{number // MIB:08}.{kind}", digest.encode())
    return out.getvalue()


def made(root: Path, data: bytes, algorithm: str = "none", *, summed: bool = True) -> Made:
    repository = Made(root, algorithm)
    sealed = repository.encoder.seal(data)
    repository.file(f"{repository.vm()}/{A}.xva", sealed)
    if summed:
        digest = hashlib.md5(sealed, usedforsecurity=False).hexdigest()
        repository.file(f"{repository.vm()}/{A}.xva.checksum", f"$1$${digest}".encode())
    said = {"mode": "full", "xva": f"./{A}.xva", "vm": {"uuid": "x", "name_label": "web"}}
    repository.file(
        f"{repository.vm()}/{A}.json", repository.encoder.seal(json.dumps(said).encode())
    )
    return repository


PACKED = {"none": bytes, "gzip": gzip.compress, "zstd": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("algorithm", ["none", "chacha20-poly1305", "aes-256-gcm"])
@pytest.mark.parametrize("packing", PACKED)
async def test_every_kind_is_listed_read_and_verified(
    tmp_path: Path, packing: str, algorithm: str, workers: Workers
) -> None:
    repository = made(tmp_path / "xo", PACKED[packing](archive()), algorithm)
    async with opened(repository.root, workers) as found:
        (point,) = await found.points()
        assert [(disk.name, disk.size) for disk in point.disks] == [
            (name, len(data)) for name, data in DISKS.values()
        ]
        assert point.facts["compression"] == packing
        for name, data in DISKS.values():
            assert await contents(found, f"web/{name}") == data
        assert (
            await contents(found, "web/44444444-0000-4000-8000-000000000000") == DISKS["Ref:4"][1]
        )
        for level in ("structure", "packs", "chunks"):
            done = await found.verify(level)
            assert (done.findings, done.unread) == ([], [])
        assert done.unchecked == []


@pytest.mark.parametrize("packing", PACKED)
async def test_an_overlay_knows_which_point_it_is_over(
    tmp_path: Path, packing: str, workers: Workers
) -> None:
    """It knew the file alone, took the next backup for ``latest``, and refused that."""
    repository = made(tmp_path / "xo", PACKED[packing](archive()))
    async with opened(repository.root, workers) as found:
        (point,) = await found.points()
        disk = await found.open_disk(point, "data")
        identity = identity_of(disk)
        await disk.close()
    described = Description(
        format=1, id="0" * 32, export="", source="", size=disk.size, created=0.0, base=identity
    )
    assert described.selector == f"web/data@{A}"


async def test_the_contract(tmp_path: Path, workers: Workers) -> None:
    repository = made(tmp_path / "xo", archive(), "aes-256-gcm")
    async with opened(repository.root, workers) as found:
        (point,) = await found.points()
        await check_disk(opener(found, point, "data"), DISKS["Ref:4"][1])


@pytest.mark.parametrize("algorithm", ["chacha20-poly1305", "aes-256-gcm"])
async def test_of_a_changed_encrypted_one_not_a_byte_is_served(
    tmp_path: Path, algorithm: str, workers: Workers
) -> None:
    repository = made(tmp_path / "xo", archive(), algorithm)
    path = repository.root / repository.vm() / f"{A}.xva"
    raw = bytearray(path.read_bytes())
    raw[-2000] ^= 1
    path.write_bytes(raw)
    async with opened(repository.root, workers) as found:
        (point,) = await found.points()
        with pytest.raises(CorruptImage, match="does not decrypt"):
            await found.open_disk(point, "root")
        (finding,) = (await found.verify("chunks")).findings
        assert [hurt.disk for hurt in finding.hurts] == ["root", "data"]


@pytest.mark.parametrize("kind", ["xxhash", "checksum"])
async def test_damage_that_verify_sees(tmp_path: Path, kind: str, workers: Workers) -> None:
    data = bytearray(archive(kind))
    data[data.index(b"Ref:2/00000000.") - MIB // 2] ^= 1
    repository = made(tmp_path / "xo", bytes(data))
    async with opened(repository.root, workers) as found:
        assert (await found.verify("packs")).findings == []  # the MD5 is of what is there
        (finding,) = (await found.verify("chunks")).findings
        assert "Ref:2/00000000 is not" in finding.text
        path = repository.root / repository.vm() / f"{A}.xva"
        raw = bytearray(path.read_bytes())
        raw[-5000] ^= 1
        path.write_bytes(raw)
        (finding,) = (await found.verify("packs")).findings
        assert "its MD5 is" in finding.text


async def test_cut_short_or_gone(tmp_path: Path, workers: Workers) -> None:
    repository = made(tmp_path / "xo", archive())
    path = repository.root / repository.vm() / f"{A}.xva"
    whole = path.read_bytes()
    async with opened(repository.root, workers) as found:
        for size, listed in ((4 * MIB, True), (100, False), (0, False)):
            path.write_bytes(whole[:size])
            (point,) = await found.points()
            assert bool(point.disks) == listed
            assert point.flags == (() if listed else ("damaged",))
            assert len((await found.verify("structure")).findings) == 1
            with pytest.raises(CorruptImage):
                await found.open_disk(point, "root")
        path.unlink()
        (point,) = await found.points()
        assert "is missing" in str(point.facts["reason"])


async def test_one_that_cannot_be_read_hides_no_other(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither sound nor damaged for good: the next listing tries again."""
    repository = made(tmp_path / "xo", archive())
    repository.point("20260202T000000Z", [Layer("20260202T000000Z", MIB)])
    read = DirectoryTree.read_range

    def bad_sector(tree: DirectoryTree, path: str, offset: int, length: int) -> bytes:
        if path.endswith(".xva"):
            raise StoreError(f"{path}: Input/output error")
        return read(tree, path, offset, length)

    async with opened(repository.root, workers) as found:
        with monkeypatch.context() as patched:
            patched.setattr(DirectoryTree, "read_range", bad_sector)
            points = await found.points()
            assert [("damaged",), ()] == [point.flags for point in points]
            assert bytes(MIB) == await contents(found, "web@20260202T000000Z")
            done = await found.verify("structure")
            assert ([], 1) == (done.findings, len(done.unread))
        assert [(), ()] == [point.flags for point in await found.points()]
