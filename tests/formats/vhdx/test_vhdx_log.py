"""VHDX logs are replayed, in memory: what qemu makes of a dirty image is what we read of it."""

import random
import shutil
import struct
import time
from pathlib import Path
from uuid import UUID

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import open_image_file
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.vhdx.replayed import Replayed
from protocol.extents import DATA, HOLE, ZERO
from tests.disk.check_disk import OpenDisk, check_disk, extent_map
from tests.disk.reading import content
from tests.formats.table_images import qemu, read_by_qemu
from tests.formats.vhdx.vhdx_images import (
    BASE_ID,
    BAT_AT,
    CHILD_ID,
    FULL,
    LOG_AT,
    LOG_ID,
    METADATA_AT,
    MIB,
    NOT_PRESENT,
    PAYLOAD_AT,
    Block,
    Vhdx,
    log_entry,
    summed,
)

SECTOR = 4096


def data(seed: int, length: int = MIB) -> bytes:
    return random.Random(seed).randbytes(length)


def image(*entries: tuple[int, bytes], **fields: object) -> Vhdx:
    """Blocks 0, 1 and 2 are in the file, the BAT speaks of 0 and 1, and there is a log."""
    vhdx = Vhdx(size=4 * MIB, log_guid=LOG_ID, log=dict(entries), **fields)  # type: ignore[arg-type]
    vhdx.blocks = {n: Block(FULL, data(n)) for n in range(3)}
    vhdx.bat = {2: NOT_PRESENT}
    return vhdx


def bat(*entries: int) -> bytes:
    """The first 4 KiB of a BAT."""
    return struct.pack(f"<{len(entries)}Q", *entries).ljust(SECTOR, b"\0")


def at(block: int) -> int:
    """The entry of a block that is there."""
    return PAYLOAD_AT + block * MIB | FULL


COMPLETE = bat(at(0), at(1), at(2), 0)
THREE_BLOCKS = b"".join(data(n) for n in range(3)) + bytes(MIB)
TWO_BLOCKS = data(0) + data(1) + bytes(2 * MIB)


async def read(path: Path | str, workers: Workers) -> bytes:
    disk = await open_image(str(path), "", Opening(workers))
    try:
        return await content(disk, 0, disk.size)
    finally:
        await disk.close()


async def refusal(path: Path | str, workers: Workers) -> str:
    with pytest.raises(DiskError) as raised:
        await read(path, workers)
    assert "\n" not in str(raised.value)
    return str(raised.value)


async def replayed_by_qemu(path: str) -> bytes:
    """What is in the image once qemu has written its log to where it belongs."""
    copy = path + ".replayed"
    shutil.copyfile(path, copy)
    qemu("qemu-img", "check", "-q", "-r", "all", "-f", "vhdx", copy)
    return read_by_qemu(copy, "vhdx")


async def test_contract(tmp_path: Path, workers: Workers) -> None:
    """With guest data in the log, which the specification forbids, and zeroes over some."""
    inside = data(77, SECTOR)
    updates: list[tuple[int, bytes | int]] = [
        (BAT_AT, COMPLETE),
        (PAYLOAD_AT + 5 * SECTOR, inside),
        (PAYLOAD_AT + 7 * SECTOR, 3 * SECTOR),
        (PAYLOAD_AT + 8 * SECTOR, inside),
        (PAYLOAD_AT + MIB - SECTOR, 2 * SECTOR),
    ]
    path = image((0, log_entry(5, 0, updates))).write(tmp_path / "disk.vhdx")
    golden = bytearray(THREE_BLOCKS)
    golden[7 * SECTOR : 10 * SECTOR] = bytes(3 * SECTOR)
    for sector in (5, 8):
        golden[sector * SECTOR : (sector + 1) * SECTOR] = inside
    golden[MIB - SECTOR : MIB + SECTOR] = bytes(2 * SECTOR)
    assert bytes(golden) == await replayed_by_qemu(path)

    async def open_disk() -> Disk:
        return await open_image(path, "", Opening(workers))

    opener: OpenDisk = open_disk
    await check_disk(opener, bytes(golden), extents_granularity=SECTOR)
    disk = await open_disk()
    states = await extent_map(disk)
    assert [states[n * SECTOR] for n in (5, 7, 8, 9, 10)] == [DATA, ZERO, DATA, ZERO, DATA]
    assert states[3 * MIB] == HOLE
    assert disk.facts["log_replayed"] is True
    await disk.close()


