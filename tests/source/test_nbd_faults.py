"""Real servers that die, hang and come back, a way that takes 50 ms: right bytes or an error."""

import asyncio
import errno
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdsrv.copying.engine import Copy
from nbdsrv.copying.nowhere import NullWriter
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.net.client_connect import Patience
from nbdsrv.source.nbd import NbdDisk, open_nbd
from protocol.constants import ReplyType
from tests.disk.reading import content
from tests.source.peers import Conversation, listening, misbehaving, need, unix_uri

MIB = 1 << 20
GOLDEN = random.Random(6).randbytes(16 * MIB)
PATIENCE = Patience(connect_s=5, request_s=0.5, reconnect_s=10)
DELAY_MS = 500
"""In which everything that may be under way is asked for, on however busy a machine."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(GOLDEN)
    return path


@asynccontextmanager
async def opened(
    sock: Path, workers: Workers, patience: Patience = PATIENCE
) -> AsyncIterator[NbdDisk]:
    disk = await open_nbd(unix_uri(sock), workers, patience=patience)
    try:
        yield disk
    finally:
        await disk.close()


async def read_all(disk: NbdDisk) -> bytes:
    pieces = [content(disk, at, MIB) for at in range(0, len(GOLDEN), MIB)]
    return b"".join(await asyncio.gather(*pieces))


def stop(server: subprocess.Popen[bytes]) -> None:
    """And see that it has: a signal takes its time."""
    server.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)


@pytest.mark.parametrize("after_s", [0.0, 0.03, 0.1])
async def test_killed_in_the_middle_and_started_again(
    after_s: float, image: Path, tmp_path: Path, workers: Workers
) -> None:
    sock, slow = tmp_path / "sock", ["--filter=rate", "file", str(image), "rate=800M"]
    with listening(sock, "nbdkit", "-f", "-r", *slow) as first:
        async with opened(sock, workers) as disk:
            reading = asyncio.ensure_future(read_all(disk))
            await asyncio.sleep(after_s)
            first.kill()
            first.wait()
            sock.unlink()
            await asyncio.sleep(0.1)
            with listening(sock, "nbdkit", "-f", "-r", "file", str(image)):
                async with asyncio.timeout(20):
                    assert await reading == GOLDEN
                assert disk.incidents.lost >= 1
                assert disk.incidents.bad == []
                await disk.close()  # nbdkit ends once its clients have
            sock.touch()  # what the first one's end will remove


async def test_killed_for_good(image: Path, tmp_path: Path, workers: Workers) -> None:
    sock = tmp_path / "sock"
    with listening(sock, "nbdkit", "-f", "-r", "file", str(image)) as server:
        patience = Patience(connect_s=5, request_s=0.5, reconnect_s=0.3)
        async with opened(sock, workers, patience) as disk:
            assert await content(disk, 0, 512) == GOLDEN[:512]
            server.kill()
            server.wait()
            async with asyncio.timeout(10):
                with pytest.raises(DiskError) as raised:
                    await read_all(disk)
            assert str(sock) in str(raised.value)
            assert raised.value.errno in {errno.ECONNREFUSED, errno.ENOENT}


async def test_hung_for_a_while(image: Path, tmp_path: Path, workers: Workers) -> None:
    """Stopped for longer than a request may take: given up, connected to again, read."""
    sock = tmp_path / "sock"
    with listening(sock, "nbdkit", "-f", "-r", "file", str(image)) as server:
        async with opened(sock, workers) as disk:
            assert await content(disk, 0, 512) == GOLDEN[:512]
            stop(server)
            try:
                reading = asyncio.ensure_future(read_all(disk))
                await asyncio.sleep(0.8)
            finally:
                server.send_signal(signal.SIGCONT)
            async with asyncio.timeout(20):
                assert await reading == GOLDEN
            assert disk.incidents.lost >= 1


async def test_hung_for_good(image: Path, tmp_path: Path, workers: Workers) -> None:
    sock = tmp_path / "sock"
    with listening(sock, "nbdkit", "-f", "-r", "file", str(image)) as server:
        patience = Patience(connect_s=0.3, request_s=0.3, reconnect_s=0.5)
        async with opened(sock, workers, patience) as disk:
            stop(server)
            try:
                async with asyncio.timeout(10):
                    with pytest.raises(DiskError, match="no answer within") as raised:
                        await content(disk, 0, 512)
                assert raised.value.errno == errno.ETIMEDOUT
            finally:
                server.send_signal(signal.SIGCONT)


async def test_half_closed(tmp_path: Path, workers: Workers) -> None:
    """The server says nothing more and goes on listening."""
    sock, talks = tmp_path / "sock", 0

    async def talk(conversation: Conversation) -> None:
        nonlocal talks
        talks += 1
        last = talks > 3
        await conversation.agree(len(GOLDEN))
        for _ in range(10**9 if last else 3):
            request = await conversation.request()
            if request.type == 2:
                return
            data = GOLDEN[request.offset : request.offset + request.length]
            payload = request.offset.to_bytes(8, "big") + data
            conversation.chunk(request.cookie, ReplyType.OFFSET_DATA, payload)
            await conversation.writer.drain()
        conversation.writer.write_eof()
        await conversation.reader.read()

    async with misbehaving(sock, talk), opened(sock, workers) as disk:
        async with asyncio.timeout(20):
            assert await read_all(disk) == GOLDEN
        assert disk.incidents.lost >= 1


async def test_where_reads_fail_at_random_what_is_called_good_is(
    image: Path, tmp_path: Path, workers: Workers
) -> None:
    """A third of all reads fails: what comes is right, and what does not says where."""
    sock = tmp_path / "sock"
    error = ["--filter=error", "file", str(image), "error-pread-rate=30%"]
    with listening(sock, "nbdkit", "-f", "-r", *error):
        async with opened(sock, workers) as disk:
            for at in range(0, len(GOLDEN), MIB):
                buffer = bytearray(MIB)
                try:
                    await disk.read_into(at, memoryview(buffer))
                    good = MIB
                except DiskError as failure:
                    good = (failure.offset or 0) - at
                assert buffer[:good] == GOLDEN[at : at + good]


# --- 50 ms ------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(GOLDEN * 4)
    return path


async def test_a_long_way_is_filled_as_nbdcopy_fills_it(
    large: Path, tmp_path: Path, workers: Workers
) -> None:
    """On one connection each: as many bytes are asked for before the first answer comes."""
    need("nbdcopy")
    sock, log = tmp_path / "sock", tmp_path / "log"
    words = ["-t", "128", "--filter=log", "--filter=delay", "file", str(large)]
    words += [f"logfile={log}", f"rdelay={DELAY_MS}ms"]
    with listening(sock, "nbdkit", "-f", "-r", *words):
        await run("nbdcopy", "--connections=1", unix_uri(sock), "null:")
        theirs = most_under_way(log.read_text())
        log.write_text("")
        disk = await open_nbd(unix_uri(sock), workers, connections=1)
        outcome = await Copy(disk, NullWriter(), workers).run()
        await disk.close()
        ours = most_under_way(log.read_text())
    assert outcome.data == large.stat().st_size
    assert ours >= theirs >= 8 * MIB, (ours, theirs)


def most_under_way(log: str) -> int:
    """Bytes of READs that nbdkit's log filter has seen begun and not ended, at most."""
    lengths: dict[str, int] = {}
    most = 0
    for line in log.splitlines():
        found = re.search(r"(connection=\d+) Read (id=\d+) .*count=(0x[0-9a-f]+)", line)
        if found is not None:
            lengths[found[1] + found[2]] = int(found[3], 16)
            most = max(most, sum(lengths.values()))
            continue
        ended = re.search(r"(connection=\d+) \.\.\.Read (id=\d+) return=0", line)
        if ended is not None:
            del lengths[ended[1] + ended[2]]
    return most


async def run(program: str, *arguments: str) -> None:
    assert shutil.which(program)
    process = await asyncio.create_subprocess_exec(program, *arguments)
    assert await process.wait() == 0
