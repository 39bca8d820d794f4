"""Clients that ask for much and give nothing back: memory stays bounded, others are served.

CVE-2005-3534 (oversize requests), CVE-2024-7409 (idle connections). Limits are DESIGN's: 1 000
idle clients under 150 MiB, a client that never reads holds bounded memory.
"""

import asyncio
import random
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import running
from served_images import MIB, Images, Serve
from serving import ServerProcess, eventually
from wire import Wire

from nbdsrv.net import stall
from nbdsrv.net.server import Limits
from protocol.constants import Command, Dialect, Errno

PATIENCE = 5.0
"""Seconds; what another client's small read may take beside the worst of neighbours."""


@pytest.fixture(autouse=True)
def enough_descriptors() -> Iterator[None]:
    """For a thousand sockets of our own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("the limit of descriptors is too low for these tests")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def server(serve: Serve, images: Images, tmp_path: Path) -> ServerProcess:
    """``big`` alone, for reading."""
    return serve(images.big, "--listen", f"unix:{tmp_path}/sock")


def quick(wire: Wire, images: Images) -> None:
    """Small reads of a well-behaved client, each within its time."""
    for n in range(20):
        started = time.monotonic()
        assert images.golden_big[n * MIB : n * MIB + 4096] == wire.read(n * MIB, 4096)
        assert time.monotonic() - started < PATIENCE


@pytest.mark.parametrize("stage", ["connected", "transmission"])
def test_1000_idle_connections(server: ServerProcess, images: Images, stage: str) -> None:
    for n in range(1000):
        wire = server.connect()
        if stage == "transmission":
            wire.enter("", Dialect(n % 3))
    quick(server.connect().enter(""), images)
    assert server.resident() < 150 * MIB


def test_1000_connections_that_were_busy_once(server: ServerProcess, images: Images) -> None:
    """Buffers belong to batches, not to connections."""
    for n in range(1000):
        wire = server.connect().enter("")
        assert len(wire.read(n % 39 * MIB, 100_000)) == 100_000
    quick(server.connect().enter(""), images)
    assert server.resident() < 150 * MIB


@pytest.mark.parametrize("length", [512, 4096, 60_000, MIB])
def test_client_that_never_reads(
    server: ServerProcess, images: Images, dialect: Dialect, length: int
) -> None:
    other = server.connect().enter("")
    quick(other, images)
    before = server.resident()
    hoarder = server.connect().enter("", dialect)
    stop = threading.Event()
    flood = threading.Thread(target=_flood, args=(hoarder, length, stop))
    flood.start()
    try:
        for _ in range(5):
            quick(other, images)
            assert server.resident() - before < 100 * MIB
    finally:
        stop.set()
        flood.join(20)
    quick(other, images)


def _flood(wire: Wire, length: int, stop: threading.Event) -> None:
    """Thousands of reads, no reply ever read; ends when the server takes no more."""
    wire.sock.settimeout(0.2)
    try:
        for n in range(5000):
            if stop.is_set():
                return
            wire.send(wire.prepare(Command.READ, n % 38 * MIB, length))
    except TimeoutError:
        return


@pytest.mark.parametrize("length", [4096, 32 * MIB])
def test_stalled_payload_beside_others(
    serve: Serve, images: Images, tmp_path: Path, length: int
) -> None:
    image = tmp_path / "image"
    image.write_bytes(images.golden_big)
    server = serve(image, "--write", "--listen", f"unix:{tmp_path}/sock")
    other = server.connect().enter("")
    before = server.resident()
    stalled = server.connect().enter("")
    data = random.Random(1).randbytes(length)
    stalled.send(stalled.prepare(Command.WRITE, 0, payload=data) + data[:100])
    quick(other, images)
    other.write(0, b"other")
    assert server.resident() - before < 64 * MIB
    stalled.send(data[100:])  # it was merely slow
    assert stalled.answer().error == Errno.OK
    assert data == other.read(0, length)


def test_memory_budget_holds_back_eight_large_writes(serve: Serve, tmp_path: Path) -> None:
    """Each is half the budget: they wait for each other, and all complete."""
    image = tmp_path / "image"
    image.write_bytes(b"")
    with image.open("r+b") as file:
        file.truncate(256 * MIB)
    where = ("--listen", f"unix:{tmp_path}/sock", "--memory", "64")
    server = serve(image, "--write", *where)
    before = server.resident()
    block = random.Random(1).randbytes(MIB)
    failures: list[BaseException] = []

    def write(n: int, wire: Wire) -> None:
        try:
            wire.write(n * 32 * MIB, bytes([n]) + block * 31 + block[1:])
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            failures.append(error)

    wires = [server.connect().enter("", Dialect(n % 3)) for n in range(8)]
    threads = [threading.Thread(target=write, args=pair) for pair in enumerate(wires)]
    for thread in threads:
        thread.start()
    peak = 0
    while any(thread.is_alive() for thread in threads):
        peak = max(peak, server.resident())
        threads[0].join(0.02)
        if not threads[0].is_alive():
            next((t for t in threads if t.is_alive()), threads[0]).join(0.02)
    assert not failures
    assert peak - before < 128 * MIB
    content = image.read_bytes()
    for n in range(8):
        assert content[n * 32 * MIB : n * 32 * MIB + MIB] == bytes([n]) + block[:-1]
        assert content[(n + 1) * 32 * MIB - MIB + 1 : (n + 1) * 32 * MIB] == block[1:]


def test_large_cold_reads_share_the_budget(serve: Serve, images: Images, tmp_path: Path) -> None:
    server = serve(images.big, "--listen", f"unix:{tmp_path}/sock", "--memory", "64")
    before = server.resident()
    wires = [server.connect().enter("", Dialect(n % 3)) for n in range(8)]
    for wire in wires:
        wire.send(wire.prepare(Command.READ, 5, 32 * MIB))
    for wire in wires:
        assert images.golden_big[5 : 5 + 32 * MIB] == wire.answer().data()
        assert server.resident() - before < 128 * MIB


@pytest.mark.parametrize("count", [50, 300])
def test_unread_status_of_a_fragmented_image(serve: Serve, tmp_path: Path, count: int) -> None:
    """One small request, a large reply: hundreds of them are not kept for one client."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        for n in range(4000):
            file.seek(n * 8192)
            file.write(b"x" * 4096)
        file.truncate(4000 * 8192)
    server = serve(image, "--listen", f"unix:{tmp_path}/sock")
    other = server.connect().enter("")
    wire = server.connect().enter("", Dialect.EXTENDED, "base:allocation")
    first = wire.call(Command.BLOCK_STATUS, 0, 4000 * 8192)
    assert len(next(iter(first.statuses.values()))) > 1000
    before = server.resident()
    ask = b"".join(wire.prepare(Command.BLOCK_STATUS, 0, 4000 * 8192) for _ in range(count))
    wire.send(ask)
    for _ in range(20):
        started = time.monotonic()
        assert other.read(0, 4096) == b"x" * 4096
        assert time.monotonic() - started < PATIENCE
    assert server.resident() - before < 100 * MIB
    for _ in range(count):
        assert wire.answer().statuses == first.statuses


