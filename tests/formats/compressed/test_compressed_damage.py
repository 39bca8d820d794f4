"""Broken, cut, lying and exploding streams: an error that says where, and bounded memory."""

import asyncio
import gzip
import lzma
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as some

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.formats.opening import Opening, open_image
from tests.formats.compressed.streams import (
    STREAMS,
    Stream,
    disk_content,
    piped,
    seek_table,
    zstd_frames,
)
from tests.formats.mutants import PATIENCE_S, everything, threads

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = 600 * KIB + 77
UNCHECKED = {"xz-unchecked", "zstd"}
"""Streams without a checksum: a flipped bit in their data cannot be seen."""

each_stream = pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)


async def refusal(path: Path, kind: str, workers: Workers) -> DiskError:
    """What reading all of it raises."""
    with pytest.raises(DiskError) as raised:
        await everything(str(path), kind, workers)
    return raised.value


@each_stream
async def test_cut_short(tmp_path: Path, workers: Workers, stream: Stream) -> None:
    path, data = tmp_path / "disk.z", stream.compress(disk_content(SIZE))
    padding = len(data) - len(data.rstrip(b"\0"))
    whole = len(data) - (padding if "gzip" in stream.kind and padding > 100 else 0)
    cuts = [whole - 9, whole - 30, whole // 2, whole // 3, 21, 7]
    for left in cuts if stream.index == "seek table" else [whole - 1, *cuts]:
        path.write_bytes(data[:left])
        error = await refusal(path, stream.kind, workers)
        assert isinstance(error, CorruptImage), left
        assert str(error).startswith(f"corrupt image: {path} at "), left


@each_stream
async def test_something_behind_it(tmp_path: Path, workers: Workers, stream: Stream) -> None:
    path, data = tmp_path / "disk.z", stream.compress(disk_content(SIZE))
    for more in (b"garbage, no stream", bytes(3) + b"!"):
        path.write_bytes(data + more)
        assert isinstance(await refusal(path, stream.kind, workers), CorruptImage)


def test_flipped_bytes_never_give_wrong_content(tmp_path: Path) -> None:
    golden = disk_content(200 * KIB + 5)
    path = tmp_path / "disk.z"
    checked = [
        (stream.kind, stream.compress(golden)) for stream in STREAMS if stream.name not in UNCHECKED
    ]

    async def read(kind: str, workers: Workers) -> bytes | None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await everything(str(path), kind, workers)
        except (CorruptImage, UnsupportedImage) as error:
            assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right
            return None

    with threads() as (runner, workers):

        @given(some.sampled_from(checked), some.data(), some.integers(1, 255))
        def search(stream: tuple[str, bytes], data: some.DataObject, flip: int) -> None:
            kind, good = stream
            mutant = bytearray(good)
            ends = some.integers(0, 40) | some.integers(len(good) - 60, len(good) - 1)
            mutant[data.draw(ends | some.integers(0, len(good) - 1))] ^= flip
            path.write_bytes(mutant)
            found = runner.run(read(kind, workers))
            assert found is None or found == golden

        search()


@each_stream
async def test_no_stream_at_all(tmp_path: Path, workers: Workers, stream: Stream) -> None:
    path = tmp_path / "disk.z"
    for data in (b"", b"!", b"no stream" * 1000, bytes(5000)):
        path.write_bytes(data)
        error = await refusal(path, stream.kind, workers)
        assert isinstance(error, CorruptImage)
        position = str(error).removeprefix(f"corrupt image: {path} at ").partition(":")[0]
        assert 0 <= int(position) <= len(data)


@pytest.mark.parametrize("stream", [STREAMS[0], STREAMS[9]], ids=lambda stream: stream.kind)
async def test_endless_padding(tmp_path: Path, workers: Workers, stream: Stream) -> None:
    path = tmp_path / "disk.z"
    path.write_bytes(stream.compress(disk_content(SIZE)))
    os.truncate(path, 1 << 40)
    async with asyncio.timeout(PATIENCE_S):
        assert isinstance(await refusal(path, stream.kind, workers), CorruptImage)


async def test_frame_that_goes_on_in_a_hole(tmp_path: Path, workers: Workers) -> None:
    path, frame = tmp_path / "disk.zst", piped(disk_content(200 * KIB), "zstd", "-c")
    (first,) = struct.unpack_from("<I", frame[9:12] + b"\0")
    path.write_bytes(frame[: 12 + (first >> 3)])
    os.truncate(path, 1 << 40)
    async with asyncio.timeout(PATIENCE_S):
        error = await refusal(path, "zstd", workers)
    assert "more than 4096 empty zstd blocks" in str(error)


# --- lies ------------------------------------------------------------------------------------


async def test_gzip_member_that_claims_another_size(tmp_path: Path, workers: Workers) -> None:
    path, data = tmp_path / "disk.gz", bytearray(gzip.compress(disk_content(SIZE)))
    data[-4:] = struct.pack("<I", SIZE + 1)
    path.write_bytes(data)
    assert "incorrect length check" in str(await refusal(path, "gzip", workers))


async def test_bgzf_member_that_claims_another_size(tmp_path: Path, workers: Workers) -> None:
    path, data = tmp_path / "disk.gz", bytearray(piped(disk_content(SIZE), "bgzip", "-c"))
    first = struct.unpack_from("<H", data, 16)[0] + 1
    (size,) = struct.unpack_from("<I", data, first - 4)
    struct.pack_into("<I", data, first - 4, size - 1)
    path.write_bytes(data)
    assert isinstance(await refusal(path, "gzip", workers), CorruptImage)


async def test_bgzf_without_its_end_marker(tmp_path: Path, workers: Workers) -> None:
    path, data = tmp_path / "disk.gz", piped(disk_content(SIZE), "bgzip", "-c")
    path.write_bytes(data[:-28])
    error = await refusal(path, "gzip", workers)
    assert "no end marker, was the file cut short?" in str(error)


async def test_seek_table_that_lies(tmp_path: Path, workers: Workers) -> None:
    path, golden = tmp_path / "disk.zst", disk_content(400_000)
    frames = zstd_frames(golden, 200_000)
    for lengths in ((200_000, 199_999), (200_000, 200_001), (1, 200_000), (1 << 25, 200_000)):
        table = seek_table(list(zip(map(len, frames), lengths, strict=True)))
        path.write_bytes(b"".join(frames) + table)
        error = await refusal(path, "zstd", workers)
        assert isinstance(error, CorruptImage)
        assert "a zstd frame of 200000 bytes, not " in str(error)


async def test_seek_table_that_does_not_fit_the_file(tmp_path: Path, workers: Workers) -> None:
    path, golden = tmp_path / "disk.zst", disk_content(400_000)
    frames = zstd_frames(golden, 200_000)
    path.write_bytes(b"".join(frames) + seek_table([(5, 200_000), (6, 200_000)]))
    disk = await open_image(str(path), "zstd", Opening(workers))
    assert disk.facts["index"] == "frames"
    await disk.close()
    assert await everything(str(path), "zstd", workers) == golden


async def test_dictionaries_that_are_not_here(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.zst"
    trained = zstandard.train_dictionary(4096, [os.urandom(50) * 20 for _ in range(200)])
    path.write_bytes(zstandard.ZstdCompressor(dict_data=trained).compress(disk_content(SIZE)))
    error = await refusal(path, "zstd", workers)
    assert isinstance(error, UnsupportedImage)
    assert f"needs dictionary {trained.dict_id()}" in str(error)


async def test_history_that_is_too_long(tmp_path: Path, workers: Workers) -> None:
    path, golden = tmp_path / "disk.z", disk_content(SIZE)
    path.write_bytes(piped(golden, "xz", "-c", "--lzma2=preset=0,dict=1GiB"))
    error = await refusal(path, "xz", workers)
    assert isinstance(error, UnsupportedImage)
    assert "takes more than 192 MiB" in str(error)


def xz_index(*records: tuple[int, int]) -> bytes:
    """A stream of no blocks whose index says otherwise."""

    def number(value: int) -> bytes:
        digits = b""
        while value >= 0x80:
            digits += bytes([value & 0x7F | 0x80])
            value >>= 7
        return digits + bytes([value])

    empty = lzma.compress(b"")
    index = b"\0" + number(len(records)) + b"".join(number(n) for pair in records for n in pair)
    index += bytes(-len(index) % 4)
    index += struct.pack("<I", zlib.crc32(index))
    footer = struct.pack("<I", len(index) // 4 - 1) + empty[-4:-2]
    return empty[:12] + index + struct.pack("<I", zlib.crc32(footer)) + footer + b"YZ"


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([(1 << 40, 5)], "an xz block of 1099511627776 and 5 bytes"),
        ([(4, 5)], "an xz block of 4 and 5 bytes"),
        ([(8, 1 << 62)], "an xz block of 8 and "),
        ([(8, 5)] * 3, "the xz index has more blocks than the file"),
    ],
)
async def test_xz_index_that_lies(
    tmp_path: Path, workers: Workers, records: list[tuple[int, int]], expected: str
) -> None:
    path = tmp_path / "disk.xz"
    path.write_bytes(xz_index(*records))
    error = await refusal(path, "xz", workers)
    assert isinstance(error, CorruptImage)
    assert expected in str(error)


async def test_no_room_to_unpack(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdsrv.formats.compressed.spool.FREE_PERCENT", 101)
    path = tmp_path / "disk.zst"
    path.write_bytes(piped(disk_content(SIZE), "zstd", "-c"))
    error = await refusal(path, "zstd", workers)
    assert str(error) == f"{path}: no room to unpack it in {tempfile.gettempdir()}; set TMPDIR"


# --- bombs -----------------------------------------------------------------------------------

SCRIPT = """
import asyncio, resource, sys
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.opening import Opening, open_image

async def main(path, kind):
    loop = asyncio.get_running_loop()
    workers = Workers()
    loop.add_reader(workers.fileno(), workers.complete)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = 0
    try:
        disk = await open_image(path, kind, Opening(workers))
        size = disk.size
        ends = [(at * (size // 17), memoryview(bytearray(min(size, 1 << 20)))) for at in range(16)]
        await asyncio.gather(*(disk.read_into(*end) for end in ends), return_exceptions=True)
        await disk.close()
    except DiskError as error:
        print(error, file=sys.stderr)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    loop.remove_reader(workers.fileno())
    workers.close()
    print(size, used)

asyncio.run(main(*sys.argv[1:]))
"""


def zstd_bomb(blocks: int) -> bytes:
    """A frame that does not tell its size, of blocks of 128 KiB of one byte each."""
    header = b"\x28\xb5\x2f\xfd" + bytes([0x00, (17 - 10) << 3])
    body = (131072 << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    last = (1 | 131072 << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    return header + body * (blocks - 1) + last


BOMBS = {
    "gzip": lambda: piped(bytes(96 * MIB), "gzip", "-9c"),
    "gzip-of-nothing-but-members": lambda: gzip.compress(b"") * 100_000,
    "xz-blocks": lambda: piped(bytes(96 * MIB), "xz", "-0c", "--block-size=33554432"),
    "xz": lambda: piped(bytes(96 * MIB), "xz", "-0c"),
    "zstd": lambda: zstd_bomb(16 * KIB),
    "zstd-size": lambda: piped(bytes(256 * MIB), "zstd", "-c", "--stream-size=268435456"),
    "zstd-frames": lambda: zstandard.ZstdCompressor().compress(bytes(60 * MIB)) * 12,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(BOMBS[name]())
    command = [sys.executable, "-c", SCRIPT, str(path), name.partition("-")[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    size, used = map(int, done.stdout.split())
    assert size >= 96 * MIB or name.endswith("members")
    assert used * KIB <= 300 * MIB
