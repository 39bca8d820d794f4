"""nbdsrv as a library, as its documentation shows it."""

import asyncio
import inspect
import random
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import pytest
import uvloop

import nbdsrv
from nbdsrv.errors import ConfigError, DiskError
from nbdsrv.source import library
from tests.source.peers import listening, need, unix_uri

MIB = 1 << 20
GOLDEN = random.Random(8).randbytes(5 * MIB + 777)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(GOLDEN)
    return path


@pytest.fixture
def uri(image: Path, tmp_path: Path):
    with listening(tmp_path / "sock", "nbdkit", "-f", "file", str(image)):
        yield unix_uri(tmp_path / "sock")


def test_the_example_runs_as_it_is_written(uri: str, tmp_path: Path) -> None:
    example = inspect.cleandoc(str(library.__doc__).partition("::\n")[2].partition("\n\nWith")[0])
    script = tmp_path / "example.py"
    script.write_text(example.replace("nbd://localhost/disk", uri))
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path.cwd())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_read_write_flush_on_either_event_loop(run, uri: str, image: Path) -> None:
    async def main() -> None:
        async with nbdsrv.connect(uri, writable=True, connections=2) as disk:
            assert disk.size == len(GOLDEN)
            await disk.write(4096, memoryview(b"library" * 100))
            await disk.flush()
            block = bytearray(700)
            await disk.read_into(4096, memoryview(block))
            assert block == b"library" * 100

    run(main())
    assert image.read_bytes()[4096:4796] == b"library" * 100


async def test_a_stream_is_the_disk_in_order(uri: str) -> None:
    async with nbdsrv.connect(uri) as disk:
        for offset, length, piece in ((0, len(GOLDEN), MIB), (777, 3 * MIB, 65_537), (5, 0, MIB)):
            found, at = bytearray(), offset
            async for begin, part in nbdsrv.stream(disk, offset, length, piece):
                assert begin == at
                at += len(part)
                found += part
            assert found == GOLDEN[offset : offset + length]


async def test_a_stream_may_be_left_early(uri: str) -> None:
    async with nbdsrv.connect(uri) as disk:
        async with aclosing(nbdsrv.stream(disk, 0, disk.size, 4096)) as pieces:
            async for begin, part in pieces:
                assert part == GOLDEN[begin : begin + 4096]
                if begin > MIB:
                    break
        block = bytearray(512)
        await disk.read_into(0, memoryview(block))
        assert block == GOLDEN[:512]


async def test_a_stream_ends_at_what_cannot_be_read(image: Path, tmp_path: Path) -> None:
    need("nbdkit")
    error = ["--filter=error", "file", str(image), "error-pread-rate=100%"]
    with listening(tmp_path / "other", "nbdkit", "-f", "-r", *error):
        async with nbdsrv.connect(unix_uri(tmp_path / "other")) as disk:
            with pytest.raises(DiskError) as raised:
                async for _ in nbdsrv.stream(disk, 4096, MIB):
                    pass
            assert raised.value.offset == 4096


async def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        async with nbdsrv.connect("http://localhost/"):
            pass
    with pytest.raises(DiskError, match="none"):
        async with nbdsrv.connect(unix_uri(tmp_path / "none")):
            pass


def test_it_is_imported_when_it_is_used() -> None:
    script = "import sys, nbdsrv; print('nbdsrv.source.library' in sys.modules, nbdsrv.connect)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("False <function connect")
    with pytest.raises(AttributeError, match="disconnect"):
        _ = nbdsrv.disconnect
