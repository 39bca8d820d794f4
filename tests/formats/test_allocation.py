"""Punching and zeroing on real file systems and devices."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsrv.formats.allocation import discard_device, punch_hole, zero_range
from tests.formats.images import Image
from tests.formats.places import PLACES, loop_device

FULL = Image("full", 1 << 20, ((0, 1 << 20),))
RANGES = [(0, 4096), (4096, 65536), (1, 1), (4095, 2), (5000, 100_000), ((1 << 20) - 3, 3)]


@pytest.fixture(params=PLACES, ids=lambda place: place.__name__)
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """A file of random bytes, open for writing."""
    with request.param(tmp_path) as directory:
        FULL.make(os.path.join(directory, "disk.img"))
        fd = os.open(os.path.join(directory, "disk.img"), os.O_RDWR)
        try:
            yield fd
        finally:
            os.close(fd)


def zeroed(offset: int, length: int) -> bytes:
    golden = FULL.golden()
    return golden[:offset] + bytes(length) + golden[offset + length :]


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_punching_zeroes_exactly_the_range(full: int, offset: int, length: int) -> None:
    punch_hole(full, offset, length)
    assert os.pread(full, 1 << 21, 0) == zeroed(offset, length)


def test_punching_frees_what_it_covers(full: int) -> None:
    os.fsync(full)
    before = os.fstat(full).st_blocks
    punch_hole(full, 65536, 524_288)
    assert before - os.fstat(full).st_blocks >= 524_288 // 512
    assert os.lseek(full, 0, os.SEEK_HOLE) == 65536


def outcome(fd: int, offset: int, length: int) -> int | None:
    """Zero the range; the number it was refused with."""
    try:
        zero_range(fd, offset, length)
    except OSError as error:
        return error.errno
    return None


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_zeroing_zeroes_exactly_the_range_or_refuses(full: int, offset: int, length: int) -> None:
    refused = outcome(full, offset, length)
    assert refused in {None, errno.EOPNOTSUPP}  # tmpfs
    expected = FULL.golden() if refused else zeroed(offset, length)
    assert os.pread(full, 1 << 21, 0) == expected


def test_zeroing_keeps_the_space(tmp_path: Path) -> None:
    FULL.make(str(tmp_path / "disk.img"))
    fd = os.open(tmp_path / "disk.img", os.O_RDWR)
    try:
        os.fsync(fd)
        before = os.fstat(fd).st_blocks
        if outcome(fd, 0, 1 << 20) == errno.EOPNOTSUPP:
            pytest.skip("this file system has no FALLOC_FL_ZERO_RANGE")
        assert os.fstat(fd).st_blocks >= before
    finally:
        os.close(fd)


def test_the_size_never_changes(full: int) -> None:
    punch_hole(full, (1 << 20) - 4096, 65536)
    assert os.fstat(full).st_size == 1 << 20
    assert os.pread(full, 1 << 21, 0) == zeroed((1 << 20) - 4096, 4096)


def test_refusals_carry_the_kernels_number(full: int) -> None:
    read_only = os.open(f"/proc/self/fd/{full}", os.O_RDONLY)
    try:
        for change in (punch_hole, zero_range):
            with pytest.raises(OSError, match=os.strerror(errno.EBADF)) as raised:
                change(read_only, 0, 4096)
            assert raised.value.errno == errno.EBADF
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            punch_hole(full, 0, 0)
        with pytest.raises(OSError, match=os.strerror(errno.ENOTTY)):
            discard_device(full, 0, 4096)  # a file is no device
    finally:
        os.close(read_only)


def test_a_block_device_is_discarded_and_zeroed(tmp_path: Path) -> None:
    golden = FULL.make(str(tmp_path / "disk.img"))
    with loop_device(str(tmp_path / "disk.img")) as device:
        fd = os.open(device, os.O_RDWR)
        try:
            zero_range(fd, 4096, 8192)
            assert os.pread(fd, 16384, 0) == golden[:4096] + bytes(8192) + golden[12288:16384]
            discard_device(fd, 65536, 131_072)
            left = os.pread(fd, 65536, 0) + os.pread(fd, 65536, 196_608)
            assert (
                left == golden[:4096] + bytes(8192) + golden[12288:65536] + golden[196_608:262_144]
            )
            with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
                discard_device(fd, 1, 7)
        finally:
            os.close(fd)
