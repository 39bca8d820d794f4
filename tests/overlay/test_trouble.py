"""A full disk, a failing one, another base, another server, damaged files."""

import errno
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.export.grammar import parse_source
from nbdsrv.export.opener import open_source
from nbdsrv.overlay import journal
from nbdsrv.overlay.block_map import PAGE_BLOCKS, BlockMap, packed
from nbdsrv.overlay.facts import overlay_facts
from nbdsrv.overlay.files import Files
from nbdsrv.overlay.map_file import read_map
from nbdsrv.overlay.opening import open_overlay
from nbdsrv.overlay.overlay import Overlay
from nbdsrv.overlay.place import Place, directory_name, find_overlay
from tests.disk.reading import content
from tests.formats.xva.archive import Vdi, xva
from tests.overlay.bases import make_base, opener
from tests.overlay.server import nbdsrv

BLOCK = 4096
SIZE = 32 * BLOCK


class Failing(Files):
    """Raises ``error`` where ``when`` says so."""

    def __init__(self, call: str, error: int) -> None:
        self.call = call
        self.error = error
        self.broken = False

    def _fail(self, call: str) -> None:
        if self.broken and call == self.call:
            raise OSError(self.error, os.strerror(self.error))

    def write(self, fd: int, views: Sequence[memoryview | bytes], position: int) -> None:
        self._fail("write")
        if self.broken and self.call == "map" and os.fstat(fd).st_size < SIZE:
            super().write(fd, [bytes(views[0])[:7]], position)
            raise OSError(self.error, os.strerror(self.error))
        super().write(fd, views, position)

    def sync_data(self, fd: int) -> None:
        self._fail("sync_data")
        super().sync_data(fd)


async def test_a_full_disk_fails_one_write_only(tmp_path: Path, workers: Workers) -> None:
    base = make_base(tmp_path / "base", SIZE)
    files = Failing("write", errno.ENOSPC)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov", files=files)
    disk = await open_()
    await disk.write(0, memoryview(b"first" * 1000))
    files.broken = True
    with pytest.raises(DiskError) as caught:
        await disk.write(BLOCK * 9, memoryview(b"second" * 1000))
    assert caught.value.errno == errno.ENOSPC
    files.broken = False
    await disk.flush()
    await disk.close()
    disk = await open_()
    assert await content(disk, 0, SIZE) == b"first" * 1000 + base[5000:]
    await disk.close()


async def test_a_full_disk_at_a_flush_is_told_and_made_up_for(
    tmp_path: Path, workers: Workers
) -> None:
    base = make_base(tmp_path / "base", SIZE)
    files = Failing("map", errno.ENOSPC)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov", files=files)
    disk = await open_()
    await disk.write(0, memoryview(b"first" * 1000))
    files.broken = True
    for _ in range(2):
        with pytest.raises(DiskError) as caught:
            await disk.flush()
        assert caught.value.errno == errno.ENOSPC
    files.broken = False
    await disk.write(BLOCK * 3, memoryview(b"b" * BLOCK))
    await disk.flush()
    expected = b"first" * 1000 + base[5000 : BLOCK * 3] + b"b" * BLOCK + base[BLOCK * 4 :]
    await disk.close()
    disk = await open_()
    assert await content(disk, 0, SIZE) == expected
    await disk.close()


async def test_a_failed_sync_is_never_forgotten(tmp_path: Path, workers: Workers) -> None:
    make_base(tmp_path / "base", SIZE)
    files = Failing("sync_data", errno.EIO)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov", files=files)
    disk = await open_()
    await disk.write(0, memoryview(b"first" * 1000))
    await disk.flush()
    assert disk.place(0, 100) is not None
    files.broken = True
    with pytest.raises(DiskError) as caught:
        await disk.flush()
    assert caught.value.errno == errno.EIO
    files.broken = False
    with pytest.raises(DiskError, match="earlier flush failed"):
        await disk.flush()
    assert disk.place(0, 100) is None
    await disk.close()
    disk = await open_()
    await disk.flush()
    assert (await content(disk, 0, 5000)) == b"first" * 1000
    await disk.close()


