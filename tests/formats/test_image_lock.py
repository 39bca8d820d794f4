"""QEMU's programs and ours keep out of each other's images, whatever the format."""

import asyncio
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats import image_lock
from nbdsrv.formats.image_file import open_image_file
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.raw import open_raw, raw_disk
from nbdsrv.formats.target_file import TargetFile
from tests.formats.locked import relied_on
from tests.formats.places import loop_device, mounted

MIB = 1 << 20
Holder = Callable[[Path], AbstractContextManager[None]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw one."""
    if shutil.which("qemu-io") is None:
        pytest.skip("qemu-io is not installed")
    path = tmp_path / "vm.raw"
    path.write_bytes(bytes(MIB))
    return path


@contextmanager
def held_by_qemu(path: Path | str) -> Iterator[None]:
    """QEMU has it open for the time of the block, as a running virtual machine would."""
    command = ["qemu-io", "-f", "raw", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        qemu.stdin.write(b"length\n")
        qemu.stdin.flush()
        assert qemu.stdout.readline()  # it has opened the image
        yield
        qemu.stdin.close()
        qemu.wait(20)


def qemu_writes(path: Path | str) -> bool:
    """Does it? If not, because of a lock."""
    command = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(path)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert not done.returncode or b"lock" in done.stderr
    return not done.returncode


async def opened(path: Path | str, workers: Workers, *, writable: bool = True) -> Disk:
    return await open_image(str(path), "raw", Opening(workers, writable=writable))


async def refused(path: Path | str, workers: Workers) -> None:
    for disk in opened(path, workers), open_raw(str(path), workers, writable=True):
        with pytest.raises(DiskError, match="another program has it open") as raised:
            await disk
        assert raised.value.errno == errno.EBUSY


async def test_qemu_keeps_out_of_a_raw_image_we_write(image: Path, workers: Workers) -> None:
    disk = await opened(image, workers)
    assert not qemu_writes(image)
    await disk.close()
    assert qemu_writes(image)


async def test_we_keep_out_of_a_raw_image_qemu_writes(image: Path, workers: Workers) -> None:
    with held_by_qemu(image):
        await refused(image, workers)
    await (await opened(image, workers)).close()


async def test_and_of_one_whose_content_a_guest_relies_on(image: Path, workers: Workers) -> None:
    with relied_on(image):
        await refused(image, workers)
    await (await opened(image, workers)).close()


async def test_likewise_on_a_device(image: Path, workers: Workers) -> None:
    with loop_device(str(image)) as device:
        with held_by_qemu(device):
            await refused(device, workers)
        disk = await opened(device, workers)
        assert not qemu_writes(device)
        await disk.close()


async def test_who_only_reads_disturbs_nobody(image: Path, workers: Workers) -> None:
    with held_by_qemu(image):
        await (await opened(image, workers, writable=False)).close()
    disk = await opened(image, workers, writable=False)
    assert qemu_writes(image)
    await disk.close()


async def test_several_of_this_process_may_write_one_raw_image(
    image: Path, workers: Workers
) -> None:
    disks = await asyncio.gather(*(opened(image, workers) for _ in range(8)))
    for disk in disks:
        assert not qemu_writes(image)
        await disk.close()
    with held_by_qemu(image):
        await refused(image, workers)


async def test_what_was_added_before_it_was_ours_counts(image: Path, workers: Workers) -> None:
    file = open_image_file(str(image), writable=True)
    with image.open("ab") as longer:
        longer.write(bytes(MIB))
    disk = await raw_disk(file, Opening(workers, writable=True))
    assert disk.size == 2 * MIB
    await disk.close()


@pytest.mark.parametrize("holder", [held_by_qemu, relied_on])
def test_a_file_is_not_replaced_while_somebody_goes_on_with_the_old_one(
    image: Path, holder: Holder
) -> None:
    late = TargetFile(str(image), replace=True)
    late.open()
    with holder(image):
        target = TargetFile(str(image), replace=True)
        for refused in (target.check, target.open, late.publish):
            with pytest.raises(DiskError, match="would go on with the old file") as raised:
                refused()
            assert raised.value.errno == errno.EBUSY
    late.discard()
    assert os.listdir(image.parent) == [image.name]
    assert image.stat().st_size == MIB
    target.open()
    target.publish()
    assert image.stat().st_size == 0


def test_but_while_somebody_just_reads_it(image: Path) -> None:
    with image.open("rb") as file:
        target = TargetFile(str(image), replace=True)
        target.open()
        target.publish()
        assert file.read() == bytes(MIB)


async def test_a_device_that_is_mounted_is_not_written_to(image: Path, workers: Workers) -> None:
    subprocess.run(["mkfs.ext2", "-q", str(image)], check=True, timeout=20)
    with loop_device(str(image)) as device:
        with mounted(image.with_name("mount"), device):
            with pytest.raises(DiskError, match="this system uses it") as raised:
                await opened(device, workers)
            assert raised.value.errno == errno.EBUSY
            await (await opened(device, workers, writable=False)).close()
        await (await opened(device, workers)).close()


async def test_where_there_are_no_locks_there_is_nothing_to_ask(
    image: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> bytes:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(image_lock.fcntl, "fcntl", missing)
    await (await opened(image, workers)).close()
    TargetFile(str(image), replace=True).check()


async def test_a_loop_device_lies_on_the_file(image: Path, workers: Workers) -> None:
    with loop_device(str(image)):
        with pytest.raises(DiskError, match=r"/dev/loop[0-9]+ lies on it; only one may write it"):
            await opened(image, workers)
        with pytest.raises(DiskError, match="lies on it and would go on with the old file"):
            TargetFile(str(image), replace=True).check()
        await (await opened(image, workers, writable=False)).close()
    await (await opened(image, workers)).close()
