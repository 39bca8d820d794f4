"""Boot traces: recorded, kept with the points or beside the overlays, prefetched by the next."""

import asyncio
import json
import os
import random
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.raw import open_raw
from nbdsrv.overlay import recording
from nbdsrv.overlay.opening import open_overlay
from nbdsrv.overlay.prefetch import Prefetch
from nbdsrv.overlay.quiet import NOBODY, Quiet
from nbdsrv.overlay.recording import Recording
from nbdsrv.overlay.trace import UNIT, Trace, decode_trace, encode_trace, merged
from nbdsrv.overlay.trace_place import TracePlace
from tests.disk.check_disk import check_disk
from tests.overlay.bases import make_base
from tests.overlay.server import nbdsrv, nbdsrv_json, running_server, until, uri

MIB = 1 << 20
SIZE = 16 * MIB


# --- what a trace is -----------------------------------------------------------------------------


@given(st.lists(st.integers(0, 60), unique=True))
def test_ranges_are_the_units_in_their_order(units: list[int]) -> None:
    ranges = merged(units)
    assert [first + n for first, count in ranges for n in range(count)] == units
    ends = [first + count for first, count in ranges]
    assert all(end != first for end, (first, _) in zip(ends, ranges[1:], strict=False))


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 50)), max_size=50))
def test_a_trace_is_what_was_kept_of_it(ranges: list[tuple[int, int]]) -> None:
    trace = Trace(size=1 << 50, recorded=1.5, point="P", ranges=ranges)
    assert decode_trace(encode_trace(trace), "here") == trace


@given(st.binary(max_size=200))
def test_what_is_no_trace_is_told(data: bytes) -> None:
    with pytest.raises(CorruptImage, match="here"):
        decode_trace(data, "here")


@pytest.mark.parametrize(
    "fields",
    [
        {"v": 2},
        {"unit": 4096},
        {"size": -1},
        {"ranges": [[-1, 1]]},
        {"ranges": [[0, 0]]},
        {"ranges": [[0, 1 << 15], [1, 1]]},
        {"ranges": [[1 << 47, 1]]},
    ],
)
def test_numbers_that_make_no_sense_are_told(fields: dict[str, object]) -> None:
    good = {"v": 1, "size": MIB, "unit": UNIT, "ranges": [[0, 1]]}
    assert decode_trace(json.dumps(good).encode(), "here").units == 1
    with pytest.raises(CorruptImage, match="here"):
        decode_trace(json.dumps(good | fields).encode(), "here")


def test_ranges_end_with_the_disk() -> None:
    trace = Trace(size=SIZE, ranges=[(0, 2), (3, 4), (9, 1)])
    found = list(trace.byte_ranges(4 * UNIT + 100))
    assert found == [(0, 2 * UNIT), (3 * UNIT, UNIT + 100)]


# --- recording -----------------------------------------------------------------------------------


async def test_a_recording_base_is_a_disk_like_any_other(tmp_path: Path, workers: Workers) -> None:
    golden = make_base(tmp_path / "base", 3 * MIB + 700)

    async def open_() -> Recording:
        return Recording(await open_raw(str(tmp_path / "base"), workers, writable=False))

    await check_disk(open_, golden)


async def test_each_unit_is_seen_though_clients_read_by_address(
    tmp_path: Path, workers: Workers
) -> None:
    make_base(tmp_path / "base", SIZE)
    base = Recording(await open_raw(str(tmp_path / "base"), workers, writable=False))
    overlay = await open_overlay(base, str(tmp_path / "ov"), "disk", "base")
    for unit in (5, 3, 6, 5, 201):
        (run,) = await overlay.runs(unit * UNIT + 512, 4096)
        assert run.length <= UNIT - 512  # whoever reads on must ask again
    assert list(base.units) == [5, 3, 6, 201]
    epoch = overlay.epoch
    base.stop()
    assert overlay.epoch != epoch
    (run,) = await overlay.runs(5 * UNIT, 4096)
    assert run.length == 3 * UNIT
    assert list(base.units) == [5, 3, 6, 201]
    await overlay.close()


