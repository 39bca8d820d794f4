"""Formats are told apart on images made by the real tools."""

import gzip
import lzma
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.export.grammar import parse_source
from nbdsrv.export.opener import open_source
from nbdsrv.formats.probe import probe
from tests.disk.reading import content

QEMU_FORMATS = [
    ("qcow2", "qcow2", ()),
    ("qcow2", "qcow2", ("compat=0.10",)),
    ("qcow", "qcow", ()),
    ("vpc", "vhd", ("subformat=dynamic",)),
    ("vpc", "vhd", ("subformat=fixed",)),
    ("vhdx", "vhdx", ()),
    ("vmdk", "vmdk", ("subformat=monolithicSparse",)),
    ("vmdk", "vmdk", ("subformat=monolithicFlat",)),
    ("vmdk", "vmdk", ("subformat=twoGbMaxExtentSparse",)),
    ("vmdk", "vmdk", ("subformat=streamOptimized",)),
    ("vdi", "vdi", ()),
    ("parallels", "parallels", ()),
    ("qed", "qed", ()),
]


def qemu_img(*arguments: str) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    subprocess.run(["qemu-img", *arguments], capture_output=True, timeout=60, check=True)


@pytest.mark.parametrize(("made_as", "found_as", "options"), QEMU_FORMATS)
def test_images_made_by_qemu(
    tmp_path: Path, made_as: str, found_as: str, options: tuple[str, ...]
) -> None:
    path = str(tmp_path / "image")
    given = ["-o", ",".join(options)] if options else []
    qemu_img("create", "-f", made_as, *given, path, "4M")
    assert probe(path) == found_as


def test_luks_made_by_qemu(tmp_path: Path) -> None:
    path = str(tmp_path / "image")
    secret = ["--object", "secret,id=s,data=abc"]
    for _ in range(5):
        try:
            qemu_img("create", "-f", "luks", *secret, "-o", "key-secret=s,iter-time=10", path, "1M")
            break
        except subprocess.CalledProcessError as error:
            # qemu measures how fast it hashes, and gives up where the machine is busy.
            if b"accurate CPU usage" not in error.stderr:
                raise
    else:
        pytest.skip("qemu-img cannot measure this machine")
    assert probe(path) == "luks"


def test_compressed_files(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(gzip.compress(bytes(5000)))
    assert probe(str(path)) == "gzip"
    path.write_bytes(lzma.compress(bytes(5000)))
    assert probe(str(path)) == "xz"


def test_zstd(tmp_path: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    (tmp_path / "disk").write_bytes(bytes(5000))
    subprocess.run(["zstd", "-q", str(tmp_path / "disk")], timeout=60, check=True)
    assert probe(str(tmp_path / "disk.zst")) == "zstd"


@pytest.mark.parametrize("size", [0, 1, 3, 4, 7, 8, 67, 68, 511, 512, 513, 1 << 20])
def test_anything_else_is_raw(tmp_path: Path, size: int) -> None:
    path = tmp_path / "image"
    for seed in range(20):
        path.write_bytes(random.Random(seed).randbytes(size))
        assert probe(str(path)) == "raw"
    path.write_bytes(bytes(size))
    assert probe(str(path)) == "raw"


def test_a_partitioned_disk_and_a_file_system_are_raw(tmp_path: Path) -> None:
    path = tmp_path / "image"
    mbr = bytearray(1 << 20)
    mbr[510:512] = b"\x55\xaa"
    path.write_bytes(mbr)
    assert probe(str(path)) == "raw"


def test_a_magic_that_is_cut_short_or_elsewhere_is_raw(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for start in (b"QFI", b"conecti", b"vhdxfil", bytes(512) + b"QFI\xfb", b" KDMV"):
        path.write_bytes(start)
        assert probe(str(path)) == "raw"


def test_an_ancient_vhd_footer_of_511_bytes_is_found(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(5 * 512) + b"conectix" + bytes(503))
    assert probe(str(path)) == "vhd"


async def test_raw_overrides_what_the_content_says(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "guest.img"
    qemu_img("create", "-f", "qcow2", str(path), "4M")
    disk = await open_source(parse_source(str(path)), workers)
    assert (disk.format, disk.size) == ("qcow2", 4 << 20)
    await disk.close()
    disk = await open_source(parse_source(f"raw:{path}"), workers)
    assert disk.format == "raw"
    assert await content(disk, 0, disk.size) == path.read_bytes()
    await disk.close()


async def test_a_guest_cannot_turn_its_disk_into_another_image_behind_raw(
    tmp_path: Path, workers: Workers
) -> None:
    """The header of a qcow2 with a backing file, written by a guest into its raw disk."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"host secret" + bytes(501))
    path = tmp_path / "guest.img"
    qemu_img("create", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(path))
    disk = await open_source(parse_source(f"raw:{path}"), workers)
    assert b"host secret" not in await content(disk, 0, disk.size)
    await disk.close()


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="No such file"):
        probe(str(tmp_path / "nothing"))
    before = os.listdir("/proc/self/fd")
    os.mkfifo(tmp_path / "fifo")
    assert probe(str(tmp_path / "fifo")) == "raw"  # opening it says what it is
    assert probe(str(tmp_path)) == "raw"
    assert os.listdir("/proc/self/fd") == before