async def test_another_base_is_refused(tmp_path: Path, workers: Workers) -> None:
    make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    disk = await open_()
    await disk.write(0, memoryview(b"x"))
    await disk.close()
    before = os.stat(tmp_path / "base")
    with (tmp_path / "base").open("r+b") as file:
        file.write(b"somebody else")
    with pytest.raises(DiskError, match="has been written to since"):
        await open_()
    os.utime(tmp_path / "base", ns=(before.st_atime_ns, before.st_mtime_ns))
    await (await open_()).close()
    os.truncate(tmp_path / "base", SIZE + 512)
    with pytest.raises(DiskError, match="its size is"):
        await open_()


@pytest.mark.parametrize("kind", ["vmdk extents", "qcow2 data file", "xva"])
async def test_files_that_a_base_lies_in_count_as_well(
    tmp_path: Path, workers: Workers, kind: str
) -> None:
    """The descriptor, the tables or the name stay as they are while the bytes are others."""
    base, holding = tmp_path / "base", tmp_path / "holding"
    if kind == "xva":
        disk = Vdi("Ref:2", "root", b"before".ljust(1 << 20, b"."), uuid="the-same")
        base.write_bytes(xva(disk))
        holding = base
    elif kind == "qcow2 data file":
        options = f"data_file={holding},data_file_raw=on,preallocation=metadata"
        command = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, base, "1M")
        subprocess.run(command, check=True)
    else:
        holding.write_bytes(b"before".ljust(1 << 20, b"."))
        base.write_text(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
            'createType="monolithicFlat"\nRW 2048 FLAT "holding" 0\n'
        )

    async def open_() -> Overlay:
        below = await open_source(parse_source(str(base)), workers)
        return await open_overlay(below, str(tmp_path / "ov"), "disk", str(base))

    overlay = await open_()
    await overlay.write(BLOCK, memoryview(b"x"))
    await overlay.close()
    await (await open_()).close()
    if kind == "xva":
        base.write_bytes(xva(replace(disk, content=b"behind".ljust(1 << 20, b"."))))
    else:
        with holding.open("r+b") as file:
            file.write(b"behind")
    with pytest.raises(DiskError, match="has been written to since"):
        await open_()


async def test_one_server_at_a_time(tmp_path: Path, workers: Workers) -> None:
    make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    disk = await open_()
    await disk.write(0, memoryview(b"x"))
    with pytest.raises(DiskError, match=f"in use by process {os.getpid()}") as caught:
        await open_()
    assert caught.value.errno == errno.EBUSY
    facts = overlay_facts(str(tmp_path / "ov" / "disk"))
    assert (facts.in_use, facts.pid) == (True, os.getpid())
    await disk.close()
    facts = overlay_facts(str(tmp_path / "ov" / "disk"))
    assert (facts.in_use, facts.pid, facts.dirty_bytes) == (False, 0, BLOCK)
    place = Place.take(str(tmp_path / "ov" / "disk"), create=False)
    place.remove()
    place.let_go()
    assert os.listdir(tmp_path / "ov") == []


async def test_looking_leaves_nothing(tmp_path: Path, workers: Workers) -> None:
    base = make_base(tmp_path / "base", SIZE)
    disk = await opener(workers, tmp_path / "base", tmp_path / "ov")()
    assert await content(disk, 0, SIZE) == base
    await disk.flush()
    await disk.close()
    assert os.listdir(tmp_path / "ov") == []


async def test_lost_description_is_no_reason_to_begin_anew(
    tmp_path: Path, workers: Workers
) -> None:
    make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    disk = await open_()
    await disk.write(0, memoryview(b"x" * BLOCK))
    await disk.close()
    (tmp_path / "ov" / "disk" / "overlay.json").rename(tmp_path / "kept")
    with pytest.raises(CorruptImage, match="is missing"):
        await open_()
    (tmp_path / "kept").rename(tmp_path / "ov" / "disk" / "overlay.json")
    await (await open_()).close()


@pytest.mark.parametrize("name", ["map", "data"])
async def test_a_missing_file_is_told_and_the_rest_can_be_dropped(
    tmp_path: Path, workers: Workers, name: str
) -> None:
    make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    disk = await open_()
    await disk.write(0, memoryview(b"x"))
    await disk.close()
    missing = tmp_path / "ov" / "disk" / name
    missing.unlink()
    with pytest.raises(CorruptImage, match=f"{missing} is missing"):
        await open_()
    nbdsrv("overlay", "drop", str(missing.parent))
    assert not missing.parent.exists()


