"""Changing somebody else's export: write, zero, trim, flush.

::

    write ──> Client A   unflushed     flush ──> Client A, Client C    those that carried changes
    write ──> Client C   unflushed
              Client B                 an unflushed one dies: the next flush fails, and every other

Rule: a change is sent once. When its connection dies the caller learns that, and that nobody
knows whether it was carried out; the old server may still be at it.
"""

import asyncio
import errno as os_errno
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from nbdsrv.disk.disk import Ability
from nbdsrv.errors import DiskError
from nbdsrv.net.client import Client, ConnectionLost
from nbdsrv.source.nbd_depth import Depth
from nbdsrv.source.nbd_links import Links
from nbdsrv.source.nbd_pieces import in_pieces

__all__ = ["Changes"]

ZERO_PIECE = 64 << 20
"""Bytes of one WRITE_ZEROES that the server may have to write out within ``request_s``."""
FAST_PIECE = 1 << 30
"""The same where it costs next to nothing: TRIM, and WRITE_ZEROES with FAST_ZERO."""


class Changes:
    """What may be done to one export, and whether it will last."""

    def __init__(
        self, links: Links, name: str, abilities: Ability, piece: int, depth: Depth
    ) -> None:
        """``piece``: bytes of one WRITE; ``depth``: how many of them are in flight."""
        self._links = links
        self._name = name
        self._abilities = abilities
        self._piece = piece
        self._depth = depth
        self._block = links.terms.blocks.minimum
        self._lost = False
        links.on_lost = self._on_lost

    async def write(self, offset: int, data: memoryview) -> None:
        """In pieces; after an error, some of them are written."""

        async def one(at: int, count: int) -> None:
            await self._write(at, data[at - offset : at - offset + count])

        await in_pieces(offset, len(data), self._piece, one, self._depth.bytes // self._piece)

    async def _write(self, offset: int, data: memoryview) -> None:
        depth, length = self._depth, len(data)
        await depth.enter(length)
        try:
            client = await self._links.choose()
            with self._change(client):
                await client.write(offset, data)
            depth.answered(length)
        finally:
            depth.leave(length)

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """By WRITE_ZEROES; where that is not offered, by writing zeroes."""
        if fast and Ability.FAST_ZERO not in self._abilities:
            raise DiskError(f"{self._name} has no fast way to zero", os_errno.EOPNOTSUPP)
        if not length:
            return
        if Ability.ZERO not in self._abilities:
            await self._write_zeroes(offset, length)
            return
        if fast:
            # Nothing may have changed when it is refused: the first piece answers for all.
            first = min(length, FAST_PIECE)
            await self._zero(offset, first, no_hole=not punch, fast=True)
            offset, length = offset + first, length - first
        one = partial(self._zero, no_hole=not punch, fast=False)
        await in_pieces(offset, length, ZERO_PIECE, one)

    async def _zero(self, offset: int, length: int, *, no_hole: bool, fast: bool) -> None:
        client = await self._links.choose()
        with self._change(client):
            await client.write_zeroes(offset, length, no_hole=no_hole, fast=fast)

    async def _write_zeroes(self, offset: int, length: int) -> None:
        zeroes = memoryview(bytes(min(length, self._piece)))

        async def one(at: int, count: int) -> None:
            await self._write(at, zeroes[:count])

        await in_pieces(offset, length, self._piece, one)

    async def trim(self, offset: int, length: int) -> None:
        """The whole blocks in the range, if the server knows how."""
        if Ability.TRIM not in self._abilities:
            return
        begin = -(-offset // self._block) * self._block
        end = (offset + length) // self._block * self._block

        async def one(at: int, count: int) -> None:
            client = await self._links.choose()
            with self._change(client):
                await client.trim(at, count)

        if begin < end:
            await in_pieces(begin, end - begin, FAST_PIECE, one)

    async def flush(self) -> None:
        """FLUSH on every connection that has carried changes; a failure is final."""
        if Ability.FLUSH not in self._abilities:
            return
        self._check_lost()
        clients = [client for client in self._links if client.unflushed]
        if not clients:
            clients = [await self._links.choose()]
        outcomes = await asyncio.gather(*map(self._flush, clients), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        self._check_lost()

    async def _flush(self, client: Client) -> None:
        # First: a change that is answered while this is under way is not covered by it.
        covered, client.unflushed = client.unflushed, False
        try:
            await client.flush()
        except asyncio.CancelledError:
            client.unflushed = client.unflushed or covered
            raise
        except DiskError:
            self._lost = self._lost or covered
            raise

    @contextmanager
    def _change(self, client: Client) -> Iterator[None]:
        client.unflushed = True
        try:
            yield
        except ConnectionLost as error:
            text = f"{error}; whether it was carried out is unknown"
            raise ConnectionLost(text, error.errno, error.offset) from error
        finally:
            client.unflushed = True

    def _on_lost(self, client: Client) -> None:
        if client.unflushed:
            self._lost = True

    def _check_lost(self) -> None:
        if self._lost:
            text = f"{self._name}: what was written before a failed flush or a lost connection"
            raise DiskError(f"{text} may be gone; open it anew and compare")
