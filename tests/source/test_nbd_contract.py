"""NbdDisk keeps the Disk contract over every server there is here."""

from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.source.nbd import open_nbd
from tests.disk.check_disk import OpenDisk, check_disk
from tests.formats.images import IMAGES, Image
from tests.net.in_process import running
from tests.source.peers import listening, unix_uri

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
