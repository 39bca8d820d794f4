"""Writing a qcow2 image from beginning to end: version 3, maybe compressed, maybe over another.

::

    into a file    header | L1 | data, L2 tables and refcount blocks as they come ... | counts
    into a pipe    header | refcount table | refcount blocks | L1 | L2 tables | data, in order
                   (which needs to know beforehand what will be data: the Plan)

Rules:

* Clusters that are all zero are left out, but for a pipe, where their place has been promised.
* Into a file data may come in any order and several pieces at once; each piece is worked on by
  several threads, for compressing is what takes long.
* The header of a file is written last: until then it is no image at all.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError
from nbdsrv.formats.qcow2.structs import COPIED, OFFSET_MASK, ZERO_FLAG
from nbdsrv.formats.qcow2.writer_packing import Compress, compressor, data_runs
from nbdsrv.formats.qcow2.writer_shape import Backing, Places, Shape, encode_header, rounded
from nbdsrv.formats.qcow2.writer_stream import Stream
from nbdsrv.formats.qcow2.writer_tables import Tables
from nbdsrv.formats.target_file import TargetFile
from nbdsrv.formats.writer import ImageWriter, Plan

__all__ = ["Backing", "Qcow2Writer", "Shape"]

JOB = 1 << 19
"""Bytes one thread works on at a time: long enough to be worth a thread, short enough for a piece
of a few MiB to occupy all of them."""
PLAIN_JOB = 1 << 23
"""Likewise where nothing is compressed: few long writes are best."""
WORTH = 16
"""A compressed cluster saves at least a 16th; less is not worth decoding it for every read."""


class Qcow2Writer(ImageWriter):
    """Writes ``target``; see ``ImageWriter`` for the contract."""

    def __init__(self, workers: Workers, target: TargetFile, shape: Shape | None = None) -> None:
        """Becomes the owner of ``target``, which is not open yet.

        Raises:
            ConfigError: compressed, or with a backing file, into a pipe.
        """
        self._workers = workers
        self._target = target
        self._shape = shape or Shape()
        self.granularity = self._shape.cluster_size
        self.seekable = self.ordered = False
        self._image: _File | _Pipe
        if target.seekable:
            self.seekable = True
            self.threaded = True
            self._image = _File(workers, target, self._shape)
        else:
            self.ordered = True
            self._image = _Pipe(workers, target, self._shape)

    async def open(self, size: int) -> None:
        """What the tables have room for, and the header."""
        encode_header(self._shape, Places(rounded(size), 0, 0, 0, 0))
        self._shape.l1_size(rounded(size), self._target.path)
        await self._workers.run(self._target.open)

    async def begin(self, plan: Plan) -> None:
        """Into a pipe all tables."""
        await self._image.begin(plan)

    async def data(self, offset: int, data: memoryview) -> None:
        """Store, leaving out what is all zero."""
        if len(data):
            await self._image.data(offset, data)

    def store(self, offset: int, data: memoryview) -> None:
        """The same into a file, in the caller's thread."""
        assert isinstance(self._image, _File)
        self._image.store(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        """Zero clusters over a backing image; nothing at all where there is none."""
        if length:
            await self._image.zero(offset, length)

    async def finish(self) -> None:
        """Tables and header, then the name."""
        await self._image.finish()
        await self._workers.run(self._target.publish)

    async def abort(self) -> None:
        """Remove the temporary file."""
        await self._workers.run(self._target.discard)


class _File:
    """Into a file."""

    def __init__(self, workers: Workers, target: TargetFile, shape: Shape) -> None:
        self._workers = workers
        self._target = target
        self._shape = shape
        self._compress: Compress | None = None
        if shape.compression is not None:
            self._compress = compressor(shape)
        self._edges = asyncio.Lock()
        self._size = 0
        self._tables: Tables

    async def begin(self, plan: Plan) -> None:
        self._size = plan.size
        args = (self._target, self._shape, rounded(plan.size))
        self._tables = await self._workers.run(Tables, *args)

    async def data(self, offset: int, data: memoryview) -> None:
        store = self.store
        job = max(PLAIN_JOB if self._compress is None else JOB, self._shape.cluster_size)
        if len(data) <= job:
            await self._workers.run(store, offset, data)
            return
        parts = range(0, len(data), job)
        await _all([self._workers.run(store, offset + at, data[at : at + job]) for at in parts])

    def store(self, offset: int, data: memoryview) -> None:
        if self._compress is None:
            self._store_plain(offset, data)
        else:
            self._store_compressed(offset, data)

    def _store_plain(self, offset: int, data: memoryview) -> None:
        for begin, length in data_runs(data, self._shape.cluster_size):
            self._store_as_it_is(offset + begin, data[begin : begin + length])

    def _store_as_it_is(self, offset: int, data: memoryview) -> None:
        bits = self._shape.cluster_bits
        at = 0
        for _, count, position in self._tables.take(
            offset >> bits, self._shape.clusters(len(data))
        ):
            self._target.store(position, data[at : at + (count << bits)])
            at += count << bits

    def _store_compressed(self, offset: int, data: memoryview) -> None:
        assert self._compress is not None
        size, bits = self._shape.cluster_size, self._shape.cluster_bits
        packed: list[tuple[int, bytes]] = []
        plain: list[tuple[int, memoryview]] = []
        for begin, length in data_runs(data, size):
            for at in range(begin, begin + length, size):
                cluster = data[at : min(at + size, begin + length)]
                # What is read is a whole cluster, so what is compressed must be one.
                small = self._compress(_filled(cluster, size))
                if len(small) <= size - size // WORTH:
                    packed.append((offset + at >> bits, small))
                else:
                    plain.append((offset + at, cluster))
        self._store_packed(packed)
        # After the packed ones: these lie on cluster boundaries and would tear them apart.
        for where, cluster in plain:
            self._store_as_it_is(where, cluster)

    def _store_packed(self, packed: Sequence[tuple[int, bytes]]) -> None:
        places = self._tables.pack([(cluster, len(data)) for cluster, data in packed])
        pending: list[bytes] = []
        start = end = 0
        for position, (_, data) in zip(places, packed, strict=True):
            if position != end:
                self._target.store(start, b"".join(pending))
                pending.clear()
                start = end = position
            pending.append(data)
            end += len(data)
        self._target.store(start, b"".join(pending))

    async def zero(self, offset: int, length: int) -> None:
        backing = self._shape.backing
        if backing is None:
            return
        size, bits = self._shape.cluster_size, self._shape.cluster_bits
        end = offset + length
        if end >= self._size:
            end = -(-end // size) * size  # the last cluster has nothing beyond the disk's end
        end = min(end, -(-backing.disk.size // size) * size)
        first, last = -(-offset // size), end // size
        if first < last:
            await self._workers.run(self._tables.zero, first, last - first)
        for begin, stop in _edges(offset, end, size):
            async with self._edges:
                await self._zero_within(backing, begin, stop, begin >> bits)

    async def _zero_within(self, backing: Backing, begin: int, end: int, cluster: int) -> None:
        """A part of one cluster: the rest of it is copied from below."""
        size = self._shape.cluster_size
        start = cluster * size
        entry = await self._workers.run(self._tables.entry, cluster)
        if entry & ZERO_FLAG:
            return
        if entry & COPIED:  # copied from below already, for another part of it
            position = (entry & OFFSET_MASK) + begin - start
            await self._workers.run(self._target.store, position, bytes(end - begin))
            return
        content = bytearray(min(size, self._tables.size - start))
        below = min(len(content), backing.disk.size - start)
        await backing.disk.read_into(start, memoryview(content)[:below])
        content[begin - start : end - start] = bytes(min(end, self._tables.size) - begin)
        if any(content):
            await self._workers.run(self._store_as_it_is, start, memoryview(content))
        else:
            await self._workers.run(self._tables.zero, cluster, 1)

    async def finish(self) -> None:
        await self._workers.run(self._tables.finish)


class _Pipe:
    """Into a pipe."""

    def __init__(self, workers: Workers, target: TargetFile, shape: Shape) -> None:
        if shape.compression is not None:
            raise ConfigError(
                "a compressed qcow2 image cannot be written into a pipe, for its tables come first "
                "and need to know how small the data will be; write into a file"
            )
        if shape.backing is not None:
            raise ConfigError(
                "a qcow2 image with a backing file cannot be written into a pipe; write into a file"
            )
        self._workers = workers
        self._target = target
        self._shape = shape
        self._stream: Stream

    async def begin(self, plan: Plan) -> None:
        self._stream = Stream(self._target, self._shape, rounded(plan.size))
        await self._workers.run(self._stream.begin, plan.data)

    async def data(self, offset: int, data: memoryview) -> None:
        await self._workers.run(self._stream.data, offset, data)

    async def zero(self, offset: int, length: int) -> None:
        """What is left out reads as zeroes."""

    async def finish(self) -> None:
        await self._workers.run(self._stream.finish)


async def _all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """All of it, at once; returns when no thread is at work any more, even on an error."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def _filled(cluster: memoryview, size: int) -> bytes | memoryview:
    return cluster if len(cluster) == size else bytes(cluster).ljust(size, b"\0")


def _edges(offset: int, end: int, size: int) -> Sequence[tuple[int, int]]:
    """The parts of a range that do not cover their clusters: none, one or two."""
    first, last = -(-offset // size) * size, end // size * size
    if first > last:
        return [(offset, end)] if offset < end else []
    return [edge for edge in ((offset, first), (last, end)) if edge[0] < edge[1]]
