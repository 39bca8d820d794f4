"""The QMP client: with a real QEMU, and with peers that break every rule."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.source import qmp
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.qemu import QemuVm
from nbdsrv.source.qmp import QmpClient, QmpLost, QmpRefused, open_qmp
from tests.source.virtual_machine import machine

GREETING = {"QMP": {"version": {"qemu": {"major": 9, "minor": 1, "micro": 2}}, "capabilities": []}}
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def peer(path: Path, talk: Talk) -> AsyncIterator[str]:
    """A server whose every connection is ``talk``."""
    talks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                await talk(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(serve(reader, writer))
        talks.add(task)
        task.add_done_callback(talks.discard)

    server = await asyncio.start_unix_server(accept, str(path))
    try:
        yield str(path)
    finally:
        server.close()
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)


def line(what: object) -> bytes:
    return json.dumps(what).encode() + b"\n"


def answering(answer: Callable[[dict], bytes]) -> Talk:
    """Greets, negotiates, and gives ``answer`` to everything else."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(line(GREETING))
        asked = json.loads(await reader.readline())
        writer.write(line({"return": {}, "id": asked["id"]}))
        while asked := await reader.readline():
            writer.write(answer(json.loads(asked)))
            await writer.drain()

    return talk


# --- a real one --------------------------------------------------------------------------------


async def test_a_real_qemu(tmp_path: Path) -> None:
    async with machine(tmp_path, ()) as guest:
        client = await open_qmp("vm", path=guest.monitor)
        assert client.version >= (5, 2, 0)
        assert client.peer is not None
        assert client.peer[0] == guest.process.pid
        names, status = await asyncio.gather(
            client.execute("query-name"), client.execute("query-status")
        )
        assert names == {"name": "vm1"}
        assert status["status"] == "prelaunch"
        with pytest.raises(QmpRefused, match=r"vm: query-nothing: The command .* not been found"):
            await client.execute("query-nothing")
        with pytest.raises(QmpRefused) as refused:
            await client.execute("blockdev-del", {"node-name": "none"})
        assert refused.value.kind == "GenericError"
        events: list[str] = []
        client.on_event = lambda name, _data: events.append(name)
        await client.execute("cont")

        async def resumed() -> bool:
            return "RESUME" in events

        await client.until(resumed, "resuming")
        await client.execute("quit")

        async def over() -> bool:
            return bool(client.lost)

        await client.until(over, "the end")
        with pytest.raises(QmpLost, match="QEMU has closed the connection; has it ended"):
            await client.execute("query-status")
        await client.close()
        await client.close()
        guest.process.wait()


async def test_a_second_client_of_a_monitor_is_told_why_it_waits(tmp_path: Path) -> None:
    async with machine(tmp_path, ()) as guest:
        client = await open_qmp("vm", path=guest.monitor)
        with pytest.raises(SourceError, match="one client at a time"):
            await open_qmp("vm", path=guest.monitor, timeout_s=0.2)
        await client.close()
        await (await open_qmp("vm", path=guest.monitor)).close()


# --- hostile ones ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (b"NBDMAGIC\n", "what comes is not QMP"),
        (b"[]\n", "what comes is not QMP"),
        (b"{}\n", "not a QMP monitor"),
        (b'{"QMP": {"version": {"qemu": {"major": "x"}}}}\n', "not a QMP monitor"),
        (b'{"QMP": {"version": []}}\n', "not a QMP monitor"),
        (b'{"QMP": {"version": {"qemu": {"major": 1e999, "minor": 1, "micro": 1}}}}\n', "QMP"),
        (b'{"a":' * 100_000 + b"\n", "what comes is not QMP"),
        (b"\xff\xfe\n", "what comes is not QMP"),
        (b"", "closed the connection"),
        (b'{"QMP": ', "closed the connection"),
    ],
)
async def test_what_is_no_greeting(tmp_path: Path, said: bytes, complaint: str) -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await writer.drain()

    async with peer(tmp_path / "sock", talk) as path:
        with pytest.raises(SourceError, match=complaint) as raised:
            await open_qmp("vm", path=path)
    assert "\n" not in str(raised.value)


