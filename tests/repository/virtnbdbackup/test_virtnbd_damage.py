"""Broken and hostile files: an error that says where, nothing wrong, nothing endless."""

import asyncio
import json
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.damage import Hurt
from nbdsrv.repository.repository import Point, Repository
from tests.disk.reading import content
from tests.disk.threads import running_workers
from tests.repository.virtnbdbackup.backups import Backups, frame, random_disk, stream
from tests.repository.virtnbdbackup.test_virtnbd_points import SIZE, by_id, chain, opened

UNIT = 256 << 10


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x55
    path.write_bytes(data)


async def readable(disk: Disk, golden: bytes, step: int = 4096) -> list[tuple[int, int]]:
    """The ranges that cannot be read; what can be is golden's."""
    broken: list[tuple[int, int]] = []
    for at in range(0, disk.size, step):
        length = min(step, disk.size - at)
        try:
            found = await content(disk, at, length)
        except DiskError as error:
            _expected(error)
            if broken and broken[-1][0] + broken[-1][1] == at:
                broken[-1] = broken[-1][0], broken[-1][1] + length
            else:
                broken.append((at, length))
        else:
            assert found == golden[at : at + length], f"wrong bytes at {at}"
    return broken


def _expected(error: DiskError) -> None:
    assert isinstance(error, CorruptImage), repr(error)
    assert "\n" not in str(error)


async def only(repository: Repository, id_: str) -> tuple[Point, Disk]:
    point = by_id(tuple(await repository.points()))[id_]
    return point, await repository.open_disk(point, point.disks[0].name)


async def test_a_flipped_bit_spoils_what_depends_on_it(tmp_path: Path, workers: Workers) -> None:
    made = Backups(tmp_path, random_disk(SIZE), packed=2, max_request=1 << 20)
    made.full()
    data = made.written.read_bytes()
    made.change(1_500_000, b"newer" * 10_000)
    made.increment()
    full = tmp_path / "vda.full.data"
    second = data.index(b"\x04\x22\x4d\x18", data.index(b"\x04\x22\x4d\x18") + 1)
    flip(full, second + 200)
    repository = await opened(tmp_path, workers)
    check = await repository.verify("chunks")
    for id_ in made.golden:
        _, disk = await only(repository, id_)
        broken = await readable(disk, made.golden[id_])
        assert broken, "LZ4 proves it"
        assert sum(length for _, length in broken) <= 1 << 20, "one frame at most"
        (finding,) = check.findings
        assert finding.key == "vda.full.data"
        assert "checksum is wrong" in finding.text
        (hurt,) = (each for each in finding.hurts if each.point.endswith(id_))
        assert hurt.ranges == _coarse(disk, broken, hurt)
        await disk.close()
    structure = await repository.verify("structure")
    assert structure.findings == []
    assert any("reads no data" in sentence for sentence in structure.unchecked)
    await repository.close()