@pytest.mark.parametrize("flushes", [0, 1, 2, 20])
async def test_a_frame_that_is_damaged_is_no_torn_end(
    tmp_path: Path, workers: Workers, flushes: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind the first frame, at which a bit flips, are ``flushes`` more."""
    base = make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    disk = await open_()
    map_ = tmp_path / "ov" / "disk" / "map"
    for at in range(flushes + 1):
        await disk.write(at * BLOCK, memoryview(b"new!" * (BLOCK // 4)))
        await disk.flush()
    kept = map_.read_bytes()  # as a power cut leaves it
    begin = kept.index(b"OVFR")
    await disk.close()
    (map_.parent / "recent").unlink(missing_ok=True)
    for bit in (0, 40, 90, 200, 250):
        torn = bytearray(kept)
        torn[begin + bit // 8] ^= 1 << bit % 8
        map_.write_bytes(torn)
        if not flushes:  # a power cut may have torn it
            caplog.clear()
            disk = await open_()
            assert f"cut off at {begin}: {len(kept) - begin} bytes" in caplog.text
            assert await content(disk, 0, SIZE) == base
            await disk.close()
            continue
        with pytest.raises(CorruptImage, match=f"at {begin}: .* is damaged.*-s {begin} "):
            await open_()
        assert map_.read_bytes() == torn
        os.truncate(map_, begin)
        disk = await open_()
        assert await content(disk, 0, SIZE) == base
        await disk.close()


@pytest.mark.parametrize("later", [False, True])
def test_frames_of_one_flush_may_be_torn_together(
    monkeypatch: pytest.MonkeyPatch, *, later: bool
) -> None:
    """All but the last are full. What comes behind them was written once they were on the disk."""
    monkeypatch.setattr(journal, "MAX_RECORDS", 4)
    monkeypatch.setattr(journal, "FULL_SIZE", journal.FRAME_SIZE + 4 * 16)
    records = [(at, at + 1, 1) for at in range(0, 40, 2)]
    tail, crc = b"", 0
    for number, count in enumerate((4, 4, 2, 1)[: 4 if later else 3], 1):
        data, crc = journal.frame(records[:count], number, crc, 7)
        tail += data
    assert later == journal.goes_on(b"torn" + tail[4:], 1, 7)
    second = tail[journal.FULL_SIZE :]
    assert later == journal.goes_on(b"torn" + second[4:], 2, 7)


@pytest.mark.parametrize("gone", [(), ("map",), ("map", "data")])
async def test_a_drop_that_was_cut_short_can_be_finished(
    tmp_path: Path, workers: Workers, gone: Sequence[str]
) -> None:
    """It was not listed, took its space, and its point stayed pinned."""
    make_base(tmp_path / "base", SIZE)
    disk = await opener(workers, tmp_path / "base", tmp_path / "ov")()
    await disk.write(0, memoryview(b"x" * BLOCK))
    await disk.close()
    path = tmp_path / "ov" / "disk"
    (path / "overlay.json").rename(path / "overlay.json.dropped")
    for name in gone:
        (path / name).unlink()
    nbdsrv("overlay", "ls", str(tmp_path / "ov"), code=3)
    assert "was dropped, but not to the end" in nbdsrv("overlay", "info", str(path), code=1)
    nbdsrv("overlay", "drop", str(path))
    assert os.listdir(tmp_path / "ov") == []


def test_a_directory_that_is_no_overlay_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "owner").write_text("of something else")
    assert "no such overlay" in nbdsrv("overlay", "drop", str(tmp_path), code=1)
    assert (tmp_path / "owner").read_text() == "of something else"


async def test_a_truncated_data_file_is_told(tmp_path: Path, workers: Workers) -> None:
    make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    disk = await open_()
    await disk.write(0, memoryview(b"x" * BLOCK))
    await disk.close()
    os.truncate(tmp_path / "ov" / "disk" / "data", SIZE - BLOCK)
    with pytest.raises(CorruptImage, match="truncated"):
        await open_()


@pytest.mark.parametrize(
    "changes",
    [{"format": 2}, {"size": -1}, {"id": "xy"}, {"base": []}, {"size": "big"}],
)
async def test_descriptions_that_make_no_sense(
    tmp_path: Path, workers: Workers, changes: dict[str, object]
) -> None:
    make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    disk = await open_()
    await disk.write(0, memoryview(b"x" * BLOCK))
    await disk.close()
    path = tmp_path / "ov" / "disk" / "overlay.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises((CorruptImage, UnsupportedImage)):
        await open_()


@pytest.fixture(scope="module")
def map_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A map with pages and frames."""
    from nbdsrv.overlay.map_file import MapFile, write_first_map

    path = tmp_path_factory.mktemp("map")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    files, id_ = Files(), bytes(range(16))
    write_first_map(files, fd, id_, SIZE)
    with (path / "map").open("rb") as file:
        replayed = read_map(file.fileno(), "map", id_, SIZE)
    map_file = MapFile(files, fd, "map", id_, SIZE, replayed)
    map_file.open()
    states = BlockMap()
    states.set(3, 9, 1)
    states.set(20, 21, 3)
    map_file.renew([(number, packed(page)) for number, page in states.pages()], [])
    map_file.append([(1, 2, 2), (9, 14, 1)])
    map_file.append([(30, 32, 3)])
    map_file.close()
    os.close(fd)
    return (path / "map").read_bytes()


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_map_is_an_error_or_ends_early(
    tmp_path: Path, map_bytes: bytes, data: st.DataObject
) -> None:
    """Never a traceback; and of what is shown, no state is one that nobody has written."""
    broken = bytearray(map_bytes)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(broken) - 1))
        broken[at] ^= data.draw(st.integers(1, 255))
    broken = (
        broken[: data.draw(st.integers(0, len(broken)))] if data.draw(st.booleans()) else broken
    )
    path = tmp_path / "map"
    path.write_bytes(broken)
    with path.open("rb") as file:
        try:
            found = read_map(file.fileno(), "map", bytes(range(16)), SIZE)
        except (CorruptImage, UnsupportedImage):
            return
    states = [found.states.get(block) for block in range(32)]
    told = [([0] * 3 + [1] * 6 + [0] * 11 + [3] + [0] * 11)]
    told.append([*told[0]])
    told[1][1:2], told[1][9:14] = [2], [1] * 5
    told.append([*told[1]])
    told[2][30:32] = [3, 3]
    assert states == told[found.frames]


