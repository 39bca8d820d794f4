"""Differencing VHDs: their bitmaps count, and the parent is found by its names and proven."""

import os
import random
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.vhd.parents import windows_names
from protocol.contexts import ALLOCATION_DEPTH
from tests.disk.check_disk import OpenDisk, check_disk, extent_map
from tests.disk.reading import content
from tests.formats.vhd.vhd_images import (
    BASE_ID,
    CHILD_ID,
    DIFFERENCING,
    FIXED,
    GRANDCHILD_ID,
    Block,
    Vhd,
)

MIB = 1 << 20
SMALL = 64 << 10


def opener(path: str, workers: Workers) -> OpenDisk:
    async def open_disk() -> Disk:
        return await open_image(path, "", Opening(workers))

    return open_disk


def data(seed: int, length: int = SMALL) -> bytes:
    return random.Random(seed).randbytes(length)


def base(**fields: object) -> Vhd:
    vhd = Vhd(size=6 * SMALL, block_size=SMALL, **fields)  # type: ignore[arg-type]
    vhd.blocks = {n: Block(data(n)) for n in (4, 0, 1, 5)}
    return vhd


def child(**fields: object) -> Vhd:
    given: dict[str, object] = {
        "size": 6 * SMALL,
        "block_size": SMALL,
        "kind": DIFFERENCING,
        "unique_id": CHILD_ID,
        "parent_id": BASE_ID,
        "parent_name": "base.vhd",
    }
    vhd = Vhd(**{**given, **fields})  # type: ignore[arg-type]
    some = frozenset(random.Random(5).sample(range(128), 60))
    vhd.blocks = {1: Block(data(11), some), 3: Block(data(13), frozenset({0, 127}))}
    vhd.blocks |= {2: Block(data(12)), 4: Block(data(14), frozenset())}
    return vhd


async def read(path: Path, workers: Workers) -> bytes:
    disk = await open_image(str(path), "", Opening(workers))
    try:
        return await content(disk, 0, disk.size)
    finally:
        await disk.close()


async def refusal(path: Path, workers: Workers) -> str:
    with pytest.raises(DiskError) as raised:
        await open_image(str(path), "", Opening(workers))
    assert "\n" not in str(raised.value)
    return str(raised.value)


async def test_contract(tmp_path: Path, workers: Workers) -> None:
    bottom, middle = base(), child()
    bottom.write(tmp_path / "base.vhd")
    middle.write(tmp_path / "child.vhd")
    top = Vhd(
        size=6 * SMALL - 512,
        block_size=16 << 10,
        kind=DIFFERENCING,
        unique_id=GRANDCHILD_ID,
        parent_id=CHILD_ID,
        parent_name="child.vhd",
    )
    top.blocks = {3: Block(data(23), frozenset({5, 6})), 23: Block(data(24))}
    path = top.write(tmp_path / "top.vhd")
    golden = top.content(middle.content(bottom.content()))
    await check_disk(opener(path, workers), golden, extents_granularity=512)


async def test_depth_of_every_sector(tmp_path: Path, workers: Workers) -> None:
    base().write(tmp_path / "base.vhd")
    vhd = child()
    disk = await open_image(vhd.write(tmp_path / "child.vhd"), "", Opening(workers))
    depths = await extent_map(disk, ALLOCATION_DEPTH)
    present = vhd.blocks[1].sectors or frozenset()
    for sector in range(128):
        assert depths[SMALL + sector * 512] == (1 if sector in present else 2)
    assert depths[2 * SMALL] == 1
    assert depths[3 * SMALL : 3 * SMALL + 1024] == b"\1" * 512 + b"\0" * 512
    assert depths[4 * SMALL] == 2
    assert disk.facts["subformat"] == "differencing"
    assert disk.facts["parent"] == str(tmp_path / "base.vhd")
    assert disk.facts["parent_unique_id"] == str(BASE_ID)
    await disk.close()


async def test_bits_from_the_wrong_end_are_tapdisk_0_1(tmp_path: Path, workers: Workers) -> None:
    base().write(tmp_path / "base.vhd")
    vhd = child(least_first=True, creator=b"tap\0", creator_version=1)
    vhd.write(tmp_path / "child.vhd")
    assert await read(tmp_path / "child.vhd", workers) == vhd.content(base().content())


