"""What cannot be written is refused before the source is looked through, which can take minutes."""

from pathlib import Path

import pytest

from nbdsrv.copying.engine import Copy
from nbdsrv.copying.in_place import DiskWriter
from nbdsrv.copying.target import parse_target
from nbdsrv.copying.writers import Making, image_writer
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.writer import ImageWriter
from protocol.extents import ExtentList
from tests.copying.disks import MIB, MemoryDisk


class Unseen(MemoryDisk):
    """Nobody may ask where it has data."""

    async def extents(self, offset: int, length: int) -> ExtentList:
        raise AssertionError("looked through before the target")


async def refused(writer: ImageWriter, size: int, workers: Workers) -> str:
    source = Unseen(workers, b"")
    source.size = size
    with pytest.raises(DiskError) as caught:
        await Copy(source, writer, workers).run()
    return str(caught.value)


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vhd", "vmdk"])
async def test_no_such_directory(tmp_path: Path, workers: Workers, kind: str) -> None:
    target = parse_target(f"{kind}:{tmp_path}/nowhere/disk")
    writer = image_writer(target, Making(), workers, None)
    assert "No such file or directory" in await refused(writer, MIB, workers)


@pytest.mark.parametrize(("kind", "most"), [("vhd", 2040 << 30), ("vmdk", 2 << 40)])
@pytest.mark.parametrize("pipe", [False, True], ids=["file", "pipe"])
async def test_too_large_for_the_format(
    tmp_path: Path, workers: Workers, kind: str, most: int, *, pipe: bool
) -> None:
    target = parse_target(f"{kind}:{'-' if pipe else tmp_path / 'disk'}")
    writer = image_writer(target, Making(), workers, None)
    assert "write another format" in await refused(writer, most + 512, workers)
    assert not list(tmp_path.iterdir())


async def test_a_disk_that_is_read_only(workers: Workers) -> None:
    writer = DiskWriter(MemoryDisk(workers, bytes(MIB)))
    assert "read-only" in await refused(writer, 2 * MIB, workers)
