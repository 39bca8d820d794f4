"""Raw images whose file changes under us, is refused to us, or cannot be opened at all."""

import asyncio
import errno
import fcntl
import os
import socket
import subprocess
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Ability
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.raw import RawDisk, open_raw
from protocol.extents import DATA, HOLE
from tests.disk.check_disk import extent_map
from tests.disk.reading import POISON, content
from tests.formats.images import Image
from tests.formats.places import loop_device, mounted, need_root

MIB = 1 << 20
FULL = Image("full", MIB, ((0, MIB),))
SPARSE = Image("sparse", MIB, ((0, 65536), (524_288, 65536)))


@pytest.fixture(params=["known", "unknown"])
def learnt(request: pytest.FixtureRequest) -> bool:
    """Was the layout looked at before the file changed?"""
    return bool(request.param == "known")


async def opened(
    workers: Workers, path: Path, image: Image, *, learnt: bool = True, writable: bool = False
) -> RawDisk:
    golden = image.make(str(path))
    disk = await open_raw(str(path), workers, writable=writable)
    if learnt:
        assert await content(disk, 0, image.size) == golden
    return disk


def run(*command: str | Path) -> None:
    """Another program changes the file."""
    subprocess.run([str(word) for word in command], timeout=20, check=True, capture_output=True)


# --- the file changes while it is open -------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1, 4096, 70_001, MIB - 1])
async def test_truncated_data_fails_from_the_first_missing_byte(
    tmp_path: Path, workers: Workers, learnt: bool, left: int
) -> None:
    disk = await opened(workers, tmp_path / "disk.img", FULL, learnt=learnt)
    os.truncate(tmp_path / "disk.img", left)
    buffer = bytearray([POISON]) * MIB
    with pytest.raises(DiskError) as raised:
        await disk.read_into(0, memoryview(buffer))
    assert raised.value.errno == errno.EIO
    assert raised.value.offset == left
    assert bytes(buffer[:left]) == FULL.golden()[:left]
    assert await content(disk, 0, left) == FULL.golden()[:left]
    await disk.close()


async def test_a_truncated_hole_is_missing_not_zero(
    tmp_path: Path, workers: Workers, learnt: bool
) -> None:
    disk = await opened(workers, tmp_path / "disk.img", SPARSE, learnt=learnt)
    os.truncate(tmp_path / "disk.img", 700_000)  # within the hole at the end
    assert await content(disk, 600_000, 100_000) == bytes(100_000)
    for offset in (650_000, 700_000, 900_000):
        with pytest.raises(DiskError) as raised:
            await content(disk, offset, 100_000)
        assert raised.value.errno == errno.EIO
        missing = max(offset, 700_000)
        assert raised.value.offset == missing
        assert f"ends before byte {missing}," in str(raised.value)  # where exactly, it may not know
    await disk.close()


async def test_what_a_truncated_file_lost_is_not_said_to_be_zero(
    tmp_path: Path, workers: Workers, learnt: bool
) -> None:
    disk = await opened(workers, tmp_path / "disk.img", SPARSE, learnt=learnt)
    os.truncate(tmp_path / "disk.img", 524_288)
    states = await extent_map(disk)
    assert len(states) == MIB
    assert set(states[524_288:]) == {DATA}
    assert set(states[65_536:524_288]) == {HOLE}
    await disk.close()


async def test_a_truncated_file_that_grows_back_can_be_read_again(
    tmp_path: Path, workers: Workers
) -> None:
    disk = await opened(workers, tmp_path / "disk.img", FULL)
    os.truncate(tmp_path / "disk.img", 4096)
    with pytest.raises(DiskError):
        await content(disk, 0, MIB)
    golden = Image("again", MIB, ((8192, 4096),)).make(str(tmp_path / "disk.img"))
    assert await content(disk, 0, MIB) == golden
    await disk.close()


async def test_growth_is_not_part_of_the_open_disk(
    tmp_path: Path, workers: Workers, learnt: bool
) -> None:
    disk = await opened(workers, tmp_path / "disk.img", SPARSE, learnt=learnt)
    with open(tmp_path / "disk.img", "ab") as file:
        file.write(b"more")
    assert disk.size == MIB
    assert await content(disk, 0, MIB) == SPARSE.golden()
    assert len(await extent_map(disk)) == MIB
    with pytest.raises(DiskError):
        await content(disk, MIB, 4)
    await disk.close()