async def test_ordinary_blocks_with_partial_bitmaps(tmp_path: Path, workers: Workers) -> None:
    bottom = Vhd(size=4 * MIB, blocks={0: Block(data(1, 2 * MIB)), 1: Block(data(2, 2 * MIB))})
    bottom.write(tmp_path / "base.vhd")
    top = Vhd(
        size=4 * MIB, kind=DIFFERENCING, unique_id=CHILD_ID, parent_id=BASE_ID,
        parent_name="base.vhd",
    )  # fmt: skip
    top.blocks = {1: Block(data(3, 2 * MIB), frozenset(range(100, 3000, 7)))}
    top.write(tmp_path / "child.vhd")
    assert await read(tmp_path / "child.vhd", workers) == top.content(bottom.content())


@pytest.mark.parametrize("size", [3 * SMALL + 512, 9 * SMALL])
async def test_parent_of_another_size(tmp_path: Path, workers: Workers, size: int) -> None:
    bottom = Vhd(size=size, block_size=32 << 10)
    bottom.blocks = {n: Block(data(n, 32 << 10)) for n in range(-(-size // (32 << 10)))}
    bottom.write(tmp_path / "base.vhd")
    path = child().write(tmp_path / "child.vhd")
    golden = child().content(bottom.content())
    await check_disk(opener(path, workers), golden, extents_granularity=512)


async def test_parent_of_fixed_size(tmp_path: Path, workers: Workers) -> None:
    bottom = base(kind=FIXED)
    bottom.write(tmp_path / "base.vhd")
    child().write(tmp_path / "child.vhd")
    assert await read(tmp_path / "child.vhd", workers) == child().content(bottom.content())


NAMES = {
    "relative": [(b"W2ru", ".\\sub\\base.vhd".encode("utf-16-le"))],
    "relative, up": [(b"W2ru", "..\\here\\sub\\base.vhd".encode("utf-16-le"))],
    "absolute, moved": [(b"W2ku", "D:\\elsewhere\\base.vhd".encode("utf-16-le"))],
    "uri": [(b"MacX", b"file://./sub/base.vhd")],
    "uri, escaped": [(b"MacX", b"file://localhost/%HERE%/s%75b/base.vhd")],
    "uri, as tapdisk writes it": [(b"MacX", b"file://sub/base.vhd")],
    "NUL behind": [(b"W2ru", "sub/base.vhd\0\0".encode("utf-16-le"))],
    "second": [(b"W2ru", "gone.vhd".encode("utf-16-le")), (b"MacX", b"file://sub/base.vhd")],
    "not text": [(b"W2ru", b"\x00\xd8\x00"), (b"MacX", b"file://sub/base.vhd")],
    "unknown kind": [(b"Wi2k", b"x"), (b"W2ku", "/%HERE%/sub/base.vhd".encode("utf-16-le"))],
}


@pytest.mark.parametrize("space_in_bytes", [False, True])
@pytest.mark.parametrize("name", NAMES)
async def test_parent_found_by_locator(
    tmp_path: Path, workers: Workers, name: str, space_in_bytes: bool
) -> None:
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    where = here / "base.vhd" if "moved" in name else here / "sub" / "base.vhd"
    base().write(where)
    locators = []
    for platform, text in NAMES[name]:
        wide = "utf-16-le" if platform == b"W2ku" else "ascii"
        mark, real = ("/%HERE%".encode(wide), str(here).encode(wide))
        locators.append((platform, text.replace(mark, real)))
    vhd = child(parent_name="not there", locators=locators, space_in_bytes=space_in_bytes)
    vhd.write(here / "child.vhd")
    assert await read(here / "child.vhd", workers) == vhd.content(base().content())


async def test_relative_locator_before_absolute_before_plain_name(
    tmp_path: Path, workers: Workers
) -> None:
    """All are the same image by their ids; which one is read shows the order."""
    names = ["relative.vhd", "absolute.vhd", "uri.vhd", "plain.vhd"]
    for seed, name in enumerate(names):
        vhd = base()
        vhd.blocks[0] = Block(data(100 + seed))
        vhd.write(tmp_path / name)
    locators = [
        (b"MacX", b"file://uri.vhd"),
        (b"W2ku", str(tmp_path / "absolute.vhd").encode("utf-16-le")),
        (b"W2ru", "relative.vhd".encode("utf-16-le")),
    ]
    child(parent_name="plain.vhd", locators=locators).write(tmp_path / "child.vhd")
    for seed, name in enumerate(names):
        found = await read(tmp_path / "child.vhd", workers)
        assert found[:SMALL] == data(100 + seed)
        os.unlink(tmp_path / name)
    assert "plain.vhd" in await refusal(tmp_path / "child.vhd", workers)


async def test_an_image_of_another_id_is_passed_over(tmp_path: Path, workers: Workers) -> None:
    base(unique_id=GRANDCHILD_ID).write(tmp_path / "wrong.vhd")
    (tmp_path / "text.vhd").write_bytes(b"no image at all" * 100)
    base().write(tmp_path / "base.vhd")
    locators = [
        (b"W2ru", "wrong.vhd".encode("utf-16-le")),
        (b"W2ku", "text.vhd".encode("utf-16-le")),
    ]
    vhd = child(locators=locators)
    vhd.write(tmp_path / "child.vhd")
    assert await read(tmp_path / "child.vhd", workers) == vhd.content(base().content())


async def test_wrong_parent_is_refused_by_both_names_and_ids(
    tmp_path: Path, workers: Workers
) -> None:
    base(unique_id=GRANDCHILD_ID).write(tmp_path / "base.vhd")
    child().write(tmp_path / "child.vhd")
    text = await refusal(tmp_path / "child.vhd", workers)
    for part in (tmp_path / "child.vhd", tmp_path / "base.vhd", BASE_ID, GRANDCHILD_ID):
        assert str(part) in text
    assert text.startswith("corrupt image: ")


async def test_missing_parent_is_refused_by_name(tmp_path: Path, workers: Workers) -> None:
    child().write(tmp_path / "child.vhd")
    text = await refusal(tmp_path / "child.vhd", workers)
    for part in (tmp_path / "child.vhd", tmp_path / "base.vhd", BASE_ID):
        assert str(part) in text


async def test_no_name_at_all(tmp_path: Path, workers: Workers) -> None:
    child(parent_name="").write(tmp_path / "child.vhd")
    assert "it has no name" in await refusal(tmp_path / "child.vhd", workers)


async def test_broken_parent_is_refused(tmp_path: Path, workers: Workers) -> None:
    broken = bytearray(base().build())
    broken[512:520] = b"no magic"
    (tmp_path / "base.vhd").write_bytes(broken)
    child().write(tmp_path / "child.vhd")
    text = await refusal(tmp_path / "child.vhd", workers)
    assert "base.vhd" in text


async def test_a_loop_is_refused(tmp_path: Path, workers: Workers) -> None:
    child(parent_id=CHILD_ID, parent_name="child.vhd").write(tmp_path / "child.vhd")
    assert "loop" in await refusal(tmp_path / "child.vhd", workers)
    child(parent_id=GRANDCHILD_ID, parent_name="b.vhd").write(tmp_path / "a.vhd")
    child(unique_id=GRANDCHILD_ID, parent_id=CHILD_ID, parent_name="a.vhd").write(
        tmp_path / "b.vhd"
    )
    assert "loop" in await refusal(tmp_path / "a.vhd", workers)


async def test_nothing_stays_open_when_a_parent_is_refused(
    tmp_path: Path, workers: Workers
) -> None:
    base(unique_id=GRANDCHILD_ID).write(tmp_path / "base.vhd")
    middle = child(unique_id=GRANDCHILD_ID)
    middle.write(tmp_path / "middle.vhd")
    child(parent_id=GRANDCHILD_ID, parent_name="middle.vhd").write(tmp_path / "child.vhd")
    await refusal(tmp_path / "child.vhd", workers)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await refusal(tmp_path / "child.vhd", workers)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_parent_that_changes_while_it_is_opened_is_refused(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    base().write(tmp_path / "base.vhd")
    child().write(tmp_path / "child.vhd")
    below = Opening.below

    async def swapped(self: Opening, *args: object) -> Disk:
        base(unique_id=GRANDCHILD_ID).write(tmp_path / "base.vhd")
        return await below(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Opening, "below", swapped)
    with pytest.raises(CorruptImage, match="another image"):
        await open_image(str(tmp_path / "child.vhd"), "", Opening(workers))


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("base.vhd", ["base.vhd"]),
        (".\\base.vhd", ["./base.vhd"]),
        ("..\\a\\base.vhd", ["../a/base.vhd"]),
        ("/srv/base.vhd", ["/srv/base.vhd", "base.vhd"]),
        ("C:\\a b\\base.vhd", ["/a b/base.vhd", "base.vhd"]),
        ("\\\\?\\d:\\a\\base.vhd", ["/a/base.vhd", "base.vhd"]),
        ("\\\\?\\Volume{26A21BDA-A627}\\a\\base.vhd", ["/a/base.vhd", "base.vhd"]),
        ("\\\\?\\UNC\\server\\share\\base.vhd", ["/base.vhd", "base.vhd"]),
        ("\\\\server\\share\\base.vhd", ["//server/share/base.vhd", "base.vhd"]),
        ("C:\\dir\\", ["/dir/"]),
        ("", []),
    ],
)
def test_names_from_windows(name: str, candidates: list[str]) -> None:
    assert list(windows_names(name)) == candidates
