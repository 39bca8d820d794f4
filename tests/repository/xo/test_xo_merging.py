"""Merges that were interrupted at every step, in directories and in files."""

import json
import shutil
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage
from nbdsrv.repository.repository import CHANGED_SINCE
from tests.disk.reading import content
from tests.repository.xo.made import BLOCK, Layer, Made, disk_uuid
from tests.repository.xo.opened import contents, opened

A, B, C, D = (f"2026020{day}T000000Z" for day in (1, 2, 3, 4))

STAMPS = {"A": A, "B": B, "C": C, "D": D}


def block(seed: int) -> bytes:
    return bytes([seed]) * BLOCK


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A full one and three deltas; in each, blocks that others have too."""
    made = Made(tmp_path / "xo")
    made.point(A, [Layer(A, 5 * BLOCK, {0: block(10), 1: block(11), 2: block(12)})])
    made.point(B, [Layer(B, 5 * BLOCK, {1: block(21), 3: block(23)}, parent=A)])
    made.point(C, [Layer(C, 5 * BLOCK, {1: block(31), 2: block(32)}, parent=B)])
    made.point(D, [Layer(D, 5 * BLOCK, {4: block(44)}, parent=C)])
    return made


def place(made: Made, stamp: str) -> Path:
    return made.root / made.vdi() / "data" / f"{stamp}.vhd"


def state(made: Made, *stamps: str, older: bool = False) -> Path:
    """The state file of a merge of these into the first."""
    chain = [f"{stamp}.alias.vhd" for stamp in stamps]
    said: dict[str, object] = {
        "chain": chain,
        "child": {"uuid": str(disk_uuid("root", stamps[-1]))},
        "parent": {"uuid": str(disk_uuid("root", stamps[0]))},
        "currentBlock": None,
        "step": "mergeBlocks",
    }
    if older:
        said = {"child": {"header": 1}, "parent": {"header": 2}, "step": "mergeBlocks"}
    return made.file(f"{made.vdi()}/.{chain[0]}.merge.json", json.dumps(said).encode())


def move(made: Made, child: str, parent: str, number: int) -> None:
    (place(made, child) / f"blocks/0/{number}").replace(place(made, parent) / f"blocks/0/{number}")


async def check(made: Made, workers: Workers, good: str, refused: str) -> None:
    async with opened(made.root, workers) as repository:
        points = {point.id: point for point in await repository.points()}
        assert [stamp for stamp, point in points.items() if not point.flags] == [
            STAMPS[letter] for letter in good
        ]
        for letter in good:
            stamp = STAMPS[letter]
            assert await contents(repository, f"@{stamp}") == made.content(stamp), letter
        for letter in refused:
            point = points[STAMPS[letter]]
            assert point.flags == ("damaged",)
            with pytest.raises(CorruptImage, match="being merged"):
                await repository.open_disk(point, "root")
        done = await repository.verify("chunks")
        assert {hurt.point[-16:] for finding in done.findings for hurt in finding.hurts} == {
            STAMPS[letter] for letter in refused
        }


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("moved", [(), (1,), (1, 3)])
async def test_two_disks_at_every_step(
    made: Made, moved: tuple[int, ...], older: bool, workers: Workers
) -> None:
    state(made, A, B, older=older)
    for number in moved:
        move(made, B, A, number)
    await check(made, workers, "BCD", "A")


@pytest.mark.parametrize("moved", range(5))
async def test_three_disks_at_once_refuse_the_one_between(
    made: Made, moved: int, workers: Workers
) -> None:
    state(made, A, B, C)
    # Of each block the newest in the chain goes to the parent: block 1 is C's, not B's.
    for child, number in [(C, 1), (C, 2), (B, 3), (B, 1)][:moved]:
        if (child, number) == (B, 1):
            (place(made, B) / "blocks/0/1").unlink()  # cleaned up
        else:
            move(made, child, A, number)
    await check(made, workers, "CD", "AB")


async def test_the_parent_has_its_childs_id_already(made: Made, workers: Workers) -> None:
    state(made, A, B)
    for number in (1, 3):
        move(made, B, A, number)
    taken = Layer(B, 5 * BLOCK)
    footer = made.encoder.pack("brotli", made.encoder.footer(taken))
    (place(made, A) / "footer").write_bytes(footer)
    await check(made, workers, "BCD", "A")


async def test_a_merge_in_files_leaves_the_children_exact(tmp_path: Path, workers: Workers) -> None:
    made = Made(tmp_path / "xo")
    made.point(A, [Layer(A, 3 * BLOCK, {0: block(10), 1: block(11)}, layout="vhd")])
    made.point(B, [Layer(B, 3 * BLOCK, {1: block(21)}, layout="vhd", parent=A)])
    path = made.root / made.vdi() / f"{A}.vhd"
    raw = bytearray(path.read_bytes())
    raw[-512:] = bytes(512)  # the footer's place is being written
    path.write_bytes(raw)
    said = {"chain": [f"{A}.vhd", f"{B}.vhd"], "step": "mergeBlocks"}
    made.file(f"{made.vdi()}/.{A}.vhd.merge.json", json.dumps(said).encode())
    await check(made, workers, "B", "A")


async def test_when_it_is_done_the_target_is_whole(made: Made, workers: Workers) -> None:
    for number in (1, 3):
        move(made, B, A, number)
    shutil.rmtree(place(made, B))
    merged = Layer(B, 5 * BLOCK, {n: made.content(B)[n * BLOCK :][:BLOCK] for n in range(4)})
    made.disk(merged)
    (made.root / made.vdi() / f"{A}.alias.vhd").unlink()
    (made.root / made.vm() / f"{A}.json").unlink()
    state(made, A, B)  # left over
    async with opened(made.root, workers) as repository:
        points = await repository.points()
        assert [(point.id, point.flags) for point in points] == [(B, ()), (C, ()), (D, ())]
        for stamp in (B, C, D):
            assert await contents(repository, f"@{stamp}") == made.content(stamp)
        done = await repository.verify("structure")
        assert done.findings == []
        assert any("has ended" in note.text for note in done.notes)


@pytest.mark.parametrize("said", [b"", b"{", b"[1]", b'{"chain": ["../../../../x"]}', b"\xff"])
async def test_a_state_nobody_can_read_still_refuses_its_parent(
    made: Made, said: bytes, workers: Workers
) -> None:
    state(made, A, B).write_bytes(said)
    move(made, B, A, 1)
    await check(made, workers, "BCD", "A")


async def test_what_has_changed_since_does_not_name_a_parent_that_is_no_more(
    made: Made, workers: Workers
) -> None:
    state(made, A, B)
    async with opened(made.root, workers) as repository:
        disk = await repository.open_disk((await repository.points())[-1], "root")
        assert disk.contexts[2:] == (CHANGED_SINCE + C, CHANGED_SINCE + B)
        await disk.close()


async def test_a_merge_that_happens_while_disks_are_open(made: Made, workers: Workers) -> None:
    """The children go on, exact; of the parent not a wrong byte is given."""
    async with opened(made.root, workers) as repository:
        points = {point.id: point for point in await repository.points()}
        disks = {stamp: await repository.open_disk(points[stamp], "root") for stamp in (A, B, D)}
        try:
            steps = [lambda: state(made, A, B), lambda: move(made, B, A, 1)]
            steps += [lambda: move(made, B, A, 3), lambda: finished(made)]
            for step in steps:
                step()
                for at in range(0, 5 * BLOCK, BLOCK):
                    golden = made.content(D)[at : at + BLOCK]
                    assert await content(disks[D], at, BLOCK) == golden
                with pytest.raises(CorruptImage, match="open the point again"):
                    await content(disks[A], 0, BLOCK)
            with pytest.raises(CorruptImage, match="open the point again"):
                await content(disks[B], BLOCK, BLOCK)  # its name leads elsewhere now
        finally:
            for disk in disks.values():
                await disk.close()


def finished(made: Made) -> None:
    """The last steps: the parent takes the target's id, and its name."""
    footer = made.encoder.pack("brotli", made.encoder.footer(Layer(B, 5 * BLOCK)))
    (place(made, A) / "footer").write_bytes(footer)
    directory = made.root / made.vdi()
    (directory / f"{A}.alias.vhd").replace(directory / f"{B}.alias.vhd")
    shutil.rmtree(place(made, B))
    (directory / f".{A}.alias.vhd.merge.json").unlink()