async def test_a_hole_punched_by_another_program_reads_as_zeroes(
    tmp_path: Path, workers: Workers, learnt: bool
) -> None:
    path = tmp_path / "disk.img"
    disk = await opened(workers, path, FULL, learnt=learnt)
    run("fallocate", "--punch-hole", "--offset", "65536", "--length", "131072", path)
    golden = FULL.golden()
    expected = golden[:65536] + bytes(131_072) + golden[196_608:]
    assert await content(disk, 0, MIB) == expected
    assert set((await extent_map(disk))[65536:196_608]) == {HOLE}
    await disk.close()


async def test_data_written_into_a_known_hole_by_another_program_is_seen_at_once(
    tmp_path: Path, workers: Workers
) -> None:
    path = tmp_path / "disk.img"
    disk = await opened(workers, path, SPARSE)
    for offset in (100_000, 300_000, 524_287, 600_000, MIB - 7):
        assert await content(disk, offset, 7) != b"written"
        run(
            *("sh", "-c", 'printf written | dd of="$0" bs=1 seek="$1" conv=notrunc', path),
            str(offset),
        )
        assert await content(disk, offset, 7) == b"written"
        assert b"written" in await content(disk, 65_536, MIB - 65_536)
        assert set((await extent_map(disk))[offset : offset + 7]) == {DATA}
    await disk.close()


async def test_two_disks_of_one_file_see_each_others_writes(
    tmp_path: Path, workers: Workers
) -> None:
    one = await opened(workers, tmp_path / "disk.img", SPARSE, writable=True)
    other = await open_raw(str(tmp_path / "disk.img"), workers, writable=True)
    assert await content(other, 200_000, 5) == bytes(5)
    await one.write(200_000, memoryview(b"first"))
    assert await content(other, 200_000, 5) == b"first"
    await other.zero(200_000, 5, punch=True, fast=False)
    assert await content(one, 200_000, 5) == bytes(5)
    await one.close()
    await other.close()


async def test_a_deleted_file_is_served_on(tmp_path: Path, workers: Workers) -> None:
    disk = await opened(workers, tmp_path / "disk.img", SPARSE)
    (tmp_path / "disk.img").unlink()
    assert await content(disk, 0, MIB) == SPARSE.golden()
    await disk.close()


# --- what cannot be opened -------------------------------------------------------------------


async def refusal(workers: Workers, path: str, *, writable: bool = False) -> DiskError:
    """The error of opening ``path``; no descriptor may stay behind."""
    before = os.listdir("/proc/self/fd")
    async with asyncio.timeout(5):
        with pytest.raises(DiskError) as raised:
            await open_raw(path, workers, writable=writable)
    assert os.listdir("/proc/self/fd") == before
    assert path in str(raised.value)
    assert "\n" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize("writable", [False, True])
async def test_missing(tmp_path: Path, workers: Workers, writable: bool) -> None:
    error = await refusal(workers, str(tmp_path / "nothing"), writable=writable)
    assert error.errno == errno.ENOENT
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("writable", [False, True])
async def test_directory(tmp_path: Path, workers: Workers, writable: bool) -> None:
    assert (await refusal(workers, str(tmp_path), writable=writable)).errno == errno.EISDIR


@pytest.mark.parametrize("writable", [False, True])
async def test_fifo_does_not_hang(tmp_path: Path, workers: Workers, writable: bool) -> None:
    os.mkfifo(tmp_path / "fifo")
    error = await refusal(workers, str(tmp_path / "fifo"), writable=writable)
    assert error.errno == errno.EINVAL


async def test_a_device_that_is_read_only(tmp_path: Path, workers: Workers) -> None:
    FULL.make(str(tmp_path / "disk.img"))
    with loop_device(str(tmp_path / "disk.img")) as device:
        run("blockdev", "--setro", device)
        with pytest.raises(DiskError, match="the device is read-only") as raised:
            await open_raw(device, workers, writable=True)
        assert raised.value.errno == errno.EROFS
        await (await open_raw(device, workers, writable=False)).close()
        run("blockdev", "--setrw", device)
        await (await open_raw(device, workers, writable=True)).close()


async def test_character_device_and_socket(tmp_path: Path, workers: Workers) -> None:
    assert (await refusal(workers, "/dev/zero")).errno == errno.EINVAL
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "sock"))
        await refusal(workers, str(tmp_path / "sock"))


