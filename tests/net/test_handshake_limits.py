"""What a client may cost before it has an export: bytes, seconds, connections, descriptors.

CVE-2013-7441 (leaving in the handshake), CVE-2017-15119 (huge options), CVE-2022-26496 (names),
CVE-2024-7409 (idle handshakes), CVE-2019-14850 (backend opened too early).
"""

import asyncio
import signal
import ssl
import struct
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from authority import Certificates
from choke import handshake
from in_process import running
from served_images import Images, Serve
from serving import ServerProcess, eventually
from wire import Wire, info_data, meta_data, name_data, option

from protocol.constants import Option, Reply

ENDLESS = 1 << 30
Run = Callable[[Coroutine[Any, Any, None]], None]


# --- bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 6, 7, 9, 10, 99])
@pytest.mark.parametrize("length", [0xFFFFFFFF, 1 << 30, (1 << 16) + 1])
def test_huge_option_length_closes_at_once(
    readonly: ServerProcess, number: int, length: int
) -> None:
    """Nothing is read patiently, nothing allocated: the header is enough."""
    wire = readonly.connect()
    wire.greet()
    started = time.monotonic()
    wire.send(option(number, b"", length=length))
    assert wire.is_closed()
    assert time.monotonic() - started < 5  # long before the handshake's deadline


@pytest.mark.parametrize("length", [4097, 65536])
def test_export_name_longer_than_any_string_closes(readonly: ServerProcess, length: int) -> None:
    wire = readonly.connect()
    wire.greet()
    wire.send(option(Option.EXPORT_NAME, b"x" * length))
    assert wire.is_closed()


@pytest.mark.parametrize("number", [6, 7, 9, 10])
@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFFFFE, 65536, 4097, 65530])
def test_name_length_that_lies(readonly: ServerProcess, number: int, length: int) -> None:
    wire = readonly.connect()
    wire.greet()
    wire.ask(Option.STRUCTURED_REPLY)
    data = struct.pack(">I", length) + b"x" * 4097 + bytes(2)
    assert wire.verdict(number, data) == Reply.ERR_INVALID
    assert wire.verdict(Option.LIST) == Reply.ACK


def test_maximum_names_and_queries_are_read(readonly: ServerProcess) -> None:
    wire = readonly.connect()
    wire.greet()
    wire.ask(Option.STRUCTURED_REPLY)
    data = meta_data("x" * 4096, ["x-" + "q" * 4094] * 12)
    assert wire.verdict(Option.SET_META_CONTEXT, data) == Reply.ERR_UNKNOWN
    assert wire.verdict(Option.GO, info_data("disk", range(256))) == Reply.ACK


def test_endless_options_end(readonly: ServerProcess) -> None:
    """A client that never stops asking is left, long before it is a burden."""
    wire = readonly.connect()
    wire.greet()

    def ask_on() -> None:
        for _ in range(64):
            wire.send(option(99) * 256)
            for _ in range(256):
                assert wire.option_reply().reply == Reply.ERR_UNSUP

    with pytest.raises((EOFError, ConnectionError)):
        ask_on()


def test_option_data_is_budgeted(readonly: ServerProcess) -> None:
    wire = readonly.connect()
    wire.greet()

    def ask_on() -> None:
        for _ in range(64):
            wire.ask(99, bytes(1 << 16))

    with pytest.raises((EOFError, ConnectionError)):
        ask_on()


# --- seconds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [b"", b"\0\0\0", b"\0\0\0\3", option(3)[:9], option(6, b"", length=100)],
    ids=["nothing", "half-flags", "flags", "half-option", "no-data"],
)
def test_stalled_handshake_is_closed(impatient: ServerProcess, said: bytes) -> None:
    """Nothing moves; the deadline closes."""
    wire = impatient.connect()
    wire.receive(18)
    wire.send(said if len(said) < 5 else b"\0\0\0\3" + said)
    started = time.monotonic()
    assert wire.is_closed()
    assert time.monotonic() - started < 5


def test_dribbled_handshake_is_closed(impatient: ServerProcess) -> None:
    """Being slow but busy does not extend the deadline."""
    wire = impatient.connect()
    wire.greet()
    wire.sock.settimeout(0.05)
    started = time.monotonic()
    closed = False
    for byte in option(Option.LIST_META_CONTEXT, bytes(60000)):
        try:
            wire.send(bytes([byte]))
            closed = not wire.sock.recv(1)
        except TimeoutError:
            continue
        except ConnectionError:
            closed = True
        if closed:
            break
    assert closed
    assert time.monotonic() - started < 5


def test_deadline_ends_with_the_handshake(impatient: ServerProcess) -> None:
    """A client in transmission may be silent for as long as it likes."""
    wire = impatient.connect().enter("disk")
    idle = impatient.connect()
    idle.receive(18)
    assert idle.is_closed()  # one whole deadline has passed
    assert len(wire.read(0, 512)) == 512


@pytest.fixture
def impatient(serve: Serve, images: Images, tmp_path: Path) -> ServerProcess:
    """Half a second for a handshake."""
    where = f"unix:{tmp_path}/sock"
    return serve(images.disk, "--listen", where, "--handshake-timeout", "0.5")


# --- connections ------------------------------------------------------------------------------


