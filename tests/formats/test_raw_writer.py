"""Raw images being written, into files and pipes."""

import os
import random
import threading
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.formats.raw_writer import RawWriter
from nbdsrv.formats.target_file import TargetFile
from nbdsrv.formats.writer import Plan

MIB = 1 << 20
SIZE = 40 * MIB + 7
PARTS = [(0, 3), (5, 70_000), (10 * MIB, MIB), (SIZE - 2, 2)]
GOLDEN = bytearray(SIZE)
for _offset, _length in PARTS:
    GOLDEN[_offset : _offset + _length] = random.Random(_offset).randbytes(_length)


async def written(writer: RawWriter) -> None:
    await writer.open(SIZE)
    await writer.begin(Plan(SIZE, lambda: iter(PARTS)))
    parts = PARTS if writer.ordered else PARTS[::-1]
    for offset, length in parts:
        await writer.data(offset, memoryview(GOLDEN)[offset : offset + length])
        await writer.zero(offset + length, 1)
    await writer.finish()
    await writer.abort()


async def test_a_file_is_sparse(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.img"
    await written(RawWriter(workers, TargetFile(str(path))))
    assert path.read_bytes() == GOLDEN
    assert path.stat().st_blocks * 512 < 2 * MIB


async def test_a_pipe_gets_the_holes_too(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    real = os.dup
    monkeypatch.setattr(os, "dup", lambda fd: real(writing if fd == 1 else fd))
    received = bytearray()

    def receive() -> None:
        while piece := os.read(reading, 1 << 16):
            received.extend(piece)

    receiver = threading.Thread(target=receive)
    receiver.start()
    writer = RawWriter(workers, TargetFile("-"))
    assert (writer.ordered, writer.seekable) == (True, False)
    await written(writer)
    os.close(writing)
    receiver.join()
    os.close(reading)
    assert received == GOLDEN


async def test_an_aborted_image_is_not_there(tmp_path: Path, workers: Workers) -> None:
    writer = RawWriter(workers, TargetFile(str(tmp_path / "disk.img")))
    await writer.open(SIZE)
    await writer.begin(Plan(SIZE, lambda: iter(PARTS)))
    await writer.data(0, memoryview(b"abc"))
    await writer.abort()
    await writer.abort()
    assert os.listdir(tmp_path) == []
