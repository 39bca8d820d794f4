"""NbdDisk keeps the Disk contract over every server there is here."""

import asyncio
import struct
import subprocess
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.source.nbd import open_nbd
from protocol.constants import Info, Option, Reply
from protocol.extents import DATA, HOLE, ExtentList
from tests.disk.check_disk import OpenDisk, check_disk
from tests.formats.images import IMAGES, Image
from tests.net.in_process import running
from tests.source.peers import FLAGS, Conversation, listening, misbehaving, need, unix_uri

CHOSEN = [
    image
    for image in IMAGES
    if image.name in {"empty", "one-byte", "513", "1MiB+3", "1MiB+3-hole-tail", "stripes"}
]
BIG = Image("3MiB+1000", (3 << 20) + 1000, ((0, 1 << 20), ((2 << 20) - 7, 100_000)))


def opener(workers: Workers, uri: str, *, writable: bool) -> OpenDisk:
    async def open_disk() -> Disk:
        return await open_nbd(uri, workers, writable=writable)

    return open_disk


@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
@pytest.mark.parametrize("image", [*CHOSEN, BIG], ids=lambda image: image.name)
async def test_our_own_server(
    image: Image, writable: bool, tmp_path: Path, workers: Workers
) -> None:
    golden = image.make(str(tmp_path / "disk"))
    async with running(tmp_path / "sock", tmp_path / "disk", writable=writable):
        uri = unix_uri(tmp_path / "sock", "disk")
        await check_disk(opener(workers, uri, writable=writable), golden)


async def test_a_server_is_asked_for_extents_once(tmp_path: Path, workers: Workers) -> None:
    """For qemu-nbd's sake; see ``NbdDisk.rouse``."""
    BIG.make(str(tmp_path / "disk"))
    async with running(tmp_path / "sock", tmp_path / "disk") as server:
        disk = await open_nbd(unix_uri(tmp_path / "sock", "disk"), workers)
        (session,) = server.sessions
        async with asyncio.timeout(10):
            while session.tally().others < 1:
                await asyncio.sleep(0.001)
        await disk.close()


async def test_neither_opening_nor_closing_waits_for_extents_that_do_not_come(
    tmp_path: Path, workers: Workers
) -> None:
    BIG.make(str(tmp_path / "disk"))
    command = [*nbdkit(tmp_path / "disk", "--filter=delay"), "delay-extents=20"]
    with listening(tmp_path / "sock", *command):
        loop = asyncio.get_running_loop()
        began = loop.time()
        disk = await open_nbd(unix_uri(tmp_path / "sock"), workers)
        await disk.close()
        assert loop.time() - began < 10
        assert not disk.incidents.lost


def nbdkit(image: Path, *more: str) -> list[str]:
    return ["nbdkit", "-f", *more, "file", str(image)]


@pytest.mark.parametrize("image", [*CHOSEN[1:], BIG], ids=lambda image: image.name)
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--no-sr",),
        ("--filter=noextents", "--filter=nozero"),
        ("--filter=multi-conn", "multi-conn-mode=disable"),
    ],
    ids=["plain", "simple", "no-extents-no-zero", "one-connection"],
)
async def test_nbdkit(
    image: Image, more: tuple[str, ...], tmp_path: Path, workers: Workers
) -> None:
    golden = image.make(str(tmp_path / "disk"))
    options = [word for word in more if word.startswith("-")]
    settings = [word for word in more if not word.startswith("-")]
    command = [*nbdkit(tmp_path / "disk", *options), *settings]
    with listening(tmp_path / "sock", *command):
        await check_disk(opener(workers, unix_uri(tmp_path / "sock"), writable=True), golden)