def test_oldest_handshake_gives_way(serve: Serve, images: Images, tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/sock"
    server = serve(images.disk, "--listen", where, "--max-connections", "4")
    client = server.connect().enter("disk")
    idle = [server.connect() for _ in range(3)]
    for wire in idle:
        wire.greet()
    newcomer = server.connect().enter("disk")
    assert idle[0].is_closed()
    assert len(newcomer.read(0, 512)) == len(client.read(0, 512)) == 512
    for wire in idle[1:]:
        assert wire.verdict(Option.LIST) == Reply.ACK


def test_cap_of_clients_in_transmission(serve: Serve, images: Images, tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/sock"
    server = serve(images.disk, "--listen", where, "--max-connections", "4")
    clients = [server.connect().enter("disk") for _ in range(4)]
    assert server.connect().is_closed()
    assert all(len(client.read(0, 512)) == 512 for client in clients)
    clients.pop().disconnect()
    assert len(server.connect().enter("disk").read(0, 512)) == 512


@pytest.mark.parametrize("burst", [False, True], ids=["one-by-one", "all-at-once"])
def test_many_handshakes_respect_the_cap(
    serve: Serve, images: Images, tmp_path: Path, burst: bool
) -> None:
    where = f"unix:{tmp_path}/sock"
    server = serve(images.disk, "--listen", where, "--max-connections", "8")
    before = server.descriptors()
    if burst:
        server.process.send_signal(signal.SIGSTOP)  # they pile up, and are accepted together
    for _ in range(200):
        wire = server.connect()
        if not burst:
            wire.receive(18)
    server.process.send_signal(signal.SIGCONT)
    assert eventually(lambda: server.descriptors() > before)
    assert eventually(lambda: server.descriptors() <= before + 8, within=5)
    assert len(server.connect().enter("disk").read(0, 512)) == 512


def test_handshakes_held_by_another_client_do_not_delay(
    readonly: ServerProcess,
) -> None:
    for _ in range(200):
        readonly.connect()
    started = time.monotonic()
    assert len(readonly.connect().enter("disk").read(0, 512)) == 512
    assert time.monotonic() - started < 5


# --- the image is opened at GO ----------------------------------------------------------------


def test_image_is_opened_only_when_asked_for(serve: Serve, images: Images, tmp_path: Path) -> None:
    server = serve(images.disk, "--listen", f"unix:{tmp_path}/sock")
    wire = server.connect()
    wire.greet()
    wire.ask(Option.LIST)
    wire.ask(Option.INFO, info_data("nothing"))
    assert not server.opened(images.disk)
    wire.go("disk")
    assert server.opened(images.disk)
    wire.disconnect()
    assert eventually(lambda: not server.opened(images.disk))


def test_image_that_vanished_is_an_error_at_go(serve: Serve, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(4096))
    server = serve(image, "--listen", f"unix:{tmp_path}/sock")
    image.rename(tmp_path / "away")
    wire = server.connect()
    wire.greet()
    reply = wire.ask(Option.GO, info_data(""))[-1]
    assert reply.reply >= 1 << 31
    assert str(tmp_path) not in reply.text  # where things lie is no concern of a client
    assert wire.verdict(Option.LIST) == Reply.ACK
    (tmp_path / "away").rename(image)
    wire.go("")
    assert wire.read(0, 4096) == bytes(4096)


# --- leaving after every byte -----------------------------------------------------------------


async def _leave_after_every_byte(
    folder: Path, image: Path, certificates: Certificates | None
) -> None:
    """The server runs in this loop, so that its tasks can be counted."""
    trust = certificates.client_context() if certificates is not None else None
    address = f"{folder}/sock"
    ours = asyncio.all_tasks()
    async with running(folder / "sock", image, certificates=certificates) as server:
        await asyncio.to_thread(handshake, address, "disk", ENDLESS, trust)  # starts what stays
        await server.wait_empty()
        total = await asyncio.to_thread(handshake, address, "disk", ENDLESS, trust)
        for limit in range(total):
            assert limit == await asyncio.to_thread(handshake, address, "disk", limit, trust)
            async with asyncio.timeout(5):
                await server.wait_empty()
            assert asyncio.all_tasks() == ours
        assert total == await asyncio.to_thread(handshake, address, "disk", ENDLESS, trust)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_leaving_after_every_byte_leaves_no_task(run: Run, images: Images, tmp_path: Path) -> None:
    run(_leave_after_every_byte(tmp_path, images.disk, None))


def test_leaving_after_every_byte_of_tls_leaves_no_task(
    images: Images, tmp_path: Path, certificates: Certificates
) -> None:
    uvloop.run(_leave_after_every_byte(tmp_path, images.disk, certificates))


def test_leaving_after_every_byte_leaves_no_descriptor(readonly: ServerProcess) -> None:
    """The fixture compares; here also with a reset instead of a farewell."""
    total = handshake(readonly.address(), "disk", ENDLESS)
    before = readonly.descriptors()
    for limit in range(0, total, 3):
        handshake(readonly.address(), "disk", limit)
    assert eventually(lambda: readonly.descriptors() <= before)


def test_resetting_after_every_byte_leaves_no_descriptor(
    serve: Serve, images: Images, certificates: Certificates
) -> None:
    pair = certificates.server
    tls = ("--tls", "per-export", "--tls-cert", pair.certificate, "--tls-key", pair.key)
    server = serve(images.disk, "--listen", "127.0.0.1:0", *tls)
    handshake(server.address(), "disk", ENDLESS)
    before = server.descriptors()
    said = struct.pack(">I", 3) + option(Option.STARTTLS) + option(Option.LIST) + name_data("x")
    for limit in range(len(said)):
        wire = server.connect()
        wire.send(said[:limit])
        wire.reset()
    assert eventually(lambda: server.descriptors() <= before)
    context: ssl.SSLContext = certificates.client_context()
    assert handshake(server.address(), "disk", ENDLESS, context) > 0


def test_not_nbd_at_all(readonly: ServerProcess) -> None:
    """Somebody else's protocol on our port."""
    for said in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"SSH-2.0-x\r\n",
    ):
        wire: Wire = readonly.connect()
        wire.receive(18)
        wire.send(said)
        assert wire.is_closed()
