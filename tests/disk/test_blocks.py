"""Decoded blocks: decoded once, kept within a budget, forgotten when they change."""

import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from nbdsrv.disk.blocks import BlockCache, Blocks
from nbdsrv.disk.residency import Residency, Stored
from nbdsrv.errors import CorruptImage

SIZE = 1000


class Decoder:
    """Blocks of ``SIZE`` bytes that hold their key; counts how often each was decoded."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, key: int) -> bytes:
        self.calls[key] += 1
        assert self.gate.wait(20)
        if key < 0:
            raise CorruptImage("corrupt image: x at 0: no such block")
        return key.to_bytes(4, "big") * (SIZE // 4)


def expected(key: int) -> bytes:
    return key.to_bytes(4, "big") * (SIZE // 4)


def test_a_block_read_in_part_is_decoded_once() -> None:
    decoder = Decoder()
    blocks = Blocks(BlockCache(), decoder)
    assert blocks.peek(7) is None
    for _ in range(5):
        assert expected(7) == blocks.get(7, 10)
    assert expected(7) == blocks.peek(7)
    assert decoder.calls == {7: 1}


def test_the_loop_waits_for_no_thread(tmp_path: Path) -> None:
    """A thread begins with the block just when the loop has found that it may decode it."""
    decoder = Decoder()
    decoder.gate.clear()
    thread = threading.Thread(target=lambda: blocks.get(7, 10))

    def stored(_: int) -> Stored:
        thread.start()
        while not decoder.calls:
            time.sleep(0.001)
        return file.fileno(), 0, SIZE, Residency(0)

    (tmp_path / "packed").write_bytes(bytes(SIZE))
    blocks = Blocks(BlockCache(), decoder, stored)
    with (tmp_path / "packed").open("rb") as file:
        assert blocks.decode_now(7, 10) is None
    assert blocks.is_coming(7)
    decoder.gate.set()
    thread.join()
    assert not blocks.is_coming(7)
    assert expected(7) == blocks.peek(7)


def test_a_block_read_as_a_whole_is_not_kept() -> None:
    decoder = Decoder()
    blocks = Blocks(BlockCache(), decoder)
    assert expected(7) == blocks.get(7, SIZE)
    assert blocks.peek(7) is None


def test_all_disks_together_stay_within_the_budget() -> None:
    cache = BlockCache(limit=10 * SIZE)
    disks = [Blocks(cache, Decoder()) for _ in range(3)]
    for key in range(50):
        for blocks in disks:
            blocks.get(key, 1)
            held = sum(len(entry.data) for each in disks for entry in each.held.values())
            assert held <= cache.limit
    assert sum(len(each.held) for each in disks) == 10


def test_what_is_asked_for_again_outlives_what_is_not() -> None:
    blocks = Blocks(BlockCache(limit=10 * SIZE), Decoder())
    blocks.get(1, 1)
    for key in range(100, 200):
        assert blocks.peek(1) is not None
        blocks.get(key, 1)


def test_a_block_larger_than_the_budget_is_given_but_not_kept() -> None:
    blocks = Blocks(BlockCache(limit=SIZE // 2), Decoder())
    assert expected(3) == blocks.get(3, 1)
    assert blocks.peek(3) is None
    assert not blocks.held


def test_threads_that_want_the_same_block_wait_for_one_decoding() -> None:
    decoder = Decoder()
    decoder.gate.clear()
    blocks = Blocks(BlockCache(), decoder)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(blocks.get(9, 1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    decoder.gate.set()
    for thread in threads:
        thread.join(20)
    assert [expected(9)] * 8 == found
    assert decoder.calls == {9: 1}


def test_a_failure_reaches_everyone_and_is_tried_anew() -> None:
    decoder = Decoder()
    blocks = Blocks(BlockCache(), decoder)
    for _ in range(2):
        with pytest.raises(CorruptImage, match="no such block"):
            blocks.get(-1, 1)
    assert decoder.calls == {-1: 2}


def test_a_forgotten_block_is_decoded_anew() -> None:
    decoder = Decoder()
    blocks = Blocks(BlockCache(), decoder)
    blocks.get(5, 1)
    blocks.forget(5)
    assert blocks.peek(5) is None
    blocks.get(5, 1)
    assert decoder.calls == {5: 2}


def test_a_block_forgotten_while_it_is_decoded_is_not_kept() -> None:
    decoder = Decoder()
    decoder.gate.clear()
    blocks = Blocks(BlockCache(), decoder)
    thread = threading.Thread(target=blocks.get, args=(5, 1))
    thread.start()
    while not decoder.calls:
        pass
    blocks.forget(5)
    decoder.gate.set()
    thread.join(20)
    assert blocks.peek(5) is None


def test_a_closed_disk_gives_its_memory_back() -> None:
    cache = BlockCache(limit=10 * SIZE)
    closing, staying = Blocks(cache, Decoder()), Blocks(cache, Decoder())
    for key in range(9):
        closing.get(key, 1)
    closing.close()
    for key in range(9):
        staying.get(key, 1)
    assert all(staying.peek(key) is not None for key in range(9))
    assert not closing.held