async def test_dangling_and_circular_links(tmp_path: Path, workers: Workers) -> None:
    os.symlink("nowhere", tmp_path / "dangling")
    os.symlink("circle", tmp_path / "circle")
    assert (await refusal(workers, str(tmp_path / "dangling"))).errno == errno.ENOENT
    assert (await refusal(workers, str(tmp_path / "circle"))).errno == errno.ELOOP


# --- read-only means read-only ---------------------------------------------------------------


async def test_read_only_opens_read_only(tmp_path: Path, workers: Workers) -> None:
    disk = await opened(workers, tmp_path / "disk.img", SPARSE)
    run_of_data = (await disk.runs(0, 512))[0]
    flags = fcntl.fcntl(run_of_data.fd, fcntl.F_GETFL)  # type: ignore[union-attr]
    assert flags & os.O_ACCMODE == os.O_RDONLY
    assert disk.abilities == Ability.MULTI_CONN
    await disk.close()


async def test_file_without_write_permission(tmp_path: Path, workers: Workers) -> None:
    golden = SPARSE.make(str(tmp_path / "disk.img"))
    (tmp_path / "disk.img").chmod(0o444)
    disk = await open_raw(str(tmp_path / "disk.img"), workers, writable=False)
    assert await content(disk, 0, MIB) == golden
    await disk.close()


async def test_immutable_file(tmp_path: Path, workers: Workers) -> None:
    need_root()
    path = tmp_path / "disk.img"
    golden = SPARSE.make(str(path))
    done = subprocess.run(["chattr", "+i", str(path)], capture_output=True, check=False, timeout=20)
    if done.returncode:
        pytest.skip(f"no immutable files here: {done.stderr.decode().strip()}")
    try:
        disk = await open_raw(str(path), workers, writable=False)
        assert await content(disk, 0, MIB) == golden
        await disk.close()
        assert (await refusal(workers, str(path), writable=True)).errno == errno.EPERM
    finally:
        run("chattr", "-i", path)


async def test_read_only_mount(tmp_path: Path, workers: Workers) -> None:
    (tmp_path / "real").mkdir()
    golden = SPARSE.make(str(tmp_path / "real" / "disk.img"))
    with mounted(tmp_path / "seen", "--bind", str(tmp_path / "real")) as seen:
        run("mount", "-o", "remount,bind,ro", seen)
        disk = await open_raw(str(seen / "disk.img"), workers, writable=False)
        assert await content(disk, 0, MIB) == golden
        await disk.close()
        error = await refusal(workers, str(seen / "disk.img"), writable=True)
        assert error.errno == errno.EROFS


# --- failures of a disk that is open ---------------------------------------------------------


async def test_full_file_system(tmp_path: Path, workers: Workers) -> None:
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=256k", "none") as small:
        disk = await opened(workers, small / "disk.img", Image("thin", MIB), writable=True)
        await disk.write(0, memoryview(b"x" * 4096))
        with pytest.raises(DiskError) as raised:
            await disk.write(4096, memoryview(b"y" * 524_288))
        assert raised.value.errno == errno.ENOSPC
        assert await content(disk, 0, 4096) == b"x" * 4096
        await disk.trim(4096, 524_288)
        await disk.write(900_000, memoryview(b"room again"))
        assert await content(disk, 900_000, 10) == b"room again"
        await disk.close()


async def test_zeroing_what_the_full_file_system_cannot_allocate(
    tmp_path: Path, workers: Workers
) -> None:
    # tmpfs has no FALLOC_FL_ZERO_RANGE, so keeping the range allocated means writing zeroes.
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=256k", "none") as small:
        disk = await opened(workers, small / "disk.img", Image("thin", MIB), writable=True)
        with pytest.raises(DiskError) as raised:
            await disk.zero(0, MIB, punch=False, fast=False)
        assert raised.value.errno == errno.ENOSPC
        await disk.zero(0, MIB, punch=True, fast=True)
        assert await content(disk, 0, MIB) == bytes(MIB)
        await disk.close()


async def test_trimming_gives_space_back(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.img"
    disk = await opened(workers, path, FULL, writable=True)
    await disk.flush()
    before = path.stat().st_blocks
    await disk.trim(0, MIB // 2)
    assert path.stat().st_blocks * 512 <= before * 512 - MIB // 2 + 65536
    assert path.stat().st_size == MIB
    await disk.close()