# --- from inside, with less patience -------------------------------------------------------------


async def test_who_stalls_makes_room_for_who_waits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Half-sent payloads hold the whole budget; after a while without progress they must go."""
    monkeypatch.setattr(stall, "STALL_S", 0.3)
    image = tmp_path / "image"
    image.write_bytes(bytes(40 * MIB))
    socket = tmp_path / "sock"
    limits = Limits(memory=64 * MIB)
    async with running(socket, image, writable=True, limits=limits):
        wires = [Wire.connect(str(socket)) for _ in range(3)]
        try:
            for wire in wires:
                await asyncio.to_thread(wire.enter, "disk")
            for stalled in wires[:2]:
                header = stalled.prepare(Command.WRITE, 0, payload=bytes(30 * MIB))
                await asyncio.to_thread(stalled.send, header + bytes(MIB))
            await asyncio.to_thread(wires[2].write, 0, b"x" * (30 * MIB))
            assert await asyncio.to_thread(wires[2].read, 0, 5) == b"xxxxx"
        finally:
            for wire in wires:
                wire.close()


async def test_who_never_reads_makes_room_for_who_waits(
    images: Images, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A hundred unread replies of a MiB hold the whole budget."""
    monkeypatch.setattr(stall, "STALL_S", 0.3)
    image = tmp_path / "image"
    image.write_bytes(images.golden_big)
    socket = tmp_path / "sock"
    limits = Limits(memory=64 * MIB)
    async with running(socket, image, writable=True, limits=limits):
        wires = [Wire.connect(str(socket)) for _ in range(101)]
        try:
            for hoarder in wires[1:]:
                await asyncio.to_thread(hoarder.enter, "disk")
                batch = [hoarder.prepare(Command.READ, n * 60_000, 60_000) for n in range(200)]
                await asyncio.to_thread(hoarder.send, b"".join(batch))
            await asyncio.to_thread(wires[0].enter, "disk")
            await asyncio.to_thread(wires[0].write, 0, b"x" * (4 * MIB))
            assert await asyncio.to_thread(wires[0].read, 0, 5) == b"xxxxx"
        finally:
            for wire in wires:
                wire.close()


async def test_who_is_merely_slow_may_stay(
    images: Images, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nobody waits for its memory: a paused VM is no fault."""
    monkeypatch.setattr(stall, "STALL_S", 0.05)
    socket = tmp_path / "sock"
    async with running(socket, images.big):
        slow, idle = Wire.connect(str(socket)), Wire.connect(str(socket))
        try:
            await asyncio.to_thread(slow.enter, "disk")
            batch = [slow.prepare(Command.READ, n * MIB, MIB) for n in range(16)]
            await asyncio.to_thread(slow.send, b"".join(batch))
            await asyncio.to_thread(idle.enter, "disk")
            deadline = time.monotonic() + 0.5  # ten times as long as a stall
            while time.monotonic() < deadline:
                await asyncio.to_thread(idle.read, 0, 4096)
            for _ in batch:
                answer = await asyncio.to_thread(slow.answer)
                assert answer.error == Errno.OK
        finally:
            slow.close()
            idle.close()


def test_memory_returns_to_where_it_was(server: ServerProcess, images: Images) -> None:
    """Rounds of everything large: the second round costs nothing more than the first."""

    def round_() -> None:
        for n in range(6):
            wire = server.connect().enter("", Dialect(n % 3))
            wire.send(b"".join(wire.prepare(Command.READ, k, 16 * MIB) for k in range(3)))
            for _ in range(3):
                wire.answer()
        server.hang_up()

    round_()
    round_()
    before = server.resident()
    for _ in range(4):
        round_()
    assert eventually(lambda: server.resident() - before < 48 * MIB)
    quick(server.connect().enter(""), images)