@pytest.mark.parametrize("image", [CHOSEN[2], BIG], ids=lambda image: image.name)
@pytest.mark.parametrize("read_only", [False, True], ids=["writable", "read-only"])
async def test_qemu_nbd(image: Image, read_only: bool, tmp_path: Path, workers: Workers) -> None:
    golden = image.make(str(tmp_path / "disk"))
    size = -(-len(golden) // 512) * 512  # qemu-nbd 7.2 serves whole sectors
    golden += bytes(size - len(golden))
    extra = ["-r"] if read_only else []
    command = ["qemu-nbd", "-t", "-e", "8", "-f", "raw", *extra, str(tmp_path / "disk")]
    with listening(tmp_path / "sock", *command):
        uri = unix_uri(tmp_path / "sock")
        await check_disk(opener(workers, uri, writable=not read_only), golden)


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 4096])
async def test_whole_blocks_are_asked_for_where_the_server_insists(
    size: int, tmp_path: Path, workers: Workers
) -> None:
    golden = Image("blocks", size, ((0, 70_000), (300_000, 1000), (size - 10_000, 10_000))).make(
        str(tmp_path / "disk")
    )
    sizes = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536"]
    command = nbdkit(tmp_path / "disk", "--filter=blocksize-policy")
    with listening(tmp_path / "sock", *command, *sizes, "blocksize-error-policy=error"):
        uri = unix_uri(tmp_path / "sock")
        await check_disk(opener(workers, uri, writable=False), golden)
        disk = await open_nbd(uri, workers, writable=True)
        assert disk.block_sizes.minimum == 4096
        await disk.write(8192, memoryview(b"w" * 200_704))
        await disk.trim(1, 5000)  # holds no whole block
        await disk.flush()
        with pytest.raises(DiskError, match="blocks of 4096"):
            await disk.write(1, memoryview(b"w"))
        await disk.close()
    written = golden[:8192] + b"w" * 200_704 + golden[208_896:]
    assert (tmp_path / "disk").read_bytes() == written


@pytest.mark.parametrize("size", [100, 513, 1_000_001])
async def test_a_tail_that_cannot_be_asked_for_is_data_and_an_error_to_read(
    size: int, tmp_path: Path, workers: Workers
) -> None:
    sizes = ["blocksize-minimum=512", "blocksize-preferred=512", "blocksize-maximum=65536"]
    command = ["nbdkit", "--filter=blocksize-policy", "memory", str(size), *sizes]
    with listening(tmp_path / "sock", *command, "blocksize-error-policy=error"):
        disk = await open_nbd(unix_uri(tmp_path / "sock"), workers)
        tail = size // 512 * 512
        found: list[tuple[int, int]] = []
        while (at := sum(length for length, _ in found)) < size:
            extents = await disk.extents(at, size - at)
            found += [(extent.length, extent.flags) for extent in extents]
        assert found == [(tail, HOLE), (size - tail, DATA)][not tail :]
        await disk.cache(0, size)
        await disk.read_into(0, memoryview(bytearray(tail)))
        for offset in {0, max(tail - 5, 0), tail}:
            buffer = bytearray(b"x" * (size - offset))
            with pytest.raises(DiskError, match="no multiple of the 512") as raised:
                await disk.read_into(offset, memoryview(buffer))
            assert raised.value.offset == tail
            assert buffer[: tail - offset] == bytes(tail - offset)
        await disk.close()


async def test_what_cannot_be_asked_for_counts_as_changed(tmp_path: Path, workers: Workers) -> None:
    async def talk(conversation: Conversation) -> None:
        await conversation.greet()
        option = None
        while option != Option.GO:
            option, _ = await conversation.option()
            if option == Option.SET_META_CONTEXT:
                meta = (7).to_bytes(4, "big") + b"qemu:dirty-bitmap:b"
                conversation.reply(option, Reply.META_CONTEXT, meta)
            elif option == Option.GO:
                export = struct.pack(">HQH", Info.EXPORT, 1000, FLAGS)
                blocks = struct.pack(">HIII", Info.BLOCK_SIZE, 512, 512, 65536)
                conversation.reply(option, Reply.INFO, export)
                conversation.reply(option, Reply.INFO, blocks)
            unknown = option == Option.EXTENDED_HEADERS
            conversation.reply(option, Reply.ERR_UNSUP if unknown else Reply.ACK)
        await conversation.reader.read()

    context = "qemu:dirty-bitmap:b"
    async with misbehaving(tmp_path / "sock", talk):
        disk = await open_nbd(unix_uri(tmp_path / "sock"), workers, contexts=[context])
        assert await disk.status(context, 512, 488) == ExtentList(512, [(488, 1)])
        await disk.close()


