"""READs of what is not in memory, where there is io_uring."""

import asyncio
import os
import random
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from in_process import running
from wire import Wire

from nbdsrv.disk.ring import Ring
from nbdsrv.net import reads as reads_module
from nbdsrv.net.cold import ColdReads
from nbdsrv.net.fetched import MAX_FETCHING, SMALL
from nbdsrv.net.slow import SlowRequests
from protocol.constants import Command, CommandFlag, Dialect, Errno
from tests.disk.evicting import evict

SIZE = 4 << 20
PART = 4096
CLUSTER = 1 << 16
CONTENT = random.Random(7).randbytes(SIZE)


@pytest.fixture(autouse=True)
def needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdsrv.disk.ring.STALLED_S", 60.0)  # machines that run tests are busy
    ring = Ring.make()
    if ring is None:
        pytest.skip("this kernel has no io_uring for us")
    ring.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    return path


class Gate:
    """What ``Ring.submit`` does meanwhile: nothing, until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rings: list[Ring] = []
        self._submit = Ring.submit
        self._patch = patch

        def hold(ring: Ring) -> None:
            self.rings.append(ring)

        patch.setattr(Ring, "submit", hold)

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        self._patch.setattr(Ring, "submit", self._submit)
        for ring in self.rings:
            loop.call_soon(self._submit, ring)


@pytest.fixture
def gate() -> Iterator[Gate]:
    with pytest.MonkeyPatch.context() as patch:
        yield Gate(patch)


@pytest.fixture
def otherwise(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """READs that did not go this way."""
    went: list[str] = []
    cold, slow = ColdReads.begin, SlowRequests.start

    def begin(self: ColdReads, *args: object) -> None:
        went.append("cold")
        cold(self, *args)  # type: ignore[arg-type]

    def start(self: SlowRequests, *args: object) -> None:
        went.append("slow")
        slow(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ColdReads, "begin", begin)
    monkeypatch.setattr(SlowRequests, "start", start)
    return went


def enter(socket: Path, dialect: Dialect = Dialect.STRUCTURED) -> Wire:
    """A client, for whom it has been looked up where there is data."""
    wire = Wire.connect(str(socket)).enter("disk", dialect)
    assert wire.read(0, 1) == CONTENT[:1]
    return wire


def send(wire: Wire, wanted: Sequence[tuple[int, int]]) -> None:
    wire.send(b"".join(wire.prepare(Command.READ, *each) for each in wanted))


def ask(socket: Path, image: Path, wanted: Sequence[tuple[int, int]]) -> Wire:
    """A client that asks for these at once, none of which is in memory."""
    wire = enter(socket)
    evict(image)
    send(wire, wanted)
    return wire


def check(wire: Wire) -> None:
    """Everything asked for comes, and right."""
    for _ in range(len(wire.pending)):
        answer = wire.answer()
        at, length = answer.asked.offset, answer.asked.length
        assert answer.data() == CONTENT[at : at + length]


SCATTERED = [
    (number * 3 * SMALL % (SIZE - SMALL) + number, 1 + number * 977) for number in range(50)
]


@pytest.mark.parametrize("dialect", list(Dialect))
async def test_no_thread_is_needed(
    tmp_path: Path, image: Path, otherwise: list[str], dialect: Dialect
) -> None:
    async with running(tmp_path / "nbd", image) as server:
        wire = await asyncio.to_thread(enter, tmp_path / "nbd", dialect)
        evict(image)
        otherwise.clear()
        send(wire, SCATTERED)
        await asyncio.to_thread(check, wire)
        await asyncio.to_thread(wire.disconnect)
        await server.wait_empty()
        assert otherwise == []
        measures = server.measures["disk"]
        assert measures.departed.reads == 1 + len(SCATTERED)
        waited = sum(measures.reads.counts)
        counted = measures.departed.quick + waited
        assert counted in {len(SCATTERED), 1 + len(SCATTERED)}  # as in test_measures
        assert waited > len(SCATTERED) // 2
        assert measures.failed == 0


async def test_a_read_in_one_piece_and_one_of_several(tmp_path: Path, otherwise: list[str]) -> None:
    """Clusters that lie the other way round: no window holds two of them."""
    part, image = tmp_path / "part", tmp_path / "disk.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True, timeout=60
    )
    for at in range(SIZE - CLUSTER, -1, -CLUSTER):
        part.write_bytes(CONTENT[at : at + CLUSTER])
        write = f"write -q -s {part} {at} {CLUSTER}"
        subprocess.run(["qemu-io", "-c", write, image], check=True, timeout=60)
    async with running(tmp_path / "nbd", image):
        wanted = [(at - 1000, 3000) for at in range(CLUSTER, SIZE, CLUSTER)]
        wire = await asyncio.to_thread(ask, tmp_path / "nbd", image, wanted)
        await asyncio.to_thread(check, wire)
        await asyncio.to_thread(wire.disconnect)
    assert otherwise.count("cold") == 0


async def test_flags_come_back_with_it(tmp_path: Path, image: Path) -> None:
    async with running(tmp_path / "nbd", image):
        wire = await asyncio.to_thread(ask, tmp_path / "nbd", image, [(SMALL, PART)])
        wire.send(wire.prepare(Command.READ, 0, PART, CommandFlag.DF))
        await asyncio.to_thread(check, wire)
        await asyncio.to_thread(wire.disconnect)


async def test_what_has_gone_again_is_read_by_threads(
    tmp_path: Path, image: Path, otherwise: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> int:
        raise BlockingIOError

    async with running(tmp_path / "nbd", image):
        wire = await asyncio.to_thread(enter, tmp_path / "nbd")
        monkeypatch.setattr(reads_module, "_preadv", gone)
        otherwise.clear()
        send(wire, [(at, PART) for at in range(0, SIZE, SMALL)])
        await asyncio.to_thread(check, wire)
        await asyncio.to_thread(wire.disconnect)
    assert len(otherwise) >= SIZE // SMALL


async def test_more_than_the_kernel_is_given(
    tmp_path: Path, image: Path, gate: Gate, otherwise: list[str]
) -> None:
    """The rest goes to threads, which wait for nothing of it."""
    async with running(tmp_path / "nbd", image) as server:
        wanted = [(at, PART) for at in range(0, SIZE, 2 * PART)]
        wire = await asyncio.to_thread(ask, tmp_path / "nbd", image, wanted)
        answers = [await asyncio.to_thread(wire.answer) for _ in range(len(wanted) - MAX_FETCHING)]
        (client,) = server.sessions
        assert client._slow.in_flight == MAX_FETCHING
        gate.open(asyncio.get_running_loop())
        answers += [await asyncio.to_thread(wire.answer) for _ in range(MAX_FETCHING)]
        assert {(a.asked.offset, a.asked.length): a.data() for a in answers} == {
            (at, length): CONTENT[at : at + length] for at, length in wanted
        }
        await asyncio.to_thread(wire.disconnect)


async def test_a_client_that_leaves_meanwhile(tmp_path: Path, image: Path, gate: Gate) -> None:
    """The next one is served, and the server stops: nothing of the first is left."""
    async with running(tmp_path / "nbd", image) as server:
        wanted = [(at, PART) for at in range(0, SIZE, SMALL)]
        wire = await asyncio.to_thread(ask, tmp_path / "nbd", image, wanted)
        await begun(gate)
        wire.reset()
        await asyncio.sleep(0.05)
        assert len(server.sessions) == 1, "it is waited for"
        gate.open(asyncio.get_running_loop())
        again = await asyncio.to_thread(ask, tmp_path / "nbd", image, wanted)
        await asyncio.to_thread(check, again)
        await asyncio.to_thread(again.disconnect)
        await server.wait_empty()


@pytest.mark.parametrize("way", ["it is told to", "its client says goodbye"])
async def test_all_is_answered_before_the_end(
    tmp_path: Path, image: Path, gate: Gate, way: str
) -> None:
    async with running(tmp_path / "nbd", image, stop=False) as server:
        wanted = [(at, PART) for at in range(0, SIZE, SMALL)]
        wire = await asyncio.to_thread(ask, tmp_path / "nbd", image, wanted)
        await begun(gate)
        if way == "its client says goodbye":
            wire.request(Command.DISC)
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0.05)
        gate.open(asyncio.get_running_loop())
        await asyncio.to_thread(check, wire)
        assert await asyncio.to_thread(wire.is_closed)
        wire.close()
        await stopping


async def begun(gate: Gate) -> None:
    async with asyncio.timeout(20):
        while not gate.rings:
            await asyncio.sleep(0.001)


async def test_a_file_that_has_become_shorter(tmp_path: Path, image: Path, gate: Gate) -> None:
    """What is left is read, the rest is an error."""
    async with running(tmp_path / "nbd", image):
        wanted = [(0, PART), (SIZE - SMALL, PART)]
        wire = await asyncio.to_thread(ask, tmp_path / "nbd", image, wanted)
        await begun(gate)
        os.truncate(image, SIZE // 2)
        gate.open(asyncio.get_running_loop())
        answers = [await asyncio.to_thread(wire.answer) for _ in wanted]
        assert {a.asked.offset: a.error for a in answers} == {0: Errno.OK, wanted[1][0]: Errno.EIO}
        await asyncio.to_thread(wire.disconnect)


async def test_while_a_thread_has_the_connection(
    tmp_path: Path, image: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only it sends; what has come meanwhile is answered when it gives the connection back."""
    storing, pwrite = threading.Event(), os.pwrite
    stored = threading.Event()

    def wait(fd: int, data: bytes, position: int) -> int:
        storing.set()
        assert stored.wait(20)
        return pwrite(fd, data, position)

    async with running(tmp_path / "nbd", image, writable=True) as server:
        wire = await asyncio.to_thread(ask, tmp_path / "nbd", image, [(SMALL, PART)])
        await begun(gate)
        monkeypatch.setattr(os, "pwrite", wait)
        wire.send(wire.prepare(Command.WRITE, 0, payload=bytes(PART)) + bytes(PART))
        assert await asyncio.to_thread(storing.wait, 20)
        (client,) = server.sessions
        assert client._writes.lent
        gate.open(asyncio.get_running_loop())
        async with asyncio.timeout(20):
            while client._slow.in_flight:
                await asyncio.sleep(0.001)
        wire.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            wire.receive(1)
        wire.sock.settimeout(20)
        stored.set()
        found = {a.asked.offset: a for a in [await asyncio.to_thread(wire.answer) for _ in "ab"]}
        assert found[SMALL].data() == CONTENT[SMALL : SMALL + PART]
        assert found[0].error == Errno.OK
        await asyncio.to_thread(wire.disconnect)