async def test_silence(tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with peer(tmp_path / "sock", talk) as path:
        with pytest.raises(SourceError, match=r"no greeting in 0\.1 s"):
            await open_qmp("vm", path=path, timeout_s=0.1)
    with pytest.raises(SourceError, match="is the VM running"):
        await open_qmp("vm", path=str(tmp_path / "none"))


async def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "MAX_LINE", 1 << 16)

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async with peer(tmp_path / "sock", talk) as path:
        with pytest.raises(QmpLost, match="a line of more than"):
            await open_qmp("vm", path=path)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ({"return": {}, "id": 99}, "nothing that was asked"),
        ({"return": {}, "id": [1]}, "nothing that was asked"),
        ({"return": {}}, "nothing that was asked"),
        ({"id": 2}, "without return or error"),
        ({"id": 2, "error": "no"}, "without return or error"),
        ({"QMP": {}}, "without return or error"),
    ],
)
async def test_an_answer_that_is_none_ends_the_connection(
    tmp_path: Path, answer: dict, complaint: str
) -> None:
    async with peer(tmp_path / "sock", answering(lambda _: line(answer))) as path:
        client = await open_qmp("vm", path=path)
        with pytest.raises(QmpLost, match=complaint):
            await client.execute("query-status")
        with pytest.raises(QmpLost, match=complaint):
            await client.execute("query-status")
        await client.close()


async def test_a_real_qemu_after_somebody_who_did_not_wait(tmp_path: Path) -> None:
    """Every third time or so it tells us what they asked."""
    async with machine(tmp_path, ()) as guest:
        for _ in range(20):
            reader, writer = await asyncio.open_unix_connection(guest.monitor)
            await reader.readline()
            writer.write(line({"execute": "qmp_capabilities", "id": 1}))
            writer.write(line({"execute": "query-qmp-schema", "id": 1}))
            await writer.drain()
            writer.transport.abort()
            client = await open_qmp("vm", path=guest.monitor)
            assert (await client.execute("query-status"))["status"] == "prelaunch"
            await client.close()