@given(
    sets=st.lists(
        st.tuples(
            st.integers(0, 3 * PAGE_BLOCKS - 1), st.integers(1, PAGE_BLOCKS), st.integers(1, 5)
        ),
        max_size=12,
    )
)
def test_block_maps_are_arrays(sets: list[tuple[int, int, int]]) -> None:
    states, model = BlockMap(), bytearray(4 * PAGE_BLOCKS)
    for first, length, value in sets:
        states.set(first, first + length, value)
        model[first : first + length] = bytes([value]) * length
    assert states.counts[1:6] == [model.count(value) for value in range(1, 6)]
    again = BlockMap()
    for number, page in states.pages():
        assert again.restore(number, packed(page))
    for each in (states, again):
        found = bytearray()
        for first, end, value in each.stretches(0, len(model)):
            found += bytes([value]) * (end - first)
        assert found == model


def test_names_of_directories() -> None:
    names = ["", ".", "..", "a/b", "a%2Fb", "vm1/sda@latest", "x" * 300, "x" * 299 + "y", "%", "ä"]
    made = [directory_name(name) for name in names]
    assert len(set(made)) == len(made)
    for each in made:
        assert "/" not in each
        assert each not in {"", ".", ".."}
        assert len(os.fsencode(each)) <= 255
    assert directory_name("vm1/sda@latest") == "vm1%2Fsda%40latest"


def test_an_overlay_is_found_by_its_exports_name(tmp_path: Path) -> None:
    path = tmp_path / "ov" / directory_name("vm1/sda@latest")
    path.mkdir(parents=True)
    (path / "overlay.json").write_text("{}")
    assert find_overlay(f"{tmp_path}/ov/vm1/sda@latest") == str(path)
    assert find_overlay(f"{path}/") == str(path)
    dots = tmp_path / "ov" / directory_name("..")  # not the directory above
    dots.mkdir()
    (dots / "overlay.json").write_text("{}")
    assert find_overlay(f"{tmp_path}/ov/..") == str(dots)
    with pytest.raises(DiskError, match="no such overlay"):
        find_overlay(f"{tmp_path}/ov/vm1/sdb@latest")