async def test_the_file_is_not_written(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.vhdx"
    image((0, log_entry(5, 0, [(BAT_AT, COMPLETE)]))).write(path)
    before = path.read_bytes()
    assert await read(path, workers) == THREE_BLOCKS
    assert path.read_bytes() == before


async def test_what_qemu_logged(tmp_path: Path, workers: Workers) -> None:
    """A crash just after the log was flushed: nothing of it has reached its place yet."""
    path, older = tmp_path / "disk.vhdx", tmp_path / "older.vhdx"
    options = "block_size=1M,block_state_zero=off"
    qemu("qemu-img", "create", "-q", "-f", "vhdx", "-o", options, str(path), "6M")
    qemu("qemu-io", "-f", "vhdx", "-c", "write -P 1 1M 4k", str(path))
    shutil.copyfile(path, older)
    qemu("qemu-io", "-f", "vhdx", "-c", "write -P 2 4M 64k", str(path))
    raw, old = bytearray(path.read_bytes()), older.read_bytes()
    log_at = raw.index(b"loge")
    headers = [raw[start : start + SECTOR] for start in (64 << 10, 128 << 10)]
    current = max(headers, key=lambda header: struct.unpack_from("<Q", header, 8))
    log_length, log_start = struct.unpack_from("<IQ", current, 68)
    raw[MIB:log_start] = old[MIB:log_start]
    end = log_start + log_length
    bat_end = end + (3 << 20)
    raw[end:bat_end] = old[end:bat_end].ljust(bat_end - end, b"\0")[: bat_end - end]
    current[48:64] = raw[log_at + 32 : log_at + 48]  # the log's GUID
    dirty = summed(bytes(current))
    raw[64 << 10 : (64 << 10) + SECTOR] = raw[128 << 10 : (128 << 10) + SECTOR] = dirty
    path.write_bytes(raw)
    expected = await replayed_by_qemu(str(path))
    assert expected[4 * MIB : 4 * MIB + 65536] == b"\2" * 65536
    assert await read(path, workers) == expected


async def test_metadata_and_regions_are_read_through_the_log(
    tmp_path: Path, workers: Workers
) -> None:
    smaller = image()
    smaller.size = 2 * MIB + 512
    items = smaller.metadata()[64 << 10 :].ljust(SECTOR, b"\0")
    regions = smaller.regions(MIB)
    updates: list[tuple[int, bytes | int]] = [(METADATA_AT + (64 << 10), items)]
    updates += [((192 << 10) + n, regions[n : n + SECTOR]) for n in range(0, 64 << 10, SECTOR)]
    path = tmp_path / "disk.vhdx"
    image((0, log_entry(9, 0, [*updates, (BAT_AT, COMPLETE)]))).write(path)
    raw = bytearray(path.read_bytes())
    raw[192 << 10 : 320 << 10] = bytes(128 << 10)
    path.write_bytes(raw)
    assert await read(path, workers) == THREE_BLOCKS[: 2 * MIB + 512]


async def test_a_torn_entry_counts_for_nothing(tmp_path: Path, workers: Workers) -> None:
    good = log_entry(5, 0, [(BAT_AT, COMPLETE)])
    torn = bytearray(log_entry(6, 0, [(BAT_AT, bat(at(2), at(1), at(0)))]))
    for spoilt in (100, 4096 + 1000, 8191):
        bad = bytearray(torn)
        bad[spoilt] ^= 1
        path = image((0, good), (len(good), bytes(bad))).write(tmp_path / "disk.vhdx")
        assert await read(path, workers) == THREE_BLOCKS == await replayed_by_qemu(path)


@pytest.mark.parametrize(
    "entry",
    [
        log_entry(6, 0, [(BAT_AT, bat())], guid=CHILD_ID),
        log_entry(7, 0, [(BAT_AT, bat())]),
        log_entry(6, 100, [(BAT_AT, bat())]),
        log_entry(6, 2 * MIB, [(BAT_AT, bat())]),
        log_entry(6, 0, [(BAT_AT + 512, bat())]),
        log_entry(6, 0, [(BAT_AT, 100)]),
        log_entry(0, 0, [(BAT_AT, bat())]),
    ],
    ids=["guid", "gap", "tail", "far tail", "odd place", "odd length", "zero"],
)
async def test_what_does_not_belong_counts_for_nothing(
    tmp_path: Path, workers: Workers, entry: bytes
) -> None:
    good = log_entry(5, 0, [(BAT_AT, COMPLETE)])
    path = image((0, good), (len(good), entry)).write(tmp_path / "disk.vhdx")
    assert await read(path, workers) == THREE_BLOCKS


async def test_only_what_lies_between_tail_and_head_is_replayed(
    tmp_path: Path, workers: Workers
) -> None:
    """Entry 4 has been written to its place long ago, where other things may be by now.

    (qemu 7.2 replays it, too: it does not look at the tail, here and around the corner.)
    """
    four = log_entry(4, 0, [(PAYLOAD_AT, data(9, SECTOR))])
    five = log_entry(5, len(four), [(BAT_AT, bat(at(0)))])
    six = log_entry(6, len(four), [(BAT_AT, COMPLETE)])
    entries = [(0, four), (len(four), five), (len(four) + len(five), six)]
    path = image(*entries).write(tmp_path / "disk.vhdx")
    assert await read(path, workers) == THREE_BLOCKS


async def test_around_the_corner(tmp_path: Path, workers: Workers) -> None:
    """Entry 5 lies across the end of the ring, entry 6 behind it at the beginning."""
    start = MIB - SECTOR
    five = log_entry(5, start, [(BAT_AT, bat(at(0), 0, at(2)))])
    six = log_entry(6, start, [(BAT_AT + SECTOR, 64 << 10), (PAYLOAD_AT, data(8, SECTOR))])
    entries = [(start, five[:SECTOR]), (0, five[SECTOR:]), (len(five) - SECTOR, six)]
    path = image(*entries).write(tmp_path / "disk.vhdx")
    expected = data(8, SECTOR) + data(0)[SECTOR:] + bytes(MIB) + data(2) + bytes(MIB)
    assert await read(path, workers) == expected


async def test_the_newest_of_several_sequences(tmp_path: Path, workers: Workers) -> None:
    old = log_entry(5, 0, [(BAT_AT, bat())])
    new = log_entry(90, 64 << 10, [(BAT_AT, COMPLETE)])
    incomplete = log_entry(200, 0, [(BAT_AT, bat())])
    entries = [(0, old), (64 << 10, new), (128 << 10, incomplete)]
    path = image(*entries).write(tmp_path / "disk.vhdx")
    assert await read(path, workers) == THREE_BLOCKS


async def test_many_descriptors(tmp_path: Path, workers: Workers) -> None:
    """More than one sector of them, sectors written, zeroed and written again."""
    chance = random.Random(3)
    updates: list[tuple[int, bytes | int]] = [(BAT_AT, COMPLETE)]
    golden = bytearray(THREE_BLOCKS)
    for _ in range(170):
        sector = chance.randrange(3 * MIB // SECTOR - 8)
        span = chance.choice((0, 1, 2, 8))
        piece = chance.randbytes(SECTOR) if not span else bytes(span * SECTOR)
        updates.append((PAYLOAD_AT + sector * SECTOR, len(piece) if span else piece))
        golden[sector * SECTOR : sector * SECTOR + len(piece)] = piece
    path = image((0, log_entry(5, 0, updates))).write(tmp_path / "disk.vhdx")
    assert await read(path, workers) == bytes(golden)


async def test_the_file_is_as_long_as_the_log_says(tmp_path: Path, workers: Workers) -> None:
    """Block 3 was allocated behind the end, and the file not yet made longer."""
    table = bat(at(0), at(1), at(2), at(3))
    size = PAYLOAD_AT + 3 * MIB
    entry = log_entry(5, 0, [(BAT_AT, table)], flushed=size, last=size + MIB)
    path = image((0, entry)).write(tmp_path / "disk.vhdx")
    assert Path(path).stat().st_size == size
    disk = await open_image(path, "", Opening(workers))
    assert await content(disk, 0, disk.size) == THREE_BLOCKS
    assert (await extent_map(disk))[3 * MIB] == ZERO
    await disk.close()
    shorter = log_entry(5, 0, [(BAT_AT, table)], flushed=size, last=size)
    assert "beyond the end" in await refusal(
        image((0, shorter)).write(tmp_path / "disk.vhdx"), workers
    )


async def test_a_file_shorter_than_when_it_was_logged(tmp_path: Path, workers: Workers) -> None:
    entry = log_entry(5, 0, [(BAT_AT, COMPLETE)], flushed=PAYLOAD_AT + 4 * MIB)
    path = image((0, entry)).write(tmp_path / "disk.vhdx")
    text = await refusal(path, workers)
    assert f"at {LOG_AT}: " in text
    assert "truncated" in text


async def test_a_log_nothing_was_written_to(tmp_path: Path, workers: Workers) -> None:
    foreign = log_entry(5, 0, [(BAT_AT, COMPLETE)], guid=BASE_ID)
    for entries in ([], [(0, foreign)]):
        path = image(*entries).write(tmp_path / "disk.vhdx")
        assert await read(path, workers) == TWO_BLOCKS


async def test_a_log_without_an_intact_entry(tmp_path: Path, workers: Workers) -> None:
    torn = bytearray(log_entry(5, 0, [(BAT_AT, COMPLETE)]))
    torn[5000] ^= 1
    path = image((0, bytes(torn))).write(tmp_path / "disk.vhdx")
    assert "no entry of the log is intact" in await refusal(path, workers)


async def test_without_a_guid_the_log_is_not_looked_at(tmp_path: Path, workers: Workers) -> None:
    vhdx = image((0, log_entry(5, 0, [(BAT_AT, COMPLETE)])), log_version=9)
    vhdx.log_guid = UUID(int=0)
    assert await read(vhdx.write(tmp_path / "disk.vhdx"), workers) == TWO_BLOCKS
    vhdx.log_guid = LOG_ID
    assert "log version 9" in await refusal(vhdx.write(tmp_path / "disk.vhdx"), workers)


async def test_a_log_too_large_to_be_replayed(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.vhdx"
    image(log_length=17 * MIB).write(path)
    with open(path, "r+b") as file:
        file.truncate(32 * MIB)
    assert "a log of 17825792 bytes" in await refusal(path, workers)


async def test_a_log_full_of_entries_that_lie_about_their_length(
    tmp_path: Path, workers: Workers
) -> None:
    head = bytearray(log_entry(5, 0, [])[:64])
    struct.pack_into("<I", head, 8, MIB)
    lies = [(at, bytes(head)) for at in range(0, MIB, SECTOR)]
    path = image(*lies).write(tmp_path / "disk.vhdx")
    started = time.monotonic()
    assert "overlap" in await refusal(path, workers)
    assert time.monotonic() - started < 10  # 0.2 s on a quiet machine, 13 without a bound


async def test_a_log_that_zeroes_too_often(tmp_path: Path, workers: Workers) -> None:
    entry = log_entry(5, 0, [(PAYLOAD_AT, SECTOR)] * 1025)
    path = image((0, entry)).write(tmp_path / "disk.vhdx")
    assert "more than 1024 ranges" in await refusal(path, workers)


def test_reading_through_patches(tmp_path: Path) -> None:
    raw = data(1, 10 * SECTOR)
    (tmp_path / "file").write_bytes(raw)
    file = open_image_file(str(tmp_path / "file"))
    patches = [(SECTOR, 2 * SECTOR, b"p" * SECTOR), (2 * SECTOR, 4 * SECTOR, None)]
    patches += [(12 * SECTOR, 13 * SECTOR, b"q" * SECTOR)]
    size = 14 * SECTOR
    golden = raw[:SECTOR] + b"p" * SECTOR + bytes(2 * SECTOR) + raw[4 * SECTOR :]
    golden += bytes(2 * SECTOR) + b"q" * SECTOR + bytes(SECTOR)
    view = Replayed(file, size, patches)
    chance = random.Random(2)
    for _ in range(300):
        start = chance.randrange(size)
        length = chance.randrange(size - start + 1)
        assert view.read(start, length, "it") == golden[start : start + length]
        pieces = list(view.segments(start, length)) if length else []
        assert sum(piece.length for piece in pieces) == length
    with pytest.raises(DiskError, match="beyond the end"):
        view.read(size - 1, 2, "it")
    file.close()
