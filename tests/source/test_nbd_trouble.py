"""NbdDisk when things go wrong: bad sectors, dying sessions, dead servers, strange answers."""

import asyncio
import errno
import random
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError
from nbdsrv.net.client_connect import Patience
from nbdsrv.source.nbd import NbdDisk, open_nbd
from protocol import structs
from protocol.constants import Option, Reply, ReplyType
from protocol.constants import TransmissionFlag as F
from tests.disk.reading import POISON, content
from tests.source.peers import FLAGS, Conversation, listening, misbehaving, unix_uri

MIB = 1 << 20
GOLDEN = random.Random(5).randbytes(4 * MIB)
BAD = 2 * MIB + 300_032  # a multiple of 512
HASTY = Patience(connect_s=5, request_s=5, reconnect_s=5)
RESIGNED = Patience(connect_s=5, request_s=0.2, reconnect_s=0)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(GOLDEN)
    return path


@pytest.fixture
def sock(tmp_path: Path) -> Path:
    return tmp_path / "sock"


async def failure(work: Awaitable[object]) -> DiskError:
    with pytest.raises(DiskError) as raised:
        await work
    assert "\n" not in str(raised.value)
    return raised.value


async def check_good_until(disk: NbdDisk, bad: int) -> None:
    """A read of everything fails at ``bad`` and has given all before it."""
    buffer = bytearray([POISON]) * disk.size
    error = await failure(disk.read_into(0, memoryview(buffer)))
    assert error.offset == bad
    assert error.errno == errno.EIO
    assert buffer[:bad] == GOLDEN[:bad]


# --- bad sectors -----------------------------------------------------------------------------


def blkdebug(image: Path) -> str:
    sector = BAD // 512
    rule = f"file.inject-error.0.event=read_aio,file.inject-error.0.sector={sector}"
    return f"driver=raw,file.driver=blkdebug,file.image.filename={image},{rule}"


async def test_qemu_drops_the_session_and_everything_else_is_read(
    image: Path, sock: Path, workers: Workers
) -> None:
    command = ["qemu-nbd", "-t", "-e", "16", "-r", "--image-opts", blkdebug(image)]
    with listening(sock, *command):
        disk = await open_nbd(unix_uri(sock), workers, patience=HASTY)
        await check_good_until(disk, BAD)
        after = BAD + 4096
        assert await content(disk, after, 4 * MIB - after) == GOLDEN[after:]
        assert disk.incidents.lost >= 1
        assert disk.incidents.bad == [(BAD, 512)]
        await disk.close()


BAD_SECTOR_SCRIPT = """#!/bin/sh
case "$1" in
  get_size) echo {size} ;;
  pread)
    if [ $(( $4 )) -le {bad} ] && [ $(( $4 + $3 )) -gt {bad} ]; then
      echo EIO bad sector >&2; exit 1
    fi
    dd if={image} iflag=skip_bytes,count_bytes,fullblock skip=$4 count=$3 bs=1M status=none ;;
  can_multi_conn) exit 0 ;;
  *) exit 2 ;;
esac
"""


