"""What the file system below DIR cannot do is worked around, or told when an overlay is opened."""

import errno
import os
import resource
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from tests.disk.reading import content
from tests.overlay.bases import make_base, opener
from tests.overlay.server import nbdsrv

BLOCK = 4096
SIZE = 32 * BLOCK


async def test_a_disk_longer_than_files_may_be_is_refused_before_a_guest_has_it(
    tmp_path: Path, workers: Workers
) -> None:
    """Its first write, and each one after it, had no room for a reason nobody could mend."""
    make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - BLOCK, before[1]))
    try:
        with pytest.raises(DiskError, match="another file system") as caught:
            await open_()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path / "ov") == []
    disk = await open_()
    await disk.write(SIZE - BLOCK, memoryview(b"x" * BLOCK))
    await disk.close()


async def check_writing(open_: Callable[[], Awaitable[Disk]], base: bytes) -> None:
    """What is written and flushed is there when it is opened again."""
    disk = await open_()
    await disk.write(0, memoryview(b"x" * BLOCK))
    await disk.flush()
    await disk.close()
    disk = await open_()
    assert await content(disk, 0, SIZE) == b"x" * BLOCK + base[BLOCK:]
    await disk.close()


async def test_what_lies_above_need_not_be_readable(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As /srv is for a service with a directory of its own in it: each write was refused."""
    base = make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    opened = os.open

    def forbidding(path: str, *args: Any, **named: Any) -> int:
        if path == f"{tmp_path}/ov/..":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *args, **named)

    monkeypatch.setattr(os, "open", forbidding)
    await check_writing(open_, base)


async def test_directories_that_cannot_be_synced(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of FUSE, 9p: each write was refused."""
    base = make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    synced = os.fsync

    def files_only(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        synced(fd)

    monkeypatch.setattr(os, "fsync", files_only)
    await check_writing(open_, base)


async def test_what_a_killed_server_answered_is_found_where_holes_are_not_told(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    disk = await open_()
    await disk.write(3 * BLOCK, memoryview(b"x" * BLOCK))
    kept = {name: (tmp_path / "ov" / "disk" / name).read_bytes() for name in ("map", "recent")}
    await disk.close()
    for name, data in kept.items():  # as it was before it was closed
        (tmp_path / "ov" / "disk" / name).write_bytes(data)

    def unknown(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "lseek", unknown)
    disk = await open_()
    expected = base[: 3 * BLOCK] + b"x" * BLOCK + base[4 * BLOCK :]
    assert await content(disk, 0, SIZE) == expected
    await disk.close()


async def test_a_commit_past_a_server_that_has_no_socket_says_why_not(
    tmp_path: Path, workers: Workers
) -> None:
    make_base(tmp_path / "base", SIZE)
    nbdsrv("init", f"repo:{tmp_path}/repo")
    disk = await opener(workers, tmp_path / "base", tmp_path / "ov")()
    await disk.write(0, memoryview(b"x" * BLOCK))
    words = ("overlay", "commit", f"{tmp_path}/ov/disk", "--to", f"repo:{tmp_path}/repo")
    said = await workers.run(lambda: nbdsrv(*words, code=1))
    assert "is in use, and there is no frozen.sock" in said
    await disk.close()
    nbdsrv(*words)
