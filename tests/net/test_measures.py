"""Counting: percentiles against sorting, and the server's counts against its clients'."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process import running
from wire import Wire

from nbdsrv.net.measures import (
    BUCKETS,
    Histogram,
    Tally,
    bucket_end,
    percentile,
    weighted,
)
from protocol.constants import Command, Dialect, Errno

SECONDS = st.floats(1e-8, 100)


@given(SECONDS)
def test_a_wait_lies_in_its_bucket(seconds: float) -> None:
    histogram = Histogram()
    histogram.add(seconds)
    (bucket,) = [n for n, count in enumerate(histogram.counts) if count]
    assert bucket_end(bucket - 1) * (1 - 1e-9) - 1e-9 <= seconds <= bucket_end(bucket) + 1e-9
    assert bucket_end(bucket) / bucket_end(bucket - 1) < 1.26


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e6])
def test_the_ends_of_the_scale(seconds: float) -> None:
    histogram = Histogram()
    histogram.add(seconds, 3)
    assert sum(histogram.counts) == 3


@given(st.lists(SECONDS, min_size=1, max_size=200), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_percentiles_are_those_of_a_sorted_list(waits: list[float], share: float) -> None:
    histogram = Histogram()
    for wait in waits:
        histogram.add(wait)
    found = percentile(histogram.counts, share)
    rank = max(1, -int(-len(waits) * share // 1))
    exact = sorted(waits)[rank - 1]
    assert found is not None
    assert exact / 1.26 <= found <= exact * 1.26


def test_nothing_has_no_percentile() -> None:
    assert percentile([0] * BUCKETS, 0.5) is None


def test_a_sample_stands_for_all() -> None:
    assert weighted([1, 3, 0], 8, [0, 1, 5]) == [2.0, 7.0, 5.0]
    assert weighted([0, 0], 8, [1, 2]) == [1.0, 2.0]


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize("watched", [False, True])
async def test_what_is_counted_is_what_was_moved(
    tmp_path: Path, dialect: Dialect, watched: bool
) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(range(256)) * 4096)  # 1 MiB

    def talk(path: str) -> Tally:
        counting = _Counting.connect(path)
        wire = counting.enter("disk", dialect)
        before = counting.moved()
        for n in range(20):
            wire.read(n * 512, 512)
            wire.read(0, 1 << 17)
        wire.read(0, 0)
        for n in range(10):
            wire.write(n * 4096, b"x" * 4096)
        wire.write(0, b"y" * 100_000)
        assert wire.call(Command.FLUSH).error == Errno.OK
        assert wire.call(Command.TRIM, 0, 4096).error == Errno.OK
        assert wire.call(Command.READ, 1 << 40, 512).error == Errno.EINVAL
        moved = counting.moved()
        wire.disconnect()
        size = 32 if dialect is Dialect.EXTENDED else 28
        return Tally(
            received=moved.received - before.received + size,  # DISC
            sent=moved.sent - before.sent,
        )

    async with running(tmp_path / "sock", image, writable=True) as server:
        if watched:
            server.watch()
        moved = await asyncio.to_thread(talk, str(tmp_path / "sock"))
        await server.wait_empty()
        measures = server.measures["disk"]
    tally = measures.departed
    assert (tally.received, tally.sent) == (moved.received, moved.sent)
    assert (tally.reads, tally.writes, tally.others, tally.refused) == (41, 11, 2, 1)
    assert measures.attached == 1
    assert sum(measures.writes.counts) == 11
    assert sum(measures.others.counts) == 2
    waited = sum(measures.reads.counts)
    assert tally.quick + waited in {40, 41}  # nothing is read for an empty one
    assert sum(measures.quick.counts) <= tally.quick


class _Counting(Wire):
    """Counts what the server must have counted."""

    def moved(self) -> Tally:
        return Tally(received=self.out, sent=self.back)

    out = 0
    back = 0

    def send(self, data: bytes) -> None:
        self.out += len(data)
        super().send(data)

    def receive(self, length: int) -> bytes:
        self.back += length
        return super().receive(length)


async def test_a_watched_client_has_its_turns_timed(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))

    def talk(path: str) -> None:
        wire = Wire.connect(path).enter("disk")
        for n in range(200):
            wire.read(n * 512, 512)
        wire.disconnect()

    async with running(tmp_path / "sock", image) as server:

        def watch() -> None:
            for client in server.sessions:
                client.watch()
            again = asyncio.get_running_loop().call_later(0.001, watch)
            timers.append(again)

        timers: list[asyncio.TimerHandle] = []
        watch()
        await asyncio.to_thread(talk, str(tmp_path / "sock"))
        timers[-1].cancel()
        await server.wait_empty()
        measures = server.measures["disk"]
        assert 0 < sum(measures.quick.counts) <= measures.departed.quick
        value = percentile(measures.quick.counts, 0.5)
        assert value is not None
        assert 0 < value < 1
