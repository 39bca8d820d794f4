"""Several disks on one host that grants few connections; servers that hang up on options."""

import asyncio
import random
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.net.client_budget import CONNECTIONS
from nbdsrv.net.client_connect import Patience
from nbdsrv.source.nbd import NbdDisk, open_nbd
from protocol.constants import Info, Option, Reply
from protocol.constants import TransmissionFlag as F
from tests.disk.reading import content
from tests.source.peers import Conversation, misbehaving, unix_uri

MIB = 1 << 20
GOLDEN = random.Random(7).randbytes(2 * MIB)
BAD = MIB + 4096
PATIENCE = Patience(connect_s=5, request_s=5, reconnect_s=5, turn_s=5)


class Host:
    """xapi-nbd: EXPORT_NAME only, whole sectors, an error ends the session, few connections."""

    def __init__(self, granted: int, bad: int | None = None) -> None:
        self.granted = granted
        self.bad = bad
        self.connected = 0
        self.most = 0

    async def talk(self, conversation: Conversation) -> None:
        if self.connected >= self.granted:
            return
        self.connected += 1
        self.most = max(self.most, self.connected)
        try:
            await self._serve(conversation)
        finally:
            self.connected -= 1

    async def _serve(self, conversation: Conversation) -> None:
        conversation.writer.write(b"NBDMAGICIHAVEOPT\0\x01")
        await conversation.reader.readexactly(4)
        while (option := (await conversation.option())[0]) != Option.EXPORT_NAME:
            conversation.reply(option, Reply.ERR_UNSUP)
        flags = int(F.HAS_FLAGS | F.READ_ONLY)
        terms = len(GOLDEN).to_bytes(8, "big") + flags.to_bytes(2, "big")
        conversation.writer.write(terms + bytes(124))
        while (request := await conversation.request()).type == 0:
            begin, end = request.offset, request.offset + request.length
            if (begin | end) % 512:
                conversation.simple(request.cookie, error=22)
                return
            if self.bad is not None and begin <= self.bad < end:
                return
            conversation.simple(request.cookie, GOLDEN[begin:end])


async def opened(sock: Path, workers: Workers, limit: int, patience: Patience = PATIENCE):
    return await open_nbd(
        unix_uri(sock), workers, patience=patience, host_connections=limit, frozen=True
    )


async def read_all(disk: NbdDisk) -> bytes:
    step = 1 << 17
    pieces = [content(disk, at, step) for at in range(0, len(GOLDEN), step)]
    return b"".join(await asyncio.gather(*pieces))


async def test_a_frozen_disk_has_several_connections_and_a_host_no_more_than_it_grants(
    tmp_path: Path, workers: Workers
) -> None:
    host, sock = Host(5), tmp_path / "sock"
    async with misbehaving(sock, host.talk):
        disks = [await opened(sock, workers, 5) for _ in range(3)]
        for _ in range(3):
            for found in await asyncio.gather(*map(read_all, disks)):
                assert found == GOLDEN
        assert host.most == 5
        assert sum(disk.incidents.lost for disk in disks) == 0
        for disk in disks:
            await disk.close()
    assert CONNECTIONS.count(f"unix:{sock}") == 0


async def test_who_comes_late_is_given_a_connection_of_those_who_have_several(
    tmp_path: Path, workers: Workers
) -> None:
    host, sock = Host(4), tmp_path / "sock"
    async with misbehaving(sock, host.talk):
        early = await opened(sock, workers, 4)
        for _ in range(8):
            assert await read_all(early) == GOLDEN
        assert early.facts["connections"] == 4
        reading = asyncio.ensure_future(read_all(early))
        late = [await opened(sock, workers, 4) for _ in range(3)]
        assert await reading == GOLDEN
        for disk in late:
            assert await read_all(disk) == GOLDEN
        assert early.incidents.lost == 0
        assert host.most == 4
        for disk in (early, *late):
            await disk.close()


