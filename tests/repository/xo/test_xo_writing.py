"""What backups put into Xen Orchestra repositories, read back by a reader of its own."""

import json
import shutil
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest

from nbdsrv.backup.engine import Order
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError, RepositoryError, UnsupportedImage
from nbdsrv.repository.destination import Occasion
from nbdsrv.repository.xo.checksums import ChecksumFile
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.repository.xo.sealing import AES, CHACHA, OPEN
from nbdsrv.repository.xo.writer_points import XoDisk
from nbdsrv.repository.xo.writer_vhd import footer_of
from tests.backup.tracked import BITMAP, Guest, back_up
from tests.repository.native.read_back import fresh_vault, listed, noise, read_back
from tests.repository.xo.independent import Decoder, all_points
from tests.repository.xo.written import KEY, MIB, changes_since, files, latest, make_remote, opened

SIZE = 9 * MIB + 1536  # the last block is short
QEMU_IMG = shutil.which("qemu-img")


def guest_of(size: int = SIZE) -> Guest:
    """Data, zeroes, data."""
    guest = Guest(bytearray(size))
    guest.write(0, noise(3 * MIB))
    guest.write(size - 700, noise(700))
    guest.holes = [(4 * MIB, 2 * MIB)]
    guest.backed_up()
    return guest


@pytest.mark.parametrize("algorithm", [OPEN, CHACHA, AES])
@pytest.mark.parametrize(
    ("layout", "packing"),
    [("", ""), ("vhd-directory", "gzip"), ("vhd-directory", "none"), ("vhd", "")],
)
async def test_full_and_deltas_in_every_layout(
    tmp_path: Path, workers: Workers, algorithm: str, layout: str, packing: str
) -> None:
    root = make_remote(tmp_path / "r", algorithm)
    if layout == "vhd" and algorithm != OPEN:
        with pytest.raises(ConfigError, match="cannot be"):
            opened(root, layout, packing)
        return
    guest, was = guest_of(), []
    for number in range(4):
        if number:
            guest.write(2 * MIB + 4096 * number, noise(4096))  # a small part of a block
            guest.write(SIZE - 100, noise(100))
            if number == 2:
                guest.discard(0, 2 * MIB)  # zero is data
        target = opened(root, layout, packing)
        order = changes_since(root, BITMAP) if number else Order("vm")
        (disk,) = (await back_up(workers, target, guest, order)).disks
        target.close()
        guest.backed_up()
        assert disk.mode == ("incremental" if number else "full")
        was.append(bytes(guest.content))
    found = all_points(root, KEY)
    assert [each["disk"] for each in found.values()] == was
    metadata = Decoder(root, KEY).points()
    assert [[*each["isVhdDifferencing"].values()] for each in metadata.values()] == [
        [False],
        [True],
        [True],
        [True],
    ]
    blocks = [name for name in files(root) if "/blocks/0/" in name]
    if layout != "vhd":  # 2 with data and the last; then 2 each, and the one of zeroes
        assert len(blocks) == 3 + 2 + 3 + 2
    assert not [name for name in files(root) if ".tmp" in name or ".lock" in name]


async def test_what_is_as_in_the_parent_is_not_stored(tmp_path: Path, workers: Workers) -> None:
    root = make_remote(tmp_path / "r")
    target = opened(root)
    guest = guest_of()
    await back_up(workers, target, guest)
    (disk,) = (await back_up(workers, target, guest)).disks
    assert (disk.mode, disk.new_bytes) == ("scan", 0)
    assert disk.unchanged_bytes == 4 * MIB + SIZE % (2 * MIB)
    guest.write(0, noise(10))
    (disk,) = (await back_up(workers, target, guest)).disks
    assert disk.new_bytes > 0
    assert [each["disk"] for each in all_points(root).values()][-1] == guest.content
    target.close()