@pytest.mark.parametrize("more", [(), ("--no-sr",)], ids=["structured", "simple"])
async def test_an_error_for_a_whole_request_is_narrowed_to_a_sector(
    more: tuple[str, ...], image: Path, sock: Path, workers: Workers, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text(BAD_SECTOR_SCRIPT.format(size=4 * MIB, bad=BAD, image=image))
    script.chmod(0o700)
    with listening(sock, "nbdkit", "-f", *more, "sh", str(script)):
        disk = await open_nbd(unix_uri(sock), workers, patience=HASTY)
        await check_good_until(disk, BAD)
        assert disk.incidents.lost == 0
        assert disk.incidents.bad == [(BAD, 512)]
        await disk.close()


async def test_errors_that_come_and_go_are_outlasted(
    image: Path, sock: Path, workers: Workers
) -> None:
    command = ["nbdkit", "-f", "--filter=error", "file", str(image), "error-pread-rate=10%"]
    with listening(sock, *command):
        disk = await open_nbd(unix_uri(sock), workers, patience=HASTY)
        read = [content(disk, at, 4096) for at in range(0, MIB, 4096)]
        found = await asyncio.gather(*read, return_exceptions=True)
        good = [piece for piece in found if isinstance(piece, bytes)]
        expected = [GOLDEN[at : at + 4096] for at in range(0, MIB, 4096)]
        assert all(a == b for a, b in zip(found, expected, strict=True) if isinstance(a, bytes))
        assert len(good) > 200
        assert disk.incidents.salvaged > 0
        await disk.close()


# --- dying servers ---------------------------------------------------------------------------


async def serve_reads(talk: Conversation, count: int | None = None) -> None:
    """Answer ``count`` requests, READs with GOLDEN."""
    while count is None or count:
        request = await talk.request()
        if request.type == 0:
            data = GOLDEN[request.offset : request.offset + request.length]
            payload = structs.OffsetData.build({"offset": request.offset, "data": data})
            talk.chunk(request.cookie, ReplyType.OFFSET_DATA, payload)
        elif request.type == 2:
            return
        else:
            talk.chunk(request.cookie, ReplyType.NONE)
        if count is not None:
            count -= 1


def dying_behind(count: int, *, flags: int = FLAGS) -> Callable[[Conversation], Awaitable[None]]:
    async def talk(conversation: Conversation) -> None:
        await conversation.agree(len(GOLDEN), flags)
        await serve_reads(conversation, count)
        await conversation.request()

    return talk


async def test_reads_go_on_over_new_connections(sock: Path, workers: Workers) -> None:
    async with misbehaving(sock, dying_behind(3)):
        disk = await open_nbd(unix_uri(sock), workers, patience=HASTY, connections=1)
        for at in range(0, MIB, 65536):
            assert await content(disk, at, 65536) == GOLDEN[at : at + 65536]
        assert disk.incidents.reread >= 4
        assert disk.incidents.reconnected >= 4
        await disk.close()


async def test_a_write_is_sent_once(sock: Path, workers: Workers) -> None:
    seen = []

    async def talk(conversation: Conversation) -> None:
        await conversation.agree(len(GOLDEN))
        request = await conversation.request()
        seen.append((request.type, request.offset))

    async with misbehaving(sock, talk):
        disk = await open_nbd(unix_uri(sock), workers, writable=True, patience=HASTY)
        error = await failure(disk.write(4096, memoryview(bytes(512))))
        assert "whether it was carried out is unknown" in str(error)
        assert str(sock) in str(error)
        assert seen == [(1, 4096)]
        await disk.close()


async def test_a_flush_after_a_lost_connection_does_not_lie(sock: Path, workers: Workers) -> None:
    async with misbehaving(sock, dying_behind(1)):
        disk = await open_nbd(unix_uri(sock), workers, writable=True, patience=HASTY)
        await disk.write(0, memoryview(bytes(512)))
        await content(disk, 0, 512)  # for which the first connection dies
        for _ in range(2):
            error = await failure(disk.flush())
            assert "open it anew" in str(error)
        await disk.close()


async def test_a_flushed_connection_may_die(sock: Path, workers: Workers) -> None:
    async with misbehaving(sock, dying_behind(2)):
        disk = await open_nbd(unix_uri(sock), workers, writable=True, patience=HASTY)
        await disk.write(0, memoryview(bytes(512)))
        await disk.flush()
        await content(disk, 0, 512)
        await disk.flush()
        await disk.close()


async def test_a_dead_server_is_an_error_that_names_it(sock: Path, workers: Workers) -> None:
    async with misbehaving(sock, dying_behind(1)):
        disk = await open_nbd(unix_uri(sock), workers, patience=RESIGNED)
        await content(disk, 0, 512)
    error = await failure(content(disk, 0, 512))
    assert str(sock) in str(error)
    assert error.errno in {errno.ENOENT, errno.ECONNREFUSED}
    await disk.close()
    await failure(content(disk, 0, 512))


async def test_a_server_that_hangs_up_after_each_handshake_is_not_asked_for_ever(
    sock: Path, workers: Workers
) -> None:
    """Nor as fast as it can answer: 42 000 connections in 15 s."""
    made = 0

    async def talk(conversation: Conversation) -> None:
        nonlocal made
        made += 1
        await conversation.agree(len(GOLDEN))

    async with misbehaving(sock, talk):
        patience = Patience(connect_s=5, request_s=5, reconnect_s=1)
        disk = await open_nbd(unix_uri(sock), workers, patience=patience, connections=1)
        async with asyncio.timeout(20):
            error = await failure(content(disk, 0, 512))
            assert str(sock) in str(error)
        assert made < 50
        await disk.close()


async def test_a_silent_server_costs_the_request_deadline(sock: Path, workers: Workers) -> None:
    async def talk(conversation: Conversation) -> None:
        await conversation.agree(len(GOLDEN))
        while True:
            await conversation.request()

    async with misbehaving(sock, talk):
        disk = await open_nbd(unix_uri(sock), workers, patience=RESIGNED)
        async with asyncio.timeout(5):
            error = await failure(content(disk, 0, 512))
        assert "no answer within 0.2 s" in str(error)
        await disk.close()


async def test_a_server_that_never_greets_costs_the_connect_deadline(
    sock: Path, workers: Workers
) -> None:
    async def talk(conversation: Conversation) -> None:
        await conversation.reader.read()

    async with misbehaving(sock, talk):
        error = await failure(open_nbd(unix_uri(sock), workers, patience=Patience(connect_s=0.2)))
        assert error.errno == errno.ETIMEDOUT


async def test_a_disk_that_has_changed_meanwhile_is_refused(sock: Path, workers: Workers) -> None:
    sizes = iter([len(GOLDEN), 2 * len(GOLDEN), 2 * len(GOLDEN)])

    async def talk(conversation: Conversation) -> None:
        await conversation.agree(next(sizes))
        await serve_reads(conversation, 1)

    async with misbehaving(sock, talk):
        disk = await open_nbd(unix_uri(sock), workers, patience=HASTY, connections=1)
        await content(disk, 0, 512)
        error = await failure(content(disk, 0, 512))
        assert "not what it was" in str(error)
        await disk.close()


async def test_a_server_that_wants_to_stop_is_left(sock: Path, workers: Workers) -> None:
    served = []

    async def talk(conversation: Conversation) -> None:
        await conversation.agree(len(GOLDEN), structured=False)
        if not served:
            served.append("shutdown")
            conversation.simple((await conversation.request()).cookie, error=108)
            assert (await conversation.request()).type == 2  # DISC
            served.append("left")
            return
        while (request := await conversation.request()).type == 0:
            data = GOLDEN[request.offset : request.offset + request.length]
            conversation.simple(request.cookie, data)

    async with misbehaving(sock, talk):
        disk = await open_nbd(unix_uri(sock), workers, patience=HASTY, connections=1)
        assert await content(disk, 512, 512) == GOLDEN[512:1024]
        await disk.close()
        assert served == ["shutdown", "left"]


async def test_a_server_that_is_restarted_says_so_on_all_connections(
    sock: Path, workers: Workers
) -> None:
    opened: list[int] = []
    both = asyncio.Event()

    async def talk(conversation: Conversation) -> None:
        opened.append(1)
        number = len(opened)
        if number == 3:
            return  # it has stopped, and is not back yet
        await conversation.agree(len(GOLDEN), structured=False)
        if number == 2:
            both.set()
        await both.wait()
        while (request := await conversation.request()).type == 0:
            data = GOLDEN[request.offset : request.offset + request.length]
            if number > 2:
                conversation.simple(request.cookie, data)
            else:
                conversation.simple(request.cookie, error=108)

    async with misbehaving(sock, talk):
        disk = await open_nbd(unix_uri(sock), workers, patience=HASTY, connections=2)
        reads = (content(disk, at, 512) for at in (0, 512, 1024))
        assert b"".join(await asyncio.gather(*reads)) == GOLDEN[:1536]
        assert disk.incidents.salvaged == 0
        await disk.close()


async def test_a_server_that_grants_one_connection_is_read_over_one(
    sock: Path, workers: Workers
) -> None:
    busy: list[int] = []

    async def talk(conversation: Conversation) -> None:
        if busy:
            return
        busy.append(1)
        await conversation.agree(len(GOLDEN))
        await serve_reads(conversation)

    async with misbehaving(sock, talk):
        disk = await open_nbd(unix_uri(sock), workers, patience=HASTY)
        assert await content(disk, 0, len(GOLDEN)) == GOLDEN
        assert disk.facts["connections"] == 1
        assert disk.incidents.lost == 0
        await disk.close()


# --- closing and cancelling ------------------------------------------------------------------


async def test_close_ends_those_who_wait(sock: Path, workers: Workers) -> None:
    async def talk(conversation: Conversation) -> None:
        await conversation.agree(len(GOLDEN))
        while True:
            await conversation.request()

    async with misbehaving(sock, talk):
        disk = await open_nbd(unix_uri(sock), workers, patience=HASTY)
        reads = [asyncio.ensure_future(content(disk, 0, 512)) for _ in range(3)]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            await disk.close()
            found = await asyncio.gather(*reads, return_exceptions=True)
        assert all(isinstance(error, DiskError) for error in found), found


async def test_a_cancelled_write_sends_what_it_was_given(
    image: Path, sock: Path, workers: Workers
) -> None:
    """Its memory may be used for something else at once; the server must not get to see that."""
    with listening(sock, "nbdkit", "-f", "--filter=delay", "file", str(image), "wdelay=50ms"):
        disk = await open_nbd(unix_uri(sock), workers, writable=True)
        for round_ in range(6):
            data = bytearray([round_ + 1]) * MIB
            task = asyncio.ensure_future(disk.write(0, memoryview(data)))
            for _ in range(round_):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            data[:] = bytes([0xEE]) * MIB
        await disk.flush()
        await disk.close()
    assert 0xEE not in image.read_bytes()[:MIB].replace(GOLDEN[:MIB], b"")


# --- what is offered, and what is not --------------------------------------------------------


async def test_read_only_servers_are_not_opened_for_writing(
    image: Path, sock: Path, workers: Workers
) -> None:
    with listening(sock, "nbdkit", "-f", "-r", "file", str(image)):
        error = await failure(open_nbd(unix_uri(sock), workers, writable=True))
        assert error.errno == errno.EROFS


async def test_unknown_exports_are_named(image: Path, sock: Path, workers: Workers) -> None:
    with listening(sock, "qemu-nbd", "-t", "-x", "right", "-f", "raw", str(image)):
        error = await failure(open_nbd(unix_uri(sock, "wrong"), workers))
        assert error.errno == errno.ENOENT
        assert "wrong" in str(error)


async def test_sessions_of_xcp_ng_are_not_told(tmp_path: Path, workers: Workers) -> None:
    uri = unix_uri(tmp_path / "none", "vdi?session_id=OpaqueRef:secret")
    assert "secret" in uri
    error = await failure(open_nbd(uri, workers))
    assert "secret" not in str(error)
    assert "session_id=***" in str(error).replace("%3D", "=")


async def test_nor_when_it_is_the_server_that_tells(sock: Path, workers: Workers) -> None:
    async def talk(conversation: Conversation) -> None:
        await conversation.greet()
        while (option := await conversation.option())[0] != Option.GO:
            conversation.reply(option[0], Reply.ERR_UNSUP)
        conversation.reply(Option.GO, Reply.ERR_UNKNOWN, b"no 'vdi?session_id=secret' here")

    async with misbehaving(sock, talk):
        uri = unix_uri(sock, "vdi?session_id=secret")
        error = await failure(open_nbd(uri, workers))
        assert "secret" not in str(error)
        assert "here" in str(error)


@pytest.mark.parametrize("text", ["nbd://[::1", "nbd+unix:///x", "http://x/", "nbd://host:99999/"])
async def test_what_is_not_a_uri_is_a_usage_error(text: str, workers: Workers) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        await open_nbd(text, workers)


XAPI_SIZE = 2 * MIB


async def xapi(conversation: Conversation) -> None:
    """xapi-nbd: no GO, no chunks, 124 zeroes, whole sectors or the session ends."""
    conversation.writer.write(structs.Greeting.build({"flags": 1}))
    await conversation.reader.readexactly(4)
    while (option := (await conversation.option())[0]) != Option.EXPORT_NAME:
        conversation.reply(option, Reply.ERR_UNSUP)
    flags = F.HAS_FLAGS | F.READ_ONLY
    fields = XAPI_SIZE.to_bytes(8, "big") + int(flags).to_bytes(2, "big")
    conversation.writer.write(fields + bytes(124))
    while True:
        request = await conversation.request()
        if request.type != 0 or (request.offset | request.length) & 511:
            conversation.simple(request.cookie, error=22)
            return
        if request.offset <= XAPI_SIZE // 2 < request.offset + request.length:
            return  # the bad sector: just gone
        data = GOLDEN[request.offset : request.offset + request.length]
        conversation.simple(request.cookie, data)


async def test_xapi_nbd(sock: Path, workers: Workers) -> None:
    async with misbehaving(sock, xapi):
        disk = await open_nbd(unix_uri(sock), workers, patience=HASTY)
        assert await content(disk, 1, 1) == GOLDEN[1:2]
        assert await content(disk, 100, 100_000) == GOLDEN[100:100_100]
        assert await content(disk, XAPI_SIZE - 3, 3) == GOLDEN[XAPI_SIZE - 3 : XAPI_SIZE]
        assert [extent.flags for extent in await disk.extents(0, XAPI_SIZE)] == [0]
        assert disk.incidents.lost == 0
        error = await failure(content(disk, XAPI_SIZE // 2 - 5000, 10_000))
        assert error.offset == XAPI_SIZE // 2
        assert disk.incidents.bad == [(XAPI_SIZE // 2, 512)]
        await disk.close()
