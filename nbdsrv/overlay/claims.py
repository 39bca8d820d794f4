"""Who is changing which blocks: one at a time.

::

    write 4 KiB   |#|                      block by block, in a dict
    trim 1 GiB             |##########|    as a whole, in a short list

Rule: a claim is never waited for while one is held, so nobody waits for each other.
"""

import asyncio

__all__ = ["Claim", "Claims"]

WIDE = 4096
"""Blocks from which a claim is kept as a whole."""


class Claim:
    """Blocks ``first`` to ``end``, until it is released."""

    __slots__ = ("end", "event", "first")

    def __init__(self, first: int, end: int) -> None:
        self.first = first
        self.end = end
        self.event: asyncio.Event | None = None


class Claims:
    """All claims on one disk. Belongs to the loop."""

    def __init__(self) -> None:
        self._blocks: dict[int, Claim] = {}
        self._wide: list[Claim] = []

    async def free(self, first: int, end: int) -> bool:
        """Are these blocks free? If not, wait until one of them is, then look again."""
        claim = self._conflict(first, end)
        if claim is None:
            return True
        if claim.event is None:
            claim.event = asyncio.Event()
        await claim.event.wait()
        return False

    def _conflict(self, first: int, end: int) -> Claim | None:
        for claim in self._wide:
            if claim.first < end and first < claim.end:
                return claim
        blocks = self._blocks
        if end - first <= len(blocks):
            for block in range(first, end):
                if block in blocks:
                    return blocks[block]
            return None
        for block, claim in blocks.items():
            if first <= block < end:
                return claim
        return None

    def take(self, first: int, end: int) -> Claim:
        """Claim blocks that are free."""
        claim = Claim(first, end)
        if end - first >= WIDE:
            self._wide.append(claim)
        elif end - first == 1:
            self._blocks[first] = claim
        else:
            self._blocks |= dict.fromkeys(range(first, end), claim)
        return claim

    def release(self, claim: Claim) -> None:
        """Let others have them."""
        if claim.end - claim.first >= WIDE:
            self._wide.remove(claim)
        else:
            for block in range(claim.first, claim.end):
                del self._blocks[block]
        if claim.event is not None:
            claim.event.set()
