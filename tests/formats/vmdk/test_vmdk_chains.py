"""A parent is found, proven by its CID, and never replaced by another."""

import shutil
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.formats.opening import MAX_CHAIN, Opening, open_image
from nbdsrv.formats.vmdk.descriptor import ExtentLine
from protocol.contexts import ALLOCATION_DEPTH
from tests.disk.check_disk import check_disk
from tests.disk.reading import content
from tests.formats.vmdk.images import (
    GOLDEN,
    MIB,
    extents_of,
    qemu_img,
    qemu_io,
    qemu_map,
    qemu_raw,
    raw_file,
)
from tests.formats.vmdk.laid_out import described, se_sparse


async def opened(workers: Workers, path: Path) -> Disk:
    return await open_image(str(path), "", Opening(workers))


def child_of(parent: Path, name: str, size: int = 0, options: str = "zeroed_grain=on") -> Path:
    path = parent.with_name(name)
    given = ["-b", parent.name, "-F", "vmdk", "-o", options, path]
    qemu_img("create", "-f", "vmdk", *given, *([size] if size else []))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.vmdk"
    qemu_img("convert", "-O", "vmdk", raw_file(tmp_path / "golden", GOLDEN), path)
    return path


def edit(path: Path, before: str, after: str) -> None:
    """In the embedded or separate descriptor, keeping its length."""
    data = path.read_bytes()
    assert data.count(before.encode()) == 1, before
    new = data.replace(before.encode(), after.encode())
    at = new.find(after.encode()) + len(after)
    if len(after) > len(before):
        hole = new.index(b"\0", at)
        new = new[:hole] + new[hole + len(after) - len(before) :]
    elif len(after) < len(before):
        new = new[:at] + b" " * (len(before) - len(after)) + new[at:]
    assert len(new) == len(data) or path.stat().st_size < 2000
    path.write_bytes(new)


def cid_of(path: Path) -> str:
    return path.read_bytes().partition(b"\nCID=")[2].partition(b"\n")[0].decode().zfill(8)


async def test_chain_of_three(base: Path, workers: Workers) -> None:
    middle = child_of(base, "middle.vmdk")
    qemu_io(middle, "write -P 3 100k 300k", "write -z 1M 256k", "write -P 4 4M 64k")
    top = child_of(middle, "top.vmdk", 6 * MIB)
    qemu_io(top, "write -P 5 0 1k", "write -z 2M 128k", "write -P 6 5900k 1k")
    expected = qemu_raw(top)
    disk = await opened(workers, top)
    assert await content(disk, 0, disk.size) == expected
    assert await extents_of(disk) == qemu_map(top)
    assert disk.facts["parent"] == str(middle)
    depths = [await disk.status(ALLOCATION_DEPTH, at, 1) for at in (0, 4 * MIB, 5900 << 10)]
    assert [extent.flags for depth in depths for extent in depth] == [1, 2, 1]
    await disk.close()
    await check_disk(lambda: opened(workers, top), expected)


async def test_flat_parent(tmp_path: Path, workers: Workers) -> None:
    base = tmp_path / "base.vmdk"
    raw = raw_file(tmp_path / "golden", GOLDEN)
    qemu_img("convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", raw, base)
    top = child_of(base, "top.vmdk")
    qemu_io(top, "write -P 5 64k 64k")
    expected = qemu_raw(top)
    await check_disk(lambda: opened(workers, top), expected)


async def test_parent_with_another_cid_names_both_files_and_cids(
    base: Path, workers: Workers
) -> None:
    top = child_of(base, "top.vmdk")
    before = cid_of(base)
    qemu_io(base, "write -P 1 0 512")  # changes the CID
    after = cid_of(base)
    assert before != after
    with pytest.raises(CorruptImage) as raised:
        await opened(workers, top)
    for part in (str(top), str(base), before, after):
        assert part in str(raised.value)


async def test_missing_parent_names_both_files(base: Path, workers: Workers) -> None:
    top = child_of(base, "top.vmdk")
    base.unlink()
    with pytest.raises(DiskError) as raised:
        await opened(workers, top)
    assert str(top) in str(raised.value)
    assert str(base) in str(raised.value)


