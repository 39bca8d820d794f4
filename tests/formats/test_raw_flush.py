"""A failed flush stays failed: the kernel tells of a lost write only once.

strace makes fdatasync(2) of a real server-side Disk fail; nothing in the Disk is replaced.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.formats.images import Image

SCRIPT = """
import asyncio, json, sys
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.raw import open_raw

async def outcome(work):
    try:
        await work
    except DiskError as error:
        return [error.errno, str(error)]
    return "ok"

async def main(path, how):
    loop = asyncio.get_running_loop()
    workers = Workers(1)  # strace counts calls per thread
    loop.add_reader(workers.fileno(), workers.complete)
    disk = await open_raw(path, workers, writable=True)
    found = [await outcome(disk.write(0, memoryview(b"lost")))]
    if how == "together":
        found += await asyncio.gather(*(outcome(disk.flush()) for _ in range(3)))
    else:
        found += [await outcome(disk.flush()) for _ in range(3)]
    found.append(await outcome(disk.write(8, memoryview(b"more"))))
    await disk.close()
    again = await open_raw(path, workers, writable=True)
    found.append(await outcome(again.flush()))
    await again.close()
    loop.remove_reader(workers.fileno())
    workers.close()
    print(json.dumps(found))

asyncio.run(main(*sys.argv[1:]))
"""


def outcomes(path: Path, how: str, *inject: str) -> list[object]:
    """write, three flushes, another write, and a flush after opening anew."""
    if inject and shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    tracing = ["strace", "-f", "-o", str(path) + ".trace", "-e", "trace=fdatasync", *inject]
    command = [*(tracing if inject else []), sys.executable, "-c", SCRIPT, str(path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip(f"no tracing here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Image("flush", 4096).make(str(tmp_path / "disk.img"))
    return tmp_path / "disk.img"


def test_without_a_failure_every_flush_succeeds(path: Path) -> None:
    assert outcomes(path, "in turn") == ["ok"] * 6


def test_after_a_failed_flush_every_later_one_fails(path: Path) -> None:
    found = outcomes(path, "in turn", "-e", "inject=fdatasync:error=EIO:when=1")
    assert found[0] == "ok"
    assert [error[0] for error in found[1:4]] == [5, 5, 5]  # type: ignore[index]
    assert str(path) in str(found[1])
    assert found[4:] == ["ok", "ok"]


def test_flushes_under_way_beside_a_failing_one_fail_too(path: Path) -> None:
    found = outcomes(path, "together", "-e", "inject=fdatasync:error=EIO:when=1")
    assert "ok" not in found[1:4]


def test_a_full_disk_found_at_flush_is_told_as_such(path: Path) -> None:
    found = outcomes(path, "in turn", "-e", "inject=fdatasync:error=ENOSPC:when=1")
    assert found[1][0] == 28  # type: ignore[index]
    assert "ok" not in found[1:4]