async def test_one_disk_too_many_is_told_after_its_deadline(
    tmp_path: Path, workers: Workers
) -> None:
    host, sock = Host(2), tmp_path / "sock"
    hasty = Patience(connect_s=5, request_s=5, reconnect_s=5, turn_s=0.2)
    async with misbehaving(sock, host.talk):
        disks = [await opened(sock, workers, 2) for _ in range(2)]
        with pytest.raises(DiskError, match="all 2 connections"):
            await opened(sock, workers, 2, hasty)
        waiting = asyncio.ensure_future(opened(sock, workers, 2))
        await asyncio.sleep(0.05)
        await disks[0].close()
        third = await waiting
        assert await read_all(third) == GOLDEN
        await third.close()
        await disks[1].close()


@pytest.mark.parametrize("granted", [1, 2, 16])
async def test_a_bad_place_is_found_with_the_connections_there_are(
    granted: int, tmp_path: Path, workers: Workers
) -> None:
    """Two disks of a host, or one, and no connection to spare; an error ends the session."""
    host, sock = Host(granted, BAD), tmp_path / "sock"
    async with misbehaving(sock, host.talk):
        disks = [await opened(sock, workers, granted) for _ in range(min(granted, 2))]

        async def examine(disk: NbdDisk) -> None:
            for at in range(0, len(GOLDEN), 1 << 18):
                buffer = bytearray(1 << 18)
                try:
                    await disk.read_into(at, memoryview(buffer))
                except DiskError as error:
                    assert error.offset == BAD  # noqa: PT017 - and what came before is compared
                    good = BAD - at
                else:
                    good = len(buffer)
                assert buffer[:good] == GOLDEN[at : at + good]
            after = BAD + 512
            assert await content(disk, after, len(GOLDEN) - after) == GOLDEN[after:]
            assert disk.incidents.bad == [(BAD, 512)]

        async with asyncio.timeout(30):
            await asyncio.gather(*map(examine, disks))
        assert host.most <= granted
        for disk in disks:
            await disk.close()
    assert CONNECTIONS.count(f"unix:{sock}") == 0


# --- servers that hang up on what they do not know -----------------------------------------------


@pytest.mark.parametrize(
    "unknown",
    [
        {Option.EXTENDED_HEADERS},
        {Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS},
        {Option.GO},
        {Option.SET_META_CONTEXT},
    ],
    ids=lambda options: min(options, key=int).name,
)
async def test_servers_that_hang_up_on_an_option_are_asked_by_export_name(
    unknown: set[int], tmp_path: Path, workers: Workers
) -> None:
    sock, sessions = tmp_path / "sock", []

    async def talk(conversation: Conversation) -> None:
        options: list[int] = []
        sessions.append(options)
        await conversation.greet()
        while True:
            option, _ = await conversation.option()
            options.append(option)
            if option in unknown:
                return
            if option == Option.EXPORT_NAME:
                break
            if option == Option.GO:
                info = Info.EXPORT.to_bytes(2, "big") + len(GOLDEN).to_bytes(8, "big")
                conversation.reply(option, Reply.INFO, info + bytes([0, 1]))
            conversation.reply(
                option, Reply.ACK if option == Option.STRUCTURED_REPLY else Reply.ERR_UNSUP
            )
        flags = int(F.HAS_FLAGS | F.CAN_MULTI_CONN)
        conversation.writer.write(len(GOLDEN).to_bytes(8, "big") + flags.to_bytes(2, "big"))
        while (request := await conversation.request()).type == 0:
            data = GOLDEN[request.offset : request.offset + request.length]
            conversation.simple(request.cookie, data)

    async with misbehaving(sock, talk):
        disk = await open_nbd(unix_uri(sock), workers, patience=PATIENCE)
        assert await read_all(disk) == GOLDEN
        assert disk.facts["dialect"] == "simple"
        await disk.close()
    assert len(sessions) >= 2
    assert all(options == [Option.EXPORT_NAME] for options in sessions[1:])


async def test_a_server_that_hangs_up_on_everything_is_not_asked_for_ever(
    tmp_path: Path, workers: Workers
) -> None:
    sock, count = tmp_path / "sock", 0

    async def talk(conversation: Conversation) -> None:
        nonlocal count
        count += 1
        await conversation.greet()
        await conversation.option()

    async with misbehaving(sock, talk):
        with pytest.raises(DiskError, match="EXTENDED_HEADERS"):
            await open_nbd(unix_uri(sock), workers, patience=PATIENCE)
    assert count == 2