async def test_disks_that_grow_and_shrink(tmp_path: Path, workers: Workers) -> None:
    root = make_remote(tmp_path / "r")
    target = opened(root)
    guest, was = guest_of(), []
    for size in (SIZE, SIZE + 512, SIZE + 5 * MIB, 3 * MIB, 3 * MIB + 512, 0, 10):
        guest.resize(size)
        guest.write(max(0, size - 100), noise(50))
        await back_up(workers, target, guest)
        was.append(bytes(guest.content).ljust(-(-size // 512) * 512, b"\0"))
    assert [each["disk"] for each in all_points(root).values()] == was
    target.close()


async def test_changes_since_an_older_point_lie_upon_the_latest(
    tmp_path: Path, workers: Workers
) -> None:
    """Xen Orchestra knows one child of a disk: a second one would be its ruin."""
    root = make_remote(tmp_path / "r")
    target = opened(root)
    guest = guest_of()
    await back_up(workers, target, guest)
    first = latest(root)
    guest.write(4 * MIB, noise(100))
    guest.write(8 * MIB, noise(100))
    dirty = [*guest.dirty]
    await back_up(workers, target, guest, changes_since(root, BITMAP))
    guest.write(4 * MIB, bytes(100))  # as it was at first
    guest.dirty = [each for each in guest.dirty if each[0] < 5 * MIB] + dirty
    order = Order("vm", since=first, changed=BITMAP)
    (disk,) = (await back_up(workers, target, guest, order)).disks
    assert disk.mode == "incremental"
    guest.dirty = []
    guest.write(0, noise(5))
    guest.dirty = [(0, 5)]
    # Since the first one: what the second has changed since then is told again, asked or not.
    order = Order("vm", since=first, changed=BITMAP, recheck=100)
    (disk,) = (await back_up(workers, target, guest, order)).disks
    assert disk.recheck_mismatches == 0
    assert [each["disk"] for each in all_points(root).values()][-1] == guest.content
    target.close()


async def test_a_lying_bitmap_is_found_out(tmp_path: Path, workers: Workers) -> None:
    root = make_remote(tmp_path / "r")
    target = opened(root)
    guest = guest_of()
    await back_up(workers, target, guest)
    guest.write(0, noise(100))
    guest.lies = True
    order = changes_since(root, BITMAP, recheck=100)
    (disk,) = (await back_up(workers, target, guest, order)).disks
    assert disk.recheck_mismatches == 1
    assert disk.mode == "scan"
    assert [each["disk"] for each in all_points(root).values()][-1] == guest.content
    target.close()


async def test_two_repositories_at_once(tmp_path: Path, workers: Workers) -> None:
    root, vault = make_remote(tmp_path / "r"), fresh_vault()
    target = opened(root)
    guests = {"sda": guest_of(), "sdb": guest_of(5 * MIB)}
    for _ in range(3):
        report = await back_up(workers, [vault, target], guests, Order("vm", labels={"a": "b"}))
        assert report.failed == []
        assert len(report.disks) == 4
        guests["sda"].write(MIB, noise(100))
    ours = all_points(root)
    for record, stamp in zip(listed(vault), ours, strict=True):
        for name in guests:
            assert ours[stamp][name] == read_back(vault, record, name)
    target.close()


async def test_the_chain_ends_when_it_is_long(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdsrv.repository.xo.writer_destination.MAX_DELTAS", 2)
    root = make_remote(tmp_path / "r")
    target = opened(root)
    guest = guest_of(4 * MIB)
    modes = []
    for _ in range(5):
        guest.write(0, noise(10))
        (disk,) = (await back_up(workers, target, guest)).disks
        modes.append(disk.mode)
    assert modes == ["full", "scan", "scan", "full", "scan"]
    assert disk.reason == "nothing tells what changed"
    other = opened(root, "vhd")
    (disk,) = (await back_up(workers, other, guest)).disks
    assert (disk.mode, disk.reason[:12]) == ("full", "--layout vhd")
    (disk,) = (await back_up(workers, other, guest)).disks
    assert (disk.mode, disk.new_bytes) == ("scan", 0)
    assert [each["disk"] for each in all_points(root).values()][-1] == guest.content
    target.close()
    other.close()


@pytest.mark.skipif(QEMU_IMG is None, reason="needs qemu-img")
async def test_qemu_reads_plain_vhds_without_options(tmp_path: Path, workers: Workers) -> None:
    root = make_remote(tmp_path / "r")
    target = opened(root, "vhd")
    guest = guest_of(64 * MIB + 4096)
    await back_up(workers, target, guest)
    target.close()
    (vhd,) = root.rglob("[0-9]*.vhd")
    (tmp_path / "raw").write_bytes(guest.content)
    done = subprocess.run(
        [str(QEMU_IMG), "compare", "-f", "raw", "-F", "vpc", str(tmp_path / "raw"), str(vhd)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "identical" in done.stdout
    info = subprocess.run(
        [str(QEMU_IMG), "info", "--output=json", str(vhd)], capture_output=True, check=True
    )
    assert json.loads(info.stdout)["virtual-size"] == len(guest.content)


async def test_plain_vhds_end_at_2040_gib(tmp_path: Path, workers: Workers) -> None:
    root = make_remote(tmp_path / "r")
    target = opened(root, "vhd")
    writer = await target.begin(workers, occasion(), None)
    with pytest.raises(UnsupportedImage, match="2040 GiB"):
        await writer.disk("sda", 2041 << 30)
    await writer.abort()
    target.close()
    target = opened(root, "vhd-directory")
    writer = await target.begin(workers, occasion(), None)
    disk = await writer.disk("sda", 3 << 40)
    await disk.data((3 << 40) - 2 * MIB, bytearray(noise(2 * MIB)), 2 * MIB)
    await disk.zero(0, (3 << 40) - 2 * MIB)
    await writer.commit({})
    (metadata,) = Decoder(root).points().values()
    assert [vdi["virtual_size"] for vdi in metadata["vdis"].values()] == [3 << 40]
    (block,) = [name for name in files(root) if "/blocks/" in name]
    assert block.endswith("/blocks/1572/863")
    target.close()


def occasion() -> Occasion:
    return Occasion("vm")


async def test_checksums_see_what_the_format_cannot(tmp_path: Path, workers: Workers) -> None:
    root = make_remote(tmp_path / "r", CHACHA)
    target = opened(root)
    guest = guest_of()
    await back_up(workers, target, guest)
    key = target.stored("vm")[-1]
    (disk,) = target.point(key).disks
    remote = target.remote
    sums = ChecksumFile.load(remote.tree, disk.directory, disk.unique_id, remote.sealing)
    assert sums is not None
    blocks = [
        bytes(guest.content[n * 2 * MIB :][: 2 * MIB]).ljust(2 * MIB, b"\0") for n in range(5)
    ]
    assert [sums.check(n, blocks[n]) for n in range(5)] == [True, True, None, None, True]
    assert sums.check(0, blocks[1]) is False  # two that were exchanged
    assert sums.check(0, blocks[0][:-1] + b"\1") is False
    assert sums.as_written({"footer": footer_of(10, uuid4(), 0, differencing=False)}) is False
    path = root / sums.path
    raw = path.read_bytes()
    for at in (0, 20, len(raw) - 50, len(raw) - 1):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(DiskError, match="corrupt"):
            _check(remote, disk, blocks[0])
    target.close()


def _check(remote: Remote, disk: XoDisk, block: bytes) -> None:
    sums = ChecksumFile.load(remote.tree, disk.directory, disk.unique_id, remote.sealing)
    assert sums is not None
    sums.check(0, block)


async def test_what_is_no_remote_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(RepositoryError, match="neither empty nor"):
        opened(tmp_path)
    with pytest.raises(DiskError, match="no such directory"):
        opened(tmp_path / "none")