async def test_a_map_that_is_told_extent_by_extent_however_they_lie(
    tmp_path: Path, workers: Workers
) -> None:
    """nbdkit announces no block size here, and answers with what its plugin says first."""
    told = "end=$((($4/777 + 1) * 777)); echo $4 $(($end<5000 ? $end-$4 : 5000-$4))"
    kind = "[ $(($4/777%2)) = 0 ] || echo hole,zero"
    script = ["get_size=echo 5000", "can_extents=exit 0", f"extents=echo $({told}) $({kind})"]
    command = ["nbdkit", "eval", *script, "pread=head -c $3 /dev/zero"]
    with listening(tmp_path / "sock", *command):
        disk = await open_nbd(unix_uri(tmp_path / "sock"), workers)
        found: list[tuple[int, int]] = []
        while (at := sum(length for length, _ in found)) < disk.size:
            extents = await disk.extents(at, disk.size - at)
            found += [(extent.length, extent.flags) for extent in extents]
        assert found == [*[(777, DATA), (777, HOLE)] * 3, (338, DATA)]
        await disk.close()


async def test_a_map_of_many_gigabytes(tmp_path: Path, workers: Workers) -> None:
    """nbdkit 1.32 does not survive every length there is."""
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(6 << 30)
        file.seek((4 << 30) + 4096)
        file.write(b"x" * 4096)
    with listening(tmp_path / "sock", *nbdkit(tmp_path / "disk")):
        disk = await open_nbd(unix_uri(tmp_path / "sock"), workers)
        found: list[tuple[int, int]] = []
        at = 0
        while at < disk.size:
            extents = await disk.extents(at, disk.size - at)
            found += [(extent.length, extent.flags) for extent in extents]
            at = extents.end
        data_at = (4 << 30) + 4096
        expected = [(data_at, HOLE), (4096, DATA), ((6 << 30) - data_at - 4096, HOLE)]
        assert ExtentList(0, expected) == ExtentList(0, found)
        await disk.close()


async def test_contexts_of_qemu(tmp_path: Path, workers: Workers) -> None:
    """A dirty bitmap and the allocation depth of a chain."""
    need("qemu-img")
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    for command in (
        ["qemu-img", "create", "-q", "-f", "qcow2", str(base), "1M"],
        ["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", str(base)],
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(top)],
        ["qemu-img", "bitmap", "--add", str(top), "changed"],
        ["qemu-io", "-f", "qcow2", "-c", "write -P 2 128k 64k", str(top)],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    command = ["qemu-nbd", "-t", "-r", "-A", "-B", "changed", "-f", "qcow2", str(top)]
    bitmap = "qemu:dirty-bitmap:changed"
    with listening(tmp_path / "sock", *command):
        uri = unix_uri(tmp_path / "sock")
        contexts = ("base:allocation", "qemu:allocation-depth", bitmap, "qemu:unheard-of")
        disk = await open_nbd(uri, workers, contexts=contexts)
        assert disk.contexts == contexts[:3]
        k = 1024
        dirty = ExtentList(0, [(128 * k, 0), (64 * k, 1), (832 * k, 0)])
        assert dirty == await disk.status(bitmap, 0, disk.size)
        depth = [(64 * k, 2), (64 * k, 0), (64 * k, 1), (832 * k, 0)]
        assert ExtentList(0, depth) == await disk.status(contexts[1], 0, disk.size)
        with pytest.raises(DiskError):
            await disk.status("qemu:unheard-of", 0, disk.size)
        await disk.close()
