"""``Reads`` by itself: what it believes of where bytes lie, and what it counts."""

import struct
from types import SimpleNamespace
from typing import cast

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.residency import NEVER, Residency
from nbdsrv.disk.runs import BlockRun, FileRun
from nbdsrv.net.reactor import Reactor
from nbdsrv.net.reads import Reads
from nbdsrv.net.sender import Sender
from nbdsrv.net.windows import Windows
from protocol.constants import Dialect
from protocol.replies import encoder
from protocol.terms import BlockSizes

BLOCK = 1 << 16


class Landing:
    """A disk whose epoch changes at the third look: a thread's write has landed."""

    name = "landing"
    size = 1 << 20
    block_sizes = BlockSizes()

    def __init__(self) -> None:
        self.looks = 0
        self.lands_at = -1

    @property
    def epoch(self) -> int:
        self.looks += 1
        return int(0 <= self.lands_at < self.looks)


def reads(disk: object, windows: Windows, sender: object, later: object = None) -> Reads:
    reactor = SimpleNamespace(workers=None, alone=True, windows=lambda _: windows)
    return Reads(
        cast("Disk", disk),
        cast("Reactor", reactor),
        cast("Sender", sender),
        encoder(Dialect.STRUCTURED),
        Dialect.STRUCTURED,
        False,
        lambda *_: False,
        later,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("after", range(4))
def test_no_client_believes_what_was_met_before_a_change(after: int) -> None:
    """Whenever a write lands while another client attaches."""
    disk, windows = Landing(), Windows()
    sender = SimpleNamespace(arena=None, used=0)
    reads(disk, windows, sender)
    windows.met(0, FileRun(9, 0, 4096, Residency(NEVER)))
    disk.lands_at = disk.looks + after
    attached = reads(disk, windows, sender)
    disk.lands_at = 0
    attached.serve(memoryview(b""), 0, 0)
    assert not windows


class Blocky(Landing):
    """A disk of blocks that are in memory up to the third, and then are not."""

    @property
    def epoch(self) -> int:
        return 0

    def locate(self, offset: int, length: int) -> object:
        held = SimpleNamespace(
            peek=lambda key: bytes(BLOCK) if key < 3 else None,
            decode_now=lambda _key, _wanted: None,
            is_coming=lambda _key: False,
        )
        return (BlockRun(held, offset // BLOCK, offset % BLOCK, length),)  # type: ignore[arg-type]


def test_what_was_taken_is_counted_also_when_the_client_is_gone() -> None:
    def gone(*_: object, **__: object) -> bool:
        raise ConnectionResetError

    arena = memoryview(bytearray(1 << 20))
    out = SimpleNamespace(parts=())
    sender = SimpleNamespace(
        arena=arena, used=0, out=out, push=gone, make_room=lambda _: True, emit=None
    )
    begun: list[object] = []
    one = reads(Blocky(), Windows(), sender, lambda *asked: begun.append(asked) or True)
    order = [5 * BLOCK, 6 * BLOCK, *range(0, 3 * BLOCK, 4096)]
    frames = b"".join(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, at, 4096) for at in order)
    with pytest.raises(ConnectionResetError):
        one.serve(memoryview(frames), 0, len(frames))
    assert one.begun == len(begun) == 2
    assert 2 * 28 < one.served < len(frames)
    assert one.served % 28 == 0