async def test_more_than_any_boot_reads_ends_the_recording(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MAX_UNITS", 30)
    make_base(tmp_path / "base", SIZE)
    base = Recording(await open_raw(str(tmp_path / "base"), workers, writable=False))
    await base.read_into(0, memoryview(bytearray(40 * UNIT)))
    assert base.overrun
    assert len(base.units) == 30
    await base.close()


async def test_a_load_that_is_no_boot_ends_the_recording(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MAX_ASKED", 50)
    make_base(tmp_path / "base", SIZE)
    base = Recording(await open_raw(str(tmp_path / "base"), workers, writable=False))
    for _ in range(60):
        await base.runs(UNIT, 512)
    assert base.overrun
    assert base.ended.is_set()
    await base.close()


# --- keeping and prefetching ---------------------------------------------------------------------


async def test_where_there_is_no_repository_it_lies_beside_the_overlays(
    tmp_path: Path, workers: Workers
) -> None:
    make_base(tmp_path / "base", MIB)
    base = await open_raw(str(tmp_path / "base"), workers, writable=False)
    place = TracePlace(base, str(tmp_path / "ov"), "/srv/base")
    assert await place.load() is None
    trace = Trace(size=MIB, ranges=[(1, 2)])
    await place.keep(trace)
    assert await place.load() == trace
    (file,) = (tmp_path / "ov" / ".traces").iterdir()
    file.write_bytes(b"rubbish")
    assert await place.load() is None
    other = TracePlace(base, str(tmp_path / "base" / "no"), "x")
    await other.keep(trace)  # nowhere: logged, and no error
    await base.close()
    assert nbdsrv("overlay", "ls", str(tmp_path / "ov")).count("\n") == 1


class Cached(Passthrough):
    """Writes down what it is asked to bring near."""

    def __init__(self, workers: Workers, inside: Passthrough) -> None:
        super().__init__(workers, inside)
        self.asked: list[tuple[int, int]] = []
        self.broken = -1

    async def cache(self, offset: int, length: int) -> None:
        if self.broken in range(offset, offset + length):
            raise DiskError("broken")
        self.asked.append((offset, length))


async def test_prefetching_keeps_the_order_and_within_the_cache(
    tmp_path: Path, workers: Workers
) -> None:
    make_base(tmp_path / "base", SIZE)
    base = Cached(workers, await open_raw(str(tmp_path / "base"), workers, writable=False))
    work = Prefetch(base, Quiet(NOBODY, 0.01))
    await work.run([(9 * MIB, MIB // 2), (100 * UNIT, UNIT), (0, 300_000)])
    starts = [offset for offset, _ in base.asked]
    assert starts == [9 * MIB, 9 * MIB + (256 << 10), 100 * UNIT, 0, 256 << 10]
    assert sum(length for _, length in base.asked) == work.done == MIB // 2 + UNIT + 300_000
    base.asked.clear()
    limit, workers.cache.limit = workers.cache.limit, 2 * MIB
    small = Prefetch(base, Quiet(NOBODY, 0.01))
    await small.run([(0, SIZE)])
    workers.cache.limit = limit
    assert small.done <= MIB
    base.broken = 5
    await Prefetch(base, Quiet(NOBODY, 0.01)).run([(0, 100)])  # who reads it will be told
    await base.close()


def repository_of(folder: Path, *options: str) -> str:
    make_base(folder / "sda.raw", SIZE)
    target = f"repo:{folder}/repo"
    nbdsrv("init", target, "--quiet", *options)
    nbdsrv("backup", str(folder / "sda.raw"), "--to", target, "--group", "a b", "--quiet")
    return target


def booted(folder: Path, socket: Path, export: str, units: list[int]) -> None:
    """Somebody reads these units in this order."""
    words = [word for unit in units for word in ("-c", f"read {unit * UNIT} 4k")]
    command = ["qemu-io", "-r", "-f", "raw", *words, uri(socket, export)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=30)
    del folder


UNITS = random.Random(5).sample(range(SIZE // UNIT), 40)


def test_the_next_boot_of_any_point_is_prefetched(tmp_path: Path) -> None:
    target = repository_of(tmp_path)
    socket, admin = tmp_path / "s", tmp_path / "admin"
    words = (target, "--overlay", str(tmp_path / "ov"))
    with running_server(socket, *words):
        booted(tmp_path, socket, "a b/sda@latest", UNITS)
    (trace,) = (tmp_path / "repo" / "traces").rglob("*.tr")
    assert trace.relative_to(tmp_path / "repo") == Path("traces/a%20b/sda.tr")
    # Another point, an overlay of its own, and another server.
    nbdsrv("backup", str(tmp_path / "sda.raw"), "--to", target, "--group", "a b", "--quiet")
    with running_server(socket, *words, "--admin-socket", str(admin)):
        client = subprocess.Popen(
            ["qemu-io", "-r", "-f", "raw", uri(socket, "a b/sda@latest")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )

        def prefetched() -> bool:
            document = json.loads(nbdsrv("status", "--json", "--socket", str(admin)))
            return [each["prefetched_bytes"] for each in document["overlays"]] == [40 * UNIT]

        asyncio.run(until(prefetched))
        client.communicate(b"quit\n", timeout=20)
    # Who has read next to nothing does not replace it.
    before = trace.read_bytes()
    with running_server(socket, *words):
        booted(tmp_path, socket, "a b/sda@latest", UNITS[:3])
    assert trace.read_bytes() == before


def test_who_goes_through_a_disk_in_order_does_not_boot(tmp_path: Path) -> None:
    target = repository_of(tmp_path)
    socket = tmp_path / "s"
    with running_server(socket, target, "--overlay", str(tmp_path / "ov")):
        booted(tmp_path, socket, "a b/sda@latest", sorted(UNITS))
    assert not (tmp_path / "repo" / "traces").exists()
    assert not (tmp_path / "ov" / ".traces").exists()


def test_a_repository_that_is_only_read_leaves_it_to_the_directory(tmp_path: Path) -> None:
    target = repository_of(tmp_path)
    traces = tmp_path / "repo" / "traces"
    traces.write_text("in the way")  # root may write everywhere
    socket = tmp_path / "s"
    with running_server(socket, target, "--overlay", str(tmp_path / "ov")):
        booted(tmp_path, socket, "a b/sda@latest", UNITS)
    assert os.listdir(tmp_path / "ov" / ".traces") == ["a%20b%2Fsda.json"]


def test_gc_and_verify_know_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDSRV_PASSPHRASE", "not a secret")
    target = repository_of(tmp_path, "--encrypt")
    socket = tmp_path / "s"
    with running_server(socket, target, "--overlay", str(tmp_path / "ov")):
        booted(tmp_path, socket, "a b/sda@latest", UNITS)
    (trace,) = (tmp_path / "repo" / "traces").rglob("*.tr")
    assert b"ranges" not in trace.read_bytes()
    assert "boot trace" not in nbdsrv("verify", target)
    nbdsrv("gc", target, "--quiet")
    good = trace.read_bytes()
    trace.write_bytes(good[:-40] + bytes(40))
    assert "a boot trace of no use" in nbdsrv("verify", target)
    nbdsrv("gc", target, "--quiet")
    assert not trace.exists()
    trace.write_bytes(good)
    nbdsrv("prune", target, "--keep-last", "1", "--quiet")
    nbdsrv("gc", target, "--quiet")
    assert trace.read_bytes() == good
    (point,) = nbdsrv_json("ls", target)
    (tmp_path / "repo" / "points" / "a%20b" / f"{point['point']}.pt").unlink()
    nbdsrv("gc", target, "--quiet")
    assert not trace.exists()