async def test_parent_that_is_no_vmdk_names_both_files(base: Path, workers: Workers) -> None:
    top = child_of(base, "top.vmdk")
    base.unlink()
    qemu_img("create", "-f", "qcow2", base, 5 * MIB)
    with pytest.raises(DiskError) as raised:
        await opened(workers, top)
    assert str(top) in str(raised.value)
    assert str(base) in str(raised.value)


async def test_truncated_parent_names_both_files(base: Path, workers: Workers) -> None:
    top = child_of(base, "top.vmdk")
    base.write_bytes(base.read_bytes()[:3000])
    with pytest.raises(CorruptImage) as raised:
        await opened(workers, top)
    assert str(top) in str(raised.value)
    assert str(base) in str(raised.value)


@pytest.mark.parametrize("hint", ["/gone/base.vmdk", r"C:\VMs\base.vmdk", "C:/VMs/base.vmdk"])
async def test_parent_that_moved_along_is_found_beside_its_child(
    base: Path, hint: str, workers: Workers
) -> None:
    top = child_of(base, "top.vmdk")
    edit(top, 'Hint="base.vmdk"', f'Hint="{hint}"')
    disk = await opened(workers, top)
    assert await content(disk, 0, disk.size) == GOLDEN
    await disk.close()


@pytest.mark.parametrize("hint", ["nbd://host/x", "json:{}", "http://host/base.vmdk"])
async def test_parent_elsewhere_than_in_a_file_is_not_followed(
    base: Path, hint: str, workers: Workers
) -> None:
    top = child_of(base, "top.vmdk")
    base.unlink()
    edit(top, 'Hint="base.vmdk"', f'Hint="{hint}"')
    with pytest.raises(UnsupportedImage, match=r"top\.vmdk: .* not followed"):
        await opened(workers, top)


async def test_parent_without_a_name(base: Path, workers: Workers) -> None:
    top = child_of(base, "top.vmdk")
    edit(top, 'parentFileNameHint="base.vmdk"', "# nothing")
    with pytest.raises(CorruptImage, match=r"its parent has CID .* does not say where"):
        await opened(workers, top)


async def test_loop(base: Path, workers: Workers) -> None:
    top = child_of(base, "top.vmdk")
    edit(top, 'Hint="base.vmdk"', 'Hint="top.vmdk"')
    with pytest.raises(CorruptImage, match="a loop"):
        await opened(workers, top)


async def test_chain_too_deep(tmp_path: Path, workers: Workers) -> None:
    raw = ExtentLine(8, "FLAT", "disk-flat.vmdk")
    (tmp_path / "disk-flat.vmdk").write_bytes(bytes(4096))
    described(tmp_path / "0.vmdk", "monolithicFlat", raw, content_id=1)
    se_sparse(tmp_path / "delta.vmdk", 4096, {})
    delta = ExtentLine(8, "SESPARSE", "delta.vmdk")
    for number in range(1, MAX_CHAIN + 2):
        described(
            tmp_path / f"{number}.vmdk",
            "seSparse",
            delta,
            content_id=1,
            parent_content_id=1,
            parent_name=f"{number - 1}.vmdk",
        )
    disk = await opened(workers, tmp_path / f"{MAX_CHAIN - 1}.vmdk")
    assert await content(disk, 0, 4096) == bytes(4096)
    await disk.close()
    with pytest.raises(CorruptImage, match=f"more than {MAX_CHAIN} images"):
        await opened(workers, tmp_path / f"{MAX_CHAIN + 1}.vmdk")


async def test_nothing_stays_open_after_a_refusal(base: Path, workers: Workers) -> None:
    top = child_of(base, "top.vmdk")
    shutil.copy(base, base.with_name("other.vmdk"))
    qemu_io(base, "write -P 1 0 512")
    before = open_files(base.parent)
    with pytest.raises(CorruptImage):
        await opened(workers, top)
    assert open_files(base.parent) == before == []


def open_files(directory: Path) -> list[str]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith(str(directory)):
            found.append(target)
    return found