def _coarse(disk: Disk, broken: list[tuple[int, int]], hurt: Hurt) -> list[tuple[int, int]]:
    """The told ranges, if reads of 4 KiB fail just where one of them is touched."""
    touched = {at // 4096 for start, n in hurt.ranges for at in range(start, start + n)}
    failed = {at // 4096 for start, n in broken for at in range(start, start + n)}
    return hurt.ranges if touched == failed else [(-1, disk.size)]


@pytest.mark.parametrize("packed", [False, 2])
async def test_a_file_that_was_cut_short(
    tmp_path: Path, workers: Workers, *, packed: int | bool
) -> None:
    made = Backups(tmp_path, random_disk(SIZE), packed=packed)
    made.full()
    made.change(SIZE - 5000, b"newer than what was lost" * 100)
    made.increment()
    full = tmp_path / "vda.full.data"
    full.write_bytes(full.read_bytes()[: full.stat().st_size // 2])
    repository = await opened(tmp_path, workers)
    for id_, golden in made.golden.items():
        point, disk = await only(repository, id_)
        assert "partial" in point.flags
        assert "was cut short" in str(point.facts["reason"])
        broken = await readable(disk, golden)
        assert sum(n for _, n in broken) < SIZE if not packed else broken
        if id_ == "virtnbdbackup.1":
            assert await content(disk, SIZE - 5000, 2400) == golden[SIZE - 5000 : SIZE - 2600]
        await disk.close()
    (finding,) = (await repository.verify("structure")).findings
    assert {hurt.point.rpartition("/")[2] for hurt in finding.hurts} == made.golden.keys()
    await repository.close()


async def test_the_sum_beside_a_file(tmp_path: Path, workers: Workers) -> None:
    made = Backups(tmp_path, random_disk(SIZE))
    made.full()
    made.checksum()
    made.change(0, b"x")
    made.increment()
    repository = await opened(tmp_path, workers)
    sound = await repository.verify("packs")
    assert sound.findings == []
    assert any("1 files have no .chksum" in each for each in sound.unchecked)
    flip(tmp_path / "vda.full.data", SIZE // 2)
    (finding,) = (await repository.verify("packs")).findings
    assert "Adler-32" in finding.text
    assert [hurt.disk for hurt in finding.hurts] == ["vda", "vda"]
    points = [point for point in await repository.points() if point.id == "virtnbdbackup.1"]
    (finding,) = (await repository.verify("chunks", points)).findings
    assert len(finding.hurts) == 1
    assert (await repository.verify("chunks", points, "vdb")).findings == []
    await repository.close()


async def test_partial_files_are_a_note(tmp_path: Path, workers: Workers) -> None:
    Backups(tmp_path, random_disk(SIZE)).full()
    (tmp_path / "vda.inc.virtnbdbackup.1.data.partial").write_bytes(b"meta ")
    repository = await opened(tmp_path, workers)
    assert len(await repository.points()) == 1
    (note,) = (await repository.verify("structure")).notes
    assert note.key == "vda.inc.virtnbdbackup.1.data.partial"
    await repository.close()


async def test_an_unreadable_meta_frame(tmp_path: Path, workers: Workers) -> None:
    made = chain(tmp_path)
    (tmp_path / "vda.inc.virtnbdbackup.2.data").write_bytes(b"no stream at all" * 10)
    repository = await opened(tmp_path, workers)
    points = by_id(tuple(await repository.points()))
    assert points["virtnbdbackup.2"].flags == ("damaged",)
    assert "vda.inc.virtnbdbackup.2.data" in str(points["virtnbdbackup.2"].facts["reason"])
    _, disk = await only(repository, "virtnbdbackup.1")
    assert await readable(disk, made.golden["virtnbdbackup.1"], 1 << 20) == []
    await disk.close()
    findings = (await repository.verify("structure")).findings
    assert any("vda.inc.virtnbdbackup.2.data" in finding.key for finding in findings)
    await repository.close()


META: dict[str, object] = {
    "virtualSize": 1 << 20,
    "dataSize": 4096,
    "date": "2026-01-01T00:00:00",
    "diskName": "vda",
    "diskFormat": "qcow2",
    "checkpointName": "virtnbdbackup.0",
    "compressed": False,
    "compressionMethod": "lz4",
    "parentCheckpoint": "",
    "incremental": False,
    "streamVersion": 2,
}
BLOCK = b"b" * 4096


def _with(**changes: object) -> bytes:
    return stream(META | changes, [(0, 4096, BLOCK)])


def _raw(*frames: bytes, **changes: object) -> bytes:
    head = json.dumps(META | changes).encode()
    return b"".join([frame("meta", 0, len(head)), head, b"\r\n", *frames])


STOP = frame("stop", 0, 0)
HOSTILE = {
    "a meta frame of an exbibyte": frame("meta", 0, 1 << 60) + b"{}\r\n" + STOP,
    "a nest of lists": frame("meta", 0, 60_000) + b"[" * 60_000 + b"\r\n" + STOP,
    "a size that is negative": _with(virtualSize=-1),
    "a size that is a text": _with(virtualSize="1"),
    "a size beyond all": _with(virtualSize=1 << 70),
    "a disk named by a path": _with(diskName="../../etc"),
    "a checkpoint with a line break": _with(checkpointName="a\nb"),
    "an unknown packer": _with(compressed=2, compressionMethod="zip"),
    "an unknown version": _with(streamVersion=3),
    "its own parent": _with(incremental=True, parentCheckpoint="virtnbdbackup.0"),
    "an extent beyond the disk": _raw(frame("data", 1 << 20, 4096), BLOCK, b"\r\n", STOP),
    "an extent larger than the file": _raw(frame("data", 0, 1 << 19), BLOCK, b"\r\n", STOP),
    "an extent of nothing": _raw(frame("data", 0, 0), b"\r\n", STOP),
    "extents out of order": _raw(
        frame("data", 8192, 4096), BLOCK, b"\r\n", frame("zero", 4096, 4096), STOP
    ),
    "no end": _raw(frame("data", 0, 4096), BLOCK, b"\r\n"),
    "a list of an exbibyte": _raw(STOP, frame("comp", 0, 1 << 60), compressed=1),
    "a list of other things": _raw(
        frame("data", 0, 4096), BLOCK, STOP, b'[{"a":{}}]', b"\r\n", frame("comp", 0, 10),
        compressed=1,
    ),
    "packed sizes that are negative": _raw(
        frame("data", 0, 4096), BLOCK, STOP, b"[-99]", b"\r\n", frame("comp", 0, 5), compressed=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
async def test_hostile_files(tmp_path: Path, workers: Workers, what: str) -> None:
    (tmp_path / "vda.full.data").write_bytes(HOSTILE[what])
    repository = await opened(tmp_path, workers)
    await _survives(repository)
    (finding,) = (await repository.verify("chunks")).findings
    assert "vda.full.data" in finding.text
    await repository.close()


async def _survives(repository: Repository) -> None:
    for point in await repository.points():
        for facts in point.disks:
            try:
                disk = await repository.open_disk(point, facts.name)
            except DiskError as error:
                _expected(error)
                continue
            for at in range(0, min(disk.size, 4 << 20), 1 << 18):
                try:
                    await content(disk, at, min(1 << 18, disk.size - at))
                except DiskError as error:
                    _expected(error)
            await disk.close()


async def test_a_bomb_unpacks_to_no_more_than_its_place(tmp_path: Path, workers: Workers) -> None:
    import lz4.frame

    bomb = lz4.frame.compress(bytes(200 << 20), block_checksum=True, content_checksum=True)
    head = _raw(frame("data", 0, 4096), bomb, b"\r\n", STOP, compressed=1)
    text = str([len(bomb)]).encode()
    (tmp_path / "vda.full.data").write_bytes(head + text + b"\r\n" + frame("comp", 0, len(text)))
    repository = await opened(tmp_path, workers)
    (point,) = await repository.points()
    tracemalloc.start()
    disk = await repository.open_disk(point, "vda")
    with pytest.raises(CorruptImage, match="209715200 bytes in place of 4096"):
        await content(disk, 0, 4096)
    await repository.verify("chunks")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
    await disk.close()
    await repository.close()


async def test_a_link_out_of_the_directory_is_not_followed(
    tmp_path: Path, workers: Workers
) -> None:
    inside, outside = tmp_path / "in", tmp_path / "secret"
    inside.mkdir()
    made = Backups(inside, random_disk(SIZE))
    made.full()
    made.change(0, b"x")
    made.increment()
    made.written.rename(outside)
    made.written.symlink_to(outside)
    repository = await opened(inside, workers)
    assert [point.id for point in await repository.points()] == ["virtnbdbackup.0"]
    await repository.close()


async def test_a_file_that_is_replaced_after_it_was_listed(
    tmp_path: Path, workers: Workers
) -> None:
    made = Backups(tmp_path, random_disk(SIZE))
    made.full()
    repository = await opened(tmp_path, workers)
    (point,) = await repository.points()
    other = Backups(tmp_path, random_disk(SIZE, 9))
    other.hours = 5
    other.full()
    disk = await repository.open_disk(point, "vda")
    assert await content(disk, 0, SIZE) == bytes(other.disk), "it is listed anew at opening"
    await disk.close()
    await repository.close()


class Sound:
    """Files of a small chain, and what the disk was; too large to be shown by hypothesis."""

    def __init__(self, directory: Path) -> None:
        made = Backups(directory, random_disk(400_000, 4), packed=2, max_request=100_000)
        made.full()
        made.change(150_000, b"newer" * 9_000)
        made.packed = False
        made.increment()
        self.full = (directory / "vda.full.data").read_bytes()
        self.increment = made.written.read_bytes()
        self.golden = made.golden["virtnbdbackup.0"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


def test_a_stream_without_its_beginning_is_no_image(
    tmp_path_factory: pytest.TempPathFactory,
    sound: Sound,
) -> None:
    directory = tmp_path_factory.mktemp("changed")
    (directory / "vda.full.data").write_bytes(b"X" + sound.full[1:])
    asyncio.run(_read_all(directory, None))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), pieces=st.integers(1, 5))
def test_any_change_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory,
    sound: Sound,
    seed: int,
    pieces: int,
) -> None:
    chance = random.Random(seed)
    full = bytearray(sound.full)
    for _ in range(pieces):
        at = chance.choice((chance.randrange(len(full)), chance.randrange(400), len(full) - 80))
        kind = chance.randrange(4)
        if kind == 0:
            full[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            del full[at : at + chance.randrange(1, 50)]
        elif kind == 2:
            full[at:at] = chance.randbytes(chance.randrange(1, 50))
        else:
            full[at : at + 8] = chance.choice((b"ffffffff", b"00000000", b"\xff" * 8))
    directory = tmp_path_factory.mktemp("changed")
    (directory / "vda.full.data").write_bytes(full)
    (directory / "vda.inc.virtnbdbackup.1.data").write_bytes(sound.increment)
    asyncio.run(_read_all(directory, None))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_a_change_within_lz4_is_never_wrong_content(
    tmp_path_factory: pytest.TempPathFactory,
    sound: Sound,
    seed: int,
) -> None:
    chance = random.Random(seed)
    full = bytearray(sound.full)
    first = full.index(b"\x04\x22\x4d\x18")
    length = chance.randrange(1, 9)
    at = chance.randrange(first, first + 20_000)
    full[at : at + length] = chance.randbytes(length)
    directory = tmp_path_factory.mktemp("changed")
    (directory / "vda.full.data").write_bytes(full)
    asyncio.run(_read_all(directory, sound.golden))


async def _read_all(directory: Path, golden: bytes | None) -> None:
    async with running_workers(4) as workers:
        repository = await opened(directory, workers)
        await _survives(repository)
        await repository.verify("chunks")
        for point in await repository.points() if golden is not None else ():
            for facts in point.disks:
                disk = await repository.open_disk(point, facts.name)
                await readable(disk, golden)
                await disk.close()
        await repository.close()
