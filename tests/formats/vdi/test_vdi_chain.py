"""Differencing VDIs: the parent is found by UUID, proven, or asked for."""

import os
import shutil
from pathlib import Path
from uuid import UUID

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.opening import Opening, open_image
from protocol.contexts import ALLOCATION_DEPTH
from protocol.extents import DATA, HOLE, ZERO
from tests.disk.check_disk import check_disk
from tests.formats.images import Image
from tests.formats.table_images import converted
from tests.formats.vdi.differencing import IDENTITY_AT, MODIFIED_AT, discard, make_child, uuids

MIB = 1 << 20
BASE = Image("base", 6 * MIB, ((0, 2 * MIB), (3 * MIB, 3 * MIB)))
MIDDLE = Image("middle", 6 * MIB, ((MIB, MIB), (2 * MIB, 5)))
TOP = Image("top", 6 * MIB, ((4 * MIB, 4096),))


@pytest.fixture
def chain(tmp_path: Path) -> tuple[str, str, str, bytes]:
    """base <- middle <- top; block 5 is discarded in the top. The last one is the content."""
    base, base_golden = converted(tmp_path, BASE, "vdi")
    middle, middle_golden = converted(tmp_path, MIDDLE, "vdi")
    top, top_golden = converted(tmp_path, TOP, "vdi")
    make_child(middle, base)
    make_child(top, middle)
    discard(top, 5)
    golden = bytearray(base_golden)
    golden[MIB : 3 * MIB] = middle_golden[MIB : 3 * MIB]
    golden[4 * MIB : 5 * MIB] = top_golden[4 * MIB : 5 * MIB]
    golden[5 * MIB :] = bytes(MIB)
    return base, middle, top, bytes(golden)


async def refusal(path: str, workers: Workers) -> DiskError:
    with pytest.raises(DiskError) as raised:
        await open_image(path, "", Opening(workers))
    return raised.value


def patch(path: str, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


async def test_contract(chain: tuple[str, str, str, bytes], workers: Workers) -> None:
    *_, top, golden = chain

    async def open_disk() -> Disk:
        return await open_image(top, "", Opening(workers))

    await check_disk(open_disk, golden, extents_granularity=MIB)


async def test_states_and_depths(chain: tuple[str, str, str, bytes], workers: Workers) -> None:
    base, middle, top, _ = chain
    discard(base, 3, 0xFFFF_FFFF)
    disk = await open_image(top, "", Opening(workers))
    states = [(e.length // MIB, e.flags) for e in await disk.extents(0, disk.size)]
    assert states == [(3, DATA), (1, HOLE), (1, DATA), (1, ZERO)]
    depths = await disk.status(ALLOCATION_DEPTH, 0, disk.size)
    assert [(e.length // MIB, e.flags) for e in depths] == [(1, 3), (2, 2), (1, 0), (2, 1)]
    assert disk.facts["kind"] == "differencing"
    assert disk.facts["parent"] == os.path.join(os.path.dirname(top), ".", "middle.vdi")
    assert disk.facts["parent_uuid"] == str(UUID(bytes_le=uuids(middle)[0]))
    await disk.close()


async def test_parent_one_folder_above_snapshots(
    tmp_path: Path, chain: tuple[str, str, str, bytes], workers: Workers
) -> None:
    base, middle, top, golden = chain
    (tmp_path / "vm" / "Snapshots").mkdir(parents=True)
    shutil.move(base, tmp_path / "vm" / "disk: the base.vdi")
    for path in (middle, top):
        shutil.move(path, tmp_path / "vm" / "Snapshots")
    disk = await open_image(str(tmp_path / "vm/Snapshots/top.vdi"), "", Opening(workers))
    buffer = bytearray(len(golden))
    await disk.read_into(0, memoryview(buffer))
    assert bytes(buffer) == golden
    await disk.close()


async def test_missing_parent(chain: tuple[str, str, str, bytes], workers: Workers) -> None:
    base, middle, top, _ = chain
    identity = UUID(bytes_le=uuids(base)[0])
    os.unlink(base)
    error = await refusal(top, workers)
    assert f"{middle.replace('middle', './middle')}" in str(error)
    assert str(identity) in str(error)
    assert f"the parent of {top}" in str(error)


async def test_parent_with_another_uuid_is_not_the_parent(
    chain: tuple[str, str, str, bytes], workers: Workers
) -> None:
    base, middle, _, _ = chain
    patch(base, IDENTITY_AT, b"another identity")
    error = await refusal(middle, workers)
    assert middle in str(error)
    assert "put it there" in str(error)


async def test_parent_changed_since(chain: tuple[str, str, str, bytes], workers: Workers) -> None:
    base, middle, _, _ = chain
    patch(base, MODIFIED_AT, b"written to since")
    error = await refusal(middle, workers)
    assert isinstance(error, CorruptImage)
    assert middle in str(error)
    assert "base.vdi has been changed since the child was made" in str(error)


async def test_unchanged_copy_is_preferred_to_a_changed_one(
    tmp_path: Path, chain: tuple[str, str, str, bytes], workers: Workers
) -> None:
    base, middle, _, _ = chain
    shutil.copy(base, tmp_path / "a-copy.vdi")
    patch(str(tmp_path / "a-copy.vdi"), MODIFIED_AT, b"written to since")
    disk = await open_image(middle, "", Opening(workers))
    assert str(disk.facts["parent"]).endswith("base.vdi")
    await disk.close()


async def test_loop(chain: tuple[str, str, str, bytes], workers: Workers) -> None:
    base, middle, top, _ = chain
    make_child(base, middle)
    error = await refusal(top, workers)
    assert isinstance(error, CorruptImage)
    assert "loop" in str(error)


async def test_other_files_in_the_folder_do_not_matter(
    tmp_path: Path, chain: tuple[str, str, str, bytes], workers: Workers
) -> None:
    (tmp_path / "00.vdi").write_bytes(b"no VDI")
    (tmp_path / "01.vdi").mkdir()
    os.mkfifo(tmp_path / "02.vdi")
    (tmp_path / "03.VDI").symlink_to("/nowhere")
    disk = await open_image(chain[1], "", Opening(workers))
    await disk.close()