@pytest.mark.parametrize("stale", [1, "1", "5f2c-1", None, [1]])
async def test_what_somebody_before_us_asked_is_not_answered_to_us(
    tmp_path: Path, stale: object
) -> None:
    """QEMU had a command of theirs in work when they were killed."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(line(GREETING))
        writer.write(line({"return": "theirs", "id": stale}))
        asked = json.loads(await reader.readline())
        error = {"class": "GenericError", "desc": "theirs"}
        writer.write(line({"error": error, "id": stale}))
        writer.write(line({"return": {}, "id": asked["id"]}))
        asked = json.loads(await reader.readline())
        writer.write(line({"return": "ours", "id": asked["id"]}))
        await reader.read()

    async with peer(tmp_path / "sock", talk) as path:
        client = await open_qmp("vm", path=path)
        assert await client.execute("query-status") == "ours"
        await client.close()


async def test_a_cancellation_that_comes_with_an_event(tmp_path: Path) -> None:
    async def never() -> bool:
        return False

    async with peer(tmp_path / "sock", answering(lambda _: b"")) as path:
        client = await open_qmp("vm", path=path)
        for waiting in (client.until(never, "the last day"), client.stirred(60)):
            task = asyncio.create_task(waiting)
            await asyncio.sleep(0.01)
            client._stirred.set()
            task.cancel()
            async with asyncio.timeout(10):
                await asyncio.wait([task])
            assert task.cancelled()
        await client.close()


async def test_an_error_that_says_little(tmp_path: Path) -> None:
    def answer(asked: dict) -> bytes:
        return line({"id": asked["id"], "error": {"desc": ["a\nb"]}})

    async with peer(tmp_path / "sock", answering(answer)) as path:
        client = await open_qmp("vm", path=path)
        with pytest.raises(QmpRefused) as raised:
            await client.execute("query-status")
        assert "\n" not in str(raised.value)
        await client.close()


async def test_a_late_answer_is_passed_by(tmp_path: Path) -> None:
    held: list[bytes] = []

    def answer(asked: dict) -> bytes:
        held.append(line({"return": asked["execute"], "id": asked["id"]}))
        return b"" if asked["execute"] == "slow" else b"".join(held)

    async with peer(tmp_path / "sock", answering(answer)) as path:
        client = await open_qmp("vm", path=path)
        with pytest.raises(SourceError, match=r"no answer to slow in 0\.05 s"):
            await client.execute("slow", timeout_s=0.05)
        assert await client.execute("fast") == "fast"
        await client.close()


async def test_a_flood_of_events_is_not_kept(tmp_path: Path) -> None:
    def answer(asked: dict) -> bytes:
        events = line({"event": "X", "data": "none"}) * 10_000
        return events + line({"return": 1, "id": asked["id"]})

    async with peer(tmp_path / "sock", answering(answer)) as path:
        client = await open_qmp("vm", path=path)
        seen = 0

        def count(_name: str, data: object) -> None:
            nonlocal seen
            assert data == {}
            seen += 1

        client.on_event = count
        assert await client.execute("query-status") == 1
        assert seen == 10_000

        async def never() -> bool:
            return False

        with pytest.raises(SourceError, match=r"the impossible takes more than 0\.05 s"):
            await client.until(never, "the impossible", timeout_s=0.05)
        await client.close()


async def test_closing_ends_what_waits(tmp_path: Path) -> None:
    async with peer(tmp_path / "sock", answering(lambda _: b"")) as path:
        client: QmpClient = await open_qmp("vm", path=path)
        waiting = asyncio.create_task(client.execute("query-status"))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(QmpLost, match="closed"):
            await waiting


@pytest.mark.parametrize("nonsense", [None, 1, "x", [], {}, [1], [{}], [[]], {"id": 1}, [None]])
@pytest.mark.parametrize("sane", [0, 3, 7])
async def test_a_vm_whose_answers_make_no_sense(
    tmp_path: Path, workers: Workers, nonsense: object, sane: int
) -> None:
    """The first answers are QEMU's, all others are not."""
    first = iter((SANE * 3)[:sane])

    def answer(asked: dict) -> bytes:
        return line({"return": next(first, nonsense), "id": asked["id"]})

    async with peer(tmp_path / "sock", answering(answer)) as path:
        vm = QemuVm(f"{path}?scratch={tmp_path}", workers)
        with pytest.raises(SourceError) as raised:
            await vm.freeze({}).__aenter__()
        assert "\n" not in str(raised.value)


SANE: list[object] = [[], [], [], [], {"name": "vm"}, [], {}, {}]
"""What a QEMU answers in which nothing was left behind: exports, jobs twice, nodes, its name."""


@pytest.mark.parametrize("asked_before", [True, False])
async def test_in_a_hurry_a_silent_one_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, asked_before: bool
) -> None:
    monkeypatch.setattr(qmp, "HURRY_S", 0.2)
    async with peer(tmp_path / "sock", answering(lambda _: b"")) as path:
        client = await open_qmp("vm", path=path)
        waiting = asyncio.create_task(client.execute("query-name")) if asked_before else None
        await asyncio.sleep(0)
        client.hurry()
        client.hurry()
        for asked in (waiting or client.execute("query-name"), client.execute("query-status")):
            with pytest.raises(QmpLost, match=r"vm: QEMU has not answered for 0\.2 s"):
                await asked
        await client.close()


async def test_in_a_hurry_one_that_answers_is_asked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "HURRY_S", 0.2)
    talk = answering(lambda asked: line({"return": asked["execute"], "id": asked["id"]}))
    async with peer(tmp_path / "sock", talk) as path:
        client = await open_qmp("vm", path=path)
        client.hurry()
        await asyncio.sleep(0.4)
        assert await client.execute("query-name") == "query-name"
        await client.close()
