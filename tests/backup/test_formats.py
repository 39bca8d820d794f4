"""Every format that can be read goes through a repository and back, bit for bit."""

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdsrv.backup.engine import Backup, Order, SourceDisk
from nbdsrv.backup.patch import Patch, changed_since
from nbdsrv.copying.engine import Copy
from nbdsrv.copying.in_place import DiskWriter
from nbdsrv.copying.target import parse_target
from nbdsrv.copying.writers import Making, image_writer
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import PointMissing
from nbdsrv.export.grammar import parse_source
from nbdsrv.export.opener import open_source
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.repository.native.config import RepositoryConfig
from nbdsrv.repository.native.destination import NativeDestination
from nbdsrv.repository.native.repository import NativeRepository
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.directory import DirectoryStore
from tests.repository.native.read_back import KIB, MIB, listed, read_back

QEMU_IMG = shutil.which("qemu-img")
needs_qemu = pytest.mark.skipif(
    QEMU_IMG is None and not os.environ.get("CI"), reason="qemu-img makes the images"
)
OPTIONS = {
    "raw": (),
    "qcow2": ("-o", "cluster_size=4k"),
    "vmdk": (),
    "vpc": ("-o", "force_size=on"),
    "vhdx": (),
    "vdi": (),
}
SIZE = 24 * MIB


def make_raw(path: Path) -> bytes:
    dice = random.Random("formats")
    content = bytearray(SIZE)
    for at, length in ((0, 5000), (3 * MIB, 2 * MIB), (11 * MIB + 512, 70_000), (SIZE - 9, 9)):
        content[at : at + length] = dice.randbytes(length)
    path.write_bytes(content)
    return bytes(content)


async def stored(vault: Vault, workers: Workers, text: str) -> None:
    @asynccontextmanager
    async def opened(_: Sequence[str]) -> AsyncIterator[Disk]:
        disk = await open_source(parse_source(text), workers)
        try:
            yield disk
        finally:
            await disk.close()

    await Backup([NativeDestination(vault)], workers, Order("vm")).run([SourceDisk("disk", opened)])


def directory_vault(path: Path) -> Vault:
    config = RepositoryConfig(chunk_size=64 * KIB, page_slots=64, pack_target=MIB)
    return Vault.create(DirectoryStore(str(path)), config, lambda: "")


@needs_qemu
@pytest.mark.parametrize("format_", OPTIONS)
async def test_every_format_comes_back(tmp_path: Path, workers: Workers, format_: str) -> None:
    raw, image = tmp_path / "disk.raw", tmp_path / f"disk.{format_}"
    content = make_raw(raw)
    if format_ == "raw":
        image = raw
    else:
        command = ["convert", "-O", format_, *OPTIONS[format_], str(raw), str(image)]
        subprocess.run([str(QEMU_IMG), *command], check=True, capture_output=True)
    vault = directory_vault(tmp_path / "repository")
    await stored(vault, workers, str(image))
    (record,) = listed(vault)
    assert read_back(vault, record) == content
    repository = NativeRepository(vault, workers)
    (point,) = await repository.points()
    source = await repository.open_disk(point, "disk")
    for target in ("raw", "qcow2", "vhd", "vmdk"):
        path = tmp_path / f"back.{target}"
        writer = image_writer(parse_target(f"{target}:{path}"), Making(), workers, None)
        await Copy(source, writer, workers).run()
        back = await open_image(str(path), target, Opening(workers))
        got = bytearray(back.size)
        await back.read_into(0, memoryview(got))
        await back.close()
        assert hashlib.sha256(got[:SIZE]).digest() == hashlib.sha256(content).digest()
        assert not any(got[SIZE:])
    await source.close()
    await repository.close()


async def test_only_what_differs_from_a_point_is_restored(tmp_path: Path, workers: Workers) -> None:
    raw, target = tmp_path / "disk.raw", tmp_path / "target.raw"
    first = make_raw(raw)
    vault = directory_vault(tmp_path / "repository")
    await stored(vault, workers, str(raw))
    with raw.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(bytes(2 * MIB))  # zeroes where there was something
        file.seek(20 * MIB)
        file.write(b"new" * 1000)
    await stored(vault, workers, str(raw))
    repository = NativeRepository(vault, workers)
    old, new = await repository.points()
    source = await repository.open_disk(new, "disk")
    target.write_bytes(first)
    disk = await open_image(str(target), "raw", Opening(workers, writable=True))
    context = changed_since(source, old.id[:20])
    outcome = await Patch(source, context, DiskWriter(disk), workers).run()
    await disk.close()
    assert target.read_bytes() == raw.read_bytes()
    assert (outcome.written, outcome.zero) == (64 * KIB, 2 * MIB)
    with pytest.raises(PointMissing, match="no other point"):
        changed_since(source, "7ZZ")
    await source.close()
    await repository.close()