@pytest.mark.parametrize("dialect", list(Dialect))
async def test_beside_writes_of_the_same_client(
    tmp_path: Path, image: Path, dialect: Dialect
) -> None:
    """Threads have the connection for these, again and again, while reads are under way."""
    chance = random.Random(dialect)
    content = bytearray(CONTENT)

    def talk() -> None:
        wire = Wire.connect(str(tmp_path / "nbd")).enter("disk", dialect)
        for _ in range(60):
            evict(image)
            wanted: dict[int, bytes] = {}
            places = list(range(0, SIZE, SMALL))
            chance.shuffle(places)  # each once: in whatever order they are carried out
            sent = b""
            for place in places[:40]:
                at, length = place + chance.randrange(SMALL // 2), chance.randrange(1, SMALL // 2)
                if chance.random() < 0.3:
                    data = chance.randbytes(length)
                    sent += wire.prepare(Command.WRITE, at, payload=data) + data
                    content[at : at + length] = data
                else:
                    sent += wire.prepare(Command.READ, at, length)
                    wanted[at] = bytes(content[at : at + length])
            sending = threading.Thread(target=wire.send, args=(sent,))
            sending.start()
            for _ in range(40):
                answer = wire.answer()
                assert answer.error == Errno.OK
                if answer.asked.command == Command.READ:
                    assert answer.data() == wanted[answer.asked.offset]
            sending.join()
        wire.disconnect()

    async with running(tmp_path / "nbd", image, writable=True):
        await asyncio.to_thread(talk)
    assert image.read_bytes() == content
