"""Writable qcow2 images keep the Disk contract, whatever they begin as, and QEMU finds no fault.

::

    qemu-img makes it ──> check_disk changes it ──> qemu-img check, qemu-img compare
"""

from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.formats.opening import Opening, open_image
from tests.disk.check_disk import CONTRACT, Check
from tests.formats.images import Image
from tests.formats.qcow2.checked import check
from tests.formats.qcow2.peer import qemu_img
from tests.formats.qcow2.texts import compressed

SIZE = (3 << 20) + 1536
DATA = Image("written", SIZE, ((0, 300_000), (1 << 20, 65536), (SIZE - 5000, 5000)))
BELOW = Image("below", SIZE - 700_672, ((100_000, 400_000), (2 << 20, 5000)))


def raw(path: Path, image: Image) -> bytes:
    return image.make(str(path))


def empty(directory: Path, *options: str) -> bytes:
    qemu_img("create", "-f", "qcow2", *options, directory / "disk.qcow2", SIZE)
    return bytes(SIZE)


def full(directory: Path, *options: str) -> bytes:
    golden = raw(directory / "disk.raw", DATA)
    qemu_img("convert", "-O", "qcow2", *options, directory / "disk.raw", directory / "disk.qcow2")
    return golden


def text(directory: Path, *options: str) -> bytes:
    return compressed(directory, DATA, *options)[1]


def chain(directory: Path, *options: str) -> bytes:
    golden = raw(directory / "base.raw", BELOW)
    base = ("-b", "base.raw", "-F", "raw")
    qemu_img("create", "-f", "qcow2", *options, *base, directory / "disk.qcow2", SIZE)
    return golden.ljust(SIZE, b"\0")


def snapshotted(directory: Path, *options: str) -> bytes:
    golden = text(directory, *options[1:]) if "-c" in options else full(directory, *options)
    qemu_img("snapshot", "-c", "before", directory / "disk.qcow2")
    return golden


KINDS = {
    "empty": (empty,),
    "version 2": (full, "-o", "compat=0.10"),
    "small clusters": (full, "-o", "cluster_size=512"),
    "large clusters": (empty, "-o", "cluster_size=2M"),
    "preallocated": (empty, "-o", "preallocation=metadata"),
    "zlib": (text,),
    "zstd": (text, "-o", "compression_type=zstd"),
    "chain": (chain,),
    "chain of version 2": (chain, "-o", "compat=0.10"),
    "snapshot": (snapshotted,),
    "compressed snapshot": (snapshotted, "-c", "-o", "cluster_size=4096"),
    "refcounts of 1 bit": (full, "-o", "refcount_bits=1"),
    "refcounts of 64 bits": (full, "-o", "refcount_bits=64,cluster_size=4096"),
    "lazy refcounts": (full, "-o", "lazy_refcounts=on"),
}


@pytest.mark.parametrize("part", CONTRACT, ids=lambda part: part.__name__)
@pytest.mark.parametrize("kind", KINDS)
async def test_contract(kind: str, part: Check, tmp_path: Path, workers: Workers) -> None:
    make, *options = KINDS[kind]
    golden = make(tmp_path, *options)  # type: ignore[operator]
    path = str(tmp_path / "disk.qcow2")

    async def opened() -> Disk:
        return await open_image(path, "qcow2", Opening(workers, writable=True))

    await part(opened, golden)
    check(path)
