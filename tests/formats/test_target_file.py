"""A file that is being made: there as a whole, or not at all."""

import os
import resource
import stat
from pathlib import Path

import pytest

from nbdsrv.errors import DiskError
from nbdsrv.formats.target_file import TargetFile
from tests.formats.places import memory, need_root


def made(path: Path, content: bytes, *, replace: bool = False) -> None:
    target = TargetFile(str(path), replace=replace)
    target.open()
    target.append(content)
    target.publish()


def test_nothing_is_there_until_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    target = TargetFile(str(path))
    target.open()
    target.store(5, b"world")
    assert not path.exists()
    target.append(b"hello")
    assert target.position == 5
    target.publish()
    assert path.read_bytes() == b"helloworld"
    assert os.listdir(tmp_path) == ["disk.img"]
    target.discard()
    assert path.exists()


def test_discarding_leaves_nothing_and_may_be_done_twice(tmp_path: Path) -> None:
    target = TargetFile(str(tmp_path / "disk.img"))
    target.discard()
    target.open()
    assert len(os.listdir(tmp_path)) == 1
    target.discard()
    target.discard()
    assert os.listdir(tmp_path) == []


def test_a_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"old")
    target = TargetFile(str(path))
    for refused in (target.check, target.open):
        with pytest.raises(DiskError, match="exists already; --force"):
            refused()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["disk.img"]


def test_nor_one_that_has_come_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    target = TargetFile(str(path))
    target.open()
    path.write_bytes(b"somebody else's")
    with pytest.raises(DiskError, match="exists"):
        target.publish()
    target.discard()
    assert path.read_bytes() == b"somebody else's"
    assert os.listdir(tmp_path) == ["disk.img"]


def test_a_replaced_file_is_the_old_one_until_the_end_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"old")
    path.chmod(0o640)
    target = TargetFile(str(path), replace=True)
    target.open()
    target.append(b"new")
    assert path.read_bytes() == b"old"
    assert stat.S_IMODE(os.fstat(target.fd).st_mode) == 0o600
    target.publish()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["disk.img"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    path, link = tmp_path / "disk.img", tmp_path / "link"
    path.write_bytes(b"old")
    link.symlink_to("disk.img")
    made(link, b"new", replace=True)
    assert link.is_symlink()
    assert path.read_bytes() == b"new"


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(DiskError, match="not a regular file"):
            TargetFile(str(tmp_path / name), replace=True).check()


def test_a_device_that_is_not_there_is_not_made_as_a_file() -> None:
    need_root()
    if os.stat("/dev").st_dev == os.stat("/").st_dev:
        pytest.skip("no file system of its own is mounted on /dev")
    target = TargetFile("/dev/no-such-disk")
    for refused in (target.check, target.open):
        with pytest.raises(DiskError, match="/dev/no-such-disk: no such device"):
            refused()
    assert not os.path.lexists("/dev/no-such-disk")


def test_but_memory_may_be_meant(tmp_path: Path) -> None:
    with memory(tmp_path) as directory:
        made(Path(directory) / "disk.img", b"content")
        assert os.listdir(directory) == ["disk.img"]


@pytest.mark.parametrize("name", ["nowhere/disk.img", "disk\0.img", "n" * 300])
def test_a_name_that_cannot_be(tmp_path: Path, name: str) -> None:
    target = TargetFile(str(tmp_path / name))
    with pytest.raises(DiskError):
        target.open()
    target.discard()
    assert os.listdir(tmp_path) == []


def test_the_longest_name_there_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)
    made(path, b"x")
    assert path.read_bytes() == b"x"


def test_many_parts_at_once(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    parts = [bytes([n % 256]) * (n % 7) for n in range(5000)]
    target = TargetFile(str(path))
    target.open()
    target.append(*parts)
    target.append()
    target.publish()
    assert path.read_bytes() == b"".join(parts)


def test_room_at_the_end_is_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    target = TargetFile(str(path))
    target.open()
    target.resize(1 << 40)
    target.publish()
    info = path.stat()
    assert (info.st_size, info.st_blocks) == (1 << 40, 0)


def test_a_file_can_be_too_large(tmp_path: Path) -> None:
    target = TargetFile(str(tmp_path / "disk.img"))
    target.open()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"disk\.img: 1099511627777 bytes: File too large"):
            target.resize((1 << 40) + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    target.discard()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_said_so() -> None:
    target = TargetFile("/dev/full", replace=True)
    target.fd = os.open("/dev/full", os.O_WRONLY)
    try:
        for write in (lambda: target.store(0, b"x"), lambda: target.append(b"x")):
            with pytest.raises(DiskError, match="/dev/full: No space left on device"):
                write()
    finally:
        target.discard()
