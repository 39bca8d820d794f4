"""Refcounts: of every width, found free, taken, given back, and written in order."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.image_file import ImageFile, open_image_file
from nbdsrv.formats.qcow2.header import read_header
from nbdsrv.formats.qcow2.refcount_block import decode_block, new_block
from nbdsrv.formats.qcow2.refcounts import Refcounts
from tests.formats.images import Image
from tests.formats.qcow2.checked import leaks
from tests.formats.qcow2.peer import converted, create

ORDERS = range(7)


def counts_in(data: bytes, order: int) -> list[int]:
    """As the specification has it: narrow counts from the lowest bit on, wide ones big endian."""
    bits = 1 << order
    if bits < 8:
        mask = (1 << bits) - 1
        return [byte >> shift & mask for byte in data for shift in range(0, 8, bits)]
    size = bits // 8
    return [int.from_bytes(data[at : at + size], "big") for at in range(0, len(data), size)]


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_is_read_and_written_as_it_was(order: int) -> None:
    data = random.Random(order).randbytes(4096)
    block = decode_block(data, order)
    expected = counts_in(data, order)
    assert len(block) == len(expected)
    assert [block[index] for index in range(len(block))] == expected
    assert block.encode(0, len(block)) == (0, data)
    start, part = block.encode(len(block) // 2, len(block) // 2 + 1)
    assert part == data[start : start + len(part)]
    assert len(part) in {512, 4096}


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=20)
@given(changes=st.lists(st.tuples(st.integers(0, 4095), st.integers(1, 500), st.booleans())))
def test_filling(order: int, changes: list[tuple[int, int, bool]]) -> None:
    block = new_block(4096, order)
    model = [0] * len(block)
    for start, count, value in changes:
        index = start % len(block)
        length = min(count, len(block) - index)
        block.fill(index, length, int(value))
        model[index : index + length] = [int(value)] * length
    assert counts_in(block.encode(0, len(block))[1], order) == model
    first = model.index(0) if 0 in model else -1
    assert block.find_free(0, len(block)) == first
    assert block.last_used() == max((i for i, count in enumerate(model) if count), default=-1)
    if first >= 0:
        free = next((i for i in range(first, len(model)) if model[i]), len(model)) - first
        assert block.free_length(first, len(model) - first) == free
        assert block.free_length(first, 1) == 1


FULL = Image("counted", 1 << 20, ((0, 500_000), (600_000, 200_000)))


def counted(directory: Path, *options: str) -> tuple[ImageFile, Refcounts]:
    path, _ = converted(directory, FULL, *options)
    file = open_image_file(str(path), writable=True)
    return file, Refcounts(file, read_header(file))


def store(file: ImageFile, refcounts: Refcounts) -> None:
    """What a flush does, as far as it is about refcounts."""
    changes = refcounts.changes()
    with open(file.path, "r+b") as written:
        for position, data in [*changes.blocks, *changes.table]:
            written.seek(position)
            written.write(data)


@pytest.mark.parametrize("order", ORDERS)
def test_what_was_taken_is_counted_in_the_file(order: int, tmp_path: Path) -> None:
    file, refcounts = counted(tmp_path, "-o", f"cluster_size=512,refcount_bits={1 << order}")
    before = file.size
    taken = [refcounts.take(100) for _ in range(20)]
    positions = [
        clusters.position + 512 * number for clusters in taken for number in range(clusters.count)
    ]
    assert len(set(positions)) == len(positions)
    assert all(clusters.fresh and clusters.position >= before for clusters in taken)
    assert file.size >= max(positions) + 512
    store(file, refcounts)
    assert leaks(file.path) == len(positions)
    refcounts.give_back(taken)
    store(file, refcounts)
    assert leaks(file.path) == 0
    file.close()


def test_what_was_given_back_is_taken_again_but_not_fresh(tmp_path: Path) -> None:
    file, refcounts = counted(tmp_path)
    first = refcounts.take(3)
    assert first.count == 3
    refcounts.give_back([first])
    again = refcounts.take(3)
    assert (again.position, again.count, again.fresh) == (first.position, 3, False)
    file.close()


def test_writing_that_failed_is_still_to_be_done(tmp_path: Path) -> None:
    file, refcounts = counted(tmp_path, "-o", "cluster_size=512,refcount_bits=64")
    taken = refcounts.take(1000)
    assert refcounts.pending
    lost = refcounts.changes()
    assert not refcounts.pending
    more = refcounts.take(1)
    refcounts.put_back(lost)
    assert refcounts.pending
    store(file, refcounts)
    assert leaks(file.path) == taken.count + more.count
    file.close()


def test_the_table_grows(tmp_path: Path) -> None:
    """Its first cluster counts 2 MiB of these clusters."""
    file, refcounts = counted(tmp_path, "-o", "cluster_size=512,refcount_bits=64")
    before = refcounts.table_range()
    count = 0
    while file.size < 9 << 20:
        count += refcounts.take(777).count
    position, end = refcounts.table_range()
    assert end - position > before[1] - before[0]
    old = refcounts.changes()
    assert old.old_table is not None
    assert old.old_table[0] == before[0]
    refcounts.put_back(old)
    store(file, refcounts)
    assert leaks(file.path) == count + old.old_table[1]
    file.close()


def test_references_are_dropped_one_by_one(tmp_path: Path) -> None:
    file, refcounts = counted(tmp_path)
    taken = refcounts.take(2)
    first = taken.position >> refcounts.cluster_bits
    assert refcounts.sole([(first, 2)]) == [(first, 2)]
    refcounts.drop([(first, 1)])
    assert refcounts.sole([(first, 2)]) == [(first + 1, 1)]
    with pytest.raises(CorruptImage, match="qemu-img check"):
        refcounts.drop([(first, 1)])
    file.close()


def test_tables_are_not_given_away(tmp_path: Path) -> None:
    file, refcounts = counted(tmp_path)
    header = read_header(file)
    assert refcounts.is_table(0)
    assert refcounts.is_table(header.refcount_table_offset >> header.cluster_bits)
    with pytest.raises(CorruptImage, match="where another one lies"):
        refcounts.claim(header.refcount_table_offset, 1, 40)
    position = refcounts.take(1).position
    refcounts.claim(position, 1, 40)
    assert refcounts.is_table(position >> header.cluster_bits)
    refcounts.give_back([])
    refcounts.drop([(position >> header.cluster_bits, 1)])
    assert not refcounts.is_table(position >> header.cluster_bits)
    file.close()


def test_a_device_is_full_at_its_end(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "1G")
    with path.open("r+b") as grown:
        grown.truncate(4 << 20)
    opened = open_image_file(str(path), writable=True)
    file = ImageFile(str(path), opened.fd, size=4 << 20, device=True, writable=True)
    refcounts = Refcounts(file, read_header(file))
    taken = refcounts.take(1000)
    assert 0 < taken.count < 64
    assert not taken.fresh
    with pytest.raises(DiskError, match="the device is full"):
        refcounts.take(1)
    store(file, refcounts)
    assert leaks(path) == taken.count
    assert path.stat().st_size == 4 << 20
    file.close()
