"""Backing chains: what an image does not have comes from the one below it, or is zeroes."""

import os
import struct
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from protocol.extents import ZERO
from tests.disk.check_disk import check_disk, extent_map
from tests.disk.reading import content
from tests.formats.images import Image
from tests.formats.qcow2.peer import (
    converted,
    create,
    opener,
    qemu_img,
    qemu_io,
    read_by_qemu,
    refusal,
    states_by_qemu,
)

MIB = 1 << 20
BASE = Image("base", MIB + 512, ((0, 300_000), (700_000, 70_000), (MIB, 512)))


def over(path: Path, below: str, kind: str, *options: str) -> Path:
    """An overlay; ``options`` may end with a size of its own."""
    qemu_img("create", "-q", "-f", "qcow2", "-F", kind, "-b", below, path, *options)
    return path


async def check_chain(path: Path, workers: Workers) -> None:
    golden = read_by_qemu(path)
    disk = await opener(path, workers)()
    try:
        assert await content(disk, 0, disk.size) == golden
        # QEMU calls a hole of a raw file present, so only zero or not is compared.
        found = [state & ZERO for state in await extent_map(disk)]
        assert found == [state & ZERO for state in states_by_qemu(path)]
    finally:
        await disk.close()
    await check_disk(opener(path, workers), golden)


@pytest.mark.parametrize("size", ["256k", "1049088", "3M"])
@pytest.mark.parametrize("options", ["", "extended_l2=on", "compat=0.10,cluster_size=512"])
async def test_shorter_and_longer_than_what_is_below(
    tmp_path: Path, workers: Workers, size: str, options: str
) -> None:
    converted(tmp_path, BASE)
    more = ["-o", options] if options else []
    path = over(tmp_path / "top.qcow2", "base.qcow2", "qcow2", *more, size)
    qemu_io(path, "write -P 9 100k 3k")
    if not options.startswith("compat"):
        qemu_io(path, "write -z 128k 64k", "write -z -u 64k 64k")
    await check_chain(path, workers)


async def test_a_chain_of_many_formats(tmp_path: Path, workers: Workers) -> None:
    raw = tmp_path / "base.raw"
    BASE.make(str(raw))
    qemu_img("create", "-q", "-f", "qcow", "-F", "raw", "-b", "base.raw", tmp_path / "a.qcow")
    qemu_io(tmp_path / "a.qcow", "write -P 1 4k 9k")
    over(tmp_path / "b.qcow2", "a.qcow", "qcow", "-o", "cluster_size=4k")
    qemu_io(tmp_path / "b.qcow2", "write -P 2 200k 9k")
    over(tmp_path / "c.qcow2", "b.qcow2", "qcow2", "2M")
    qemu_io(tmp_path / "c.qcow2", "write -c -P 3 448k 64k", "write -z 256k 64k")
    await check_chain(tmp_path / "c.qcow2", workers)


async def test_zeroes_in_the_overlay_hide_what_is_below(tmp_path: Path, workers: Workers) -> None:
    converted(tmp_path, BASE)
    path = over(tmp_path / "top.qcow2", "base.qcow2", "qcow2")
    qemu_io(path, "write -z 0 128k")
    disk = await opener(path, workers)()
    assert await content(disk, 0, 128 << 10) == bytes(128 << 10)
    assert await content(disk, 128 << 10, 512) == BASE.golden()[128 << 10 :][:512]
    await disk.close()


async def test_the_name_is_relative_to_the_image(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    _, golden = converted(tmp_path / "below", BASE)
    path = over(tmp_path / "top.qcow2", "below/base.qcow2", "qcow2")
    monkeypatch.chdir("/")
    disk = await opener(Path(os.path.relpath(path)), workers)()
    assert await content(disk, 0, len(golden)) == golden
    await disk.close()


@pytest.mark.parametrize("name", ["vpc", "raw"])
async def test_qemu_names_of_formats(tmp_path: Path, workers: Workers, name: str) -> None:
    base = tmp_path / "base"
    qemu_img("create", "-q", "-f", "raw", base, "1M")
    path = create(tmp_path / "top.qcow2", "1M", "-u", "-F", name, "-b", "base")
    if name == "raw":
        disk = await opener(path, workers)()
        assert disk.backing is not None
        assert disk.backing.format == "raw"
        await disk.close()
        return
    assert "footer" in str(await refusal(path, workers))  # it was taken for a VHD


async def test_a_raw_base_is_not_probed(tmp_path: Path, workers: Workers) -> None:
    # A guest that writes a qcow2 header into its disk must not choose a file of the host.
    converted(tmp_path, BASE)
    path = over(tmp_path / "top.qcow2", "base.qcow2", "raw")
    disk = await opener(path, workers)()
    assert await content(disk, 0, 4) == b"QFI\xfb"
    await disk.close()


@pytest.mark.parametrize("name", ["json:{}", "nbd://localhost/x", "ssh://host/file", "fat:dir"])
async def test_a_base_that_is_no_file_is_refused(
    tmp_path: Path, workers: Workers, name: str
) -> None:
    path = create(tmp_path / "top.qcow2", "1M", "-u", "-F", "raw", "-b", name)
    error = await refusal(path, workers)
    assert isinstance(error, UnsupportedImage)
    assert name in str(error)


async def test_a_missing_base_is_named_with_its_child(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "top.qcow2", "1M", "-u", "-F", "raw", "-b", "gone.raw")
    error = await refusal(path, workers)
    assert "gone.raw" in str(error)
    assert "top.qcow2" in str(error)


async def test_a_loop_is_found(tmp_path: Path, workers: Workers) -> None:
    create(tmp_path / "a.qcow2", "1M", "-u", "-F", "qcow2", "-b", "b.qcow2")
    create(tmp_path / "b.qcow2", "1M", "-u", "-F", "qcow2", "-b", "a.qcow2")
    error = await refusal(tmp_path / "a.qcow2", workers)
    assert isinstance(error, CorruptImage)
    assert "loop" in str(error)


async def test_an_unprintable_name_is_corrupt(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "top.qcow2", "1M", "-u", "-F", "raw", "-b", "gone.raw")
    image = bytearray(path.read_bytes())
    (at,) = struct.unpack_from(">Q", image, 8)
    image[at : at + 4] = b"\xff\0\n\xfe"
    path.write_bytes(image)
    assert isinstance(await refusal(path, workers), CorruptImage)


async def test_nothing_stays_open_when_the_base_cannot_be_opened(
    tmp_path: Path, workers: Workers
) -> None:
    path = create(tmp_path / "top.qcow2", "1M", "-u", "-F", "qcow2", "-b", "gone.qcow2")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(DiskError):
            await opener(path, workers)()
    assert len(os.listdir("/proc/self/fd")) == before
