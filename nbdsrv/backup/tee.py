"""A frozen source that is read once, for whoever reads it and for any number of branches.

::

    client A ──┐                                ┌─> Branch: repository 1   32 MiB behind at most,
    client B ──┼── Tee.read_into ── source      ├─> Branch: repository 2   or it misses something
    driver  ───┘         └── what was read ─────┴─> ...

Rule: reading is as fast as the source. Branches are offered what was read, and none is waited for
(``branch``); what they missed, and what nobody read, the driver reads at the end (``drive``).
"""

from collections.abc import Callable

from nbdsrv.backup.branch import Branch, Piece
from nbdsrv.copying.reading import PIECE
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.watch import Watch
from nbdsrv.disk.workers import Workers

__all__ = ["Tee"]


class Tee(Passthrough):
    """The source. It must not change: it is read in any order, in part twice.

    Attributes:
        source: the Disk inside; it stays its opener's, closing the Tee leaves it open.
        branches: who is offered what is read. May be changed at any time.
    """

    def __init__(self, workers: Workers, source: Disk) -> None:
        super().__init__(workers, source)
        self.source = source
        self.remote = source.remote
        self.branches: list[Branch] = []

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """As the source does; what it gave is offered before this returns."""
        await self._inside.read_into(offset, buffer)
        if self.branches:
            self.offer(offset, buffer)

    def begin_read(self, offset: int, buffer: memoryview, done: Callable[[bool], None]) -> bool:
        """As the source does."""
        if not self.branches:
            return self._inside.begin_read(offset, buffer, done)

        def offered(good: bool) -> None:  # noqa: FBT001 - as ``done``
            if good:
                self.offer(offset, buffer)
            done(good)

        return self._inside.begin_read(offset, buffer, offered)

    def attend(self, watch: Watch) -> None:
        """As the source does."""
        self._inside.attend(watch)

    def offer(self, offset: int, buffer: memoryview) -> None:
        """Bytes of the source that somebody has read; they may change once this returns."""
        branches = [branch for branch in self.branches if branch.alive]
        if not branches:
            return
        piece = max(PIECE, *(branch.chunk for branch in branches))
        at, end = offset, offset + len(buffer)
        while at < end:  # in pieces that branches store side by side
            stop = min((at // piece + 1) * piece, end)
            part = buffer[at - offset : stop - offset]
            copied = _copied(part)
            for branch in branches:
                branch.offer(at, part, copied)
            at = stop

    async def close(self) -> None:
        """Nothing: a client that leaves does not end the backup."""


def _copied(view: memoryview) -> Callable[[], Piece]:
    """One copy for all branches that can use the bytes as they are, made for the first of them."""
    made: list[Piece] = []

    def shared() -> Piece:
        if not made:
            made.append(Piece(bytearray(view)))
        return made[0]

    return shared
