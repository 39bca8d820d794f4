"""Reading from a distant store in few large calls.

::

    disk    | 5 | 6 | 7 |zero| 9 |10 |11 | ...       who reads on is known by the chunks' numbers
              |   |   |        |   |
    pack    ..|5|6|7|9|10|11|..                      neighbours lie beside each other
              |-- span --|-- span --|                announced: fetched in the background, kept,
                                                     and what ``get_range`` answers from
    window  1, 2, 4 ... data chunks, up to 8 MiB of the disk; a span has 4 MiB at most

Nobody gets more than he asked for until he has shown that he reads on.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass

from nbdsrv.repository.native.entries import key_of
from nbdsrv.repository.native.entry import ENTRY_SIZE, Kind, Place
from nbdsrv.repository.native.pages import Pages
from nbdsrv.store.store import MAX_OBJECT, Data, Store, Stored, StoreError

__all__ = ["SpanStore", "Sweeps", "spans_of"]

MAX_SPAN = 4 << 20
"""Bytes of one call: at 20 ms a round trip and 200 MB/s as much again as the wait."""
MAX_HELD = 64 << 20
"""Bytes of spans kept for a repository."""
MAX_GAP = 64 << 10
"""Bytes nobody asked for that are read along, rather than make two calls."""
THREADS = 8
"""Spans fetched at a time."""
MAX_WINDOW = 8 << 20
"""Bytes of the disk that are fetched ahead of who reads on."""
STREAMS = 8
"""Readers of one disk that are told apart."""
SLACK = 32
"""Chunks by which a reader with many requests in flight may be ahead of himself, or behind."""
MAX_LOOKED = 16
"""Pages looked through for the next data chunk, those that are all zeroes not counted."""


@dataclass(frozen=True, slots=True, eq=False)
class _Span:
    key: str
    offset: int
    length: int
    data: "Future[Data]"


class SpanStore(Store):
    """A distant store with spans that have been announced. Thread-safe."""

    distant = True

    def __init__(self, inside: Store, limit: int = MAX_HELD) -> None:
        """Becomes the owner of ``inside``."""
        self.name = inside.name
        self._inside = inside
        self._limit = limit
        self._lock = threading.Lock()
        self._spans: OrderedDict[_Span, None] = OrderedDict()  # the least recently used first
        self._of: dict[str, list[_Span]] = {}
        self._size = 0
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def announce(self, key: str, offset: int, length: int) -> None:
        """These bytes will be read soon: have them fetched. Never waits, never fails."""
        with self._lock:
            if self._closed or self._covering(key, offset, length) is not None:
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(THREADS, "nbdsrv-span")
            data = self._pool.submit(self._inside.get_range, key, offset, length)
            span = _Span(key, offset, length, data)
            self._spans[span] = None
            self._of.setdefault(key, []).append(span)
            self._size += length
            while self._size > self._limit and len(self._spans) > 1:
                self._forget(next(iter(self._spans)))

    def get_range(self, key: str, offset: int, length: int) -> Data:
        with self._lock:
            span = self._covering(key, offset, length)
        if span is not None:
            try:
                whole = memoryview(span.data.result())
            except (StoreError, CancelledError):  # of bytes nobody has asked for, perhaps
                with self._lock:
                    self._forget(span)
            else:
                start = offset - span.offset
                return whole[start : start + length]
        return self._inside.get_range(key, offset, length)

    def doubt(self, key: str) -> None:
        with self._lock:
            for span in list(self._of.get(key, ())):
                self._forget(span)
        self._inside.doubt(key)

    def _covering(self, key: str, offset: int, length: int) -> _Span | None:
        for span in self._of.get(key, ()):
            if span.offset <= offset and offset + length <= span.offset + span.length:
                self._spans.move_to_end(span)
                return span
        return None

    def _forget(self, span: _Span) -> None:
        if span not in self._spans:
            return
        del self._spans[span]
        self._size -= span.length
        others = self._of[span.key]
        others.remove(span)
        if not others:
            del self._of[span.key]

    def put_new(self, key: str, data: Data) -> bool:
        return self._inside.put_new(key, data)

    def put(self, key: str, data: Data) -> None:
        self._inside.put(key, data)

    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        return self._inside.get(key, limit)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[Data]:
        return self._inside.get_ranges(key, ranges)

    def list(self, prefix: str) -> Iterator[Stored]:
        return self._inside.list(prefix)

    def delete(self, key: str) -> None:
        self._inside.delete(key)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
            self._spans.clear()
            self._of.clear()
            self._size = 0
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        self._inside.close()


def spans_of(kind: Kind, places: Iterable[Place]) -> Iterator[tuple[str, int, int]]:
    """(key, offset, length) of few spans that hold these entries, in their order."""
    pack, start, end = b"", 0, 0
    for place in places:
        stop = place.offset + ENTRY_SIZE + place.length
        near = end <= place.offset <= end + MAX_GAP and stop - start <= MAX_SPAN
        if place.pack == pack and near:
            end = stop
            continue
        if pack:
            yield key_of(kind, pack), start, end - start
        pack, start, end = place.pack, place.offset, stop
    if pack:
        yield key_of(kind, pack), start, end - start


@dataclass(slots=True)
class _Stream:
    """One reader, by chunk numbers.

    Attributes:
        begin: of what was announced last.
        more: who asks for this one gets the next announced.
        upto: the first data chunk that has not been announced.
        window: data chunks announced at a time.
    """

    begin: int
    more: int
    upto: int
    window: int = 1


class Sweeps:
    """Finds out who reads a disk from one end to the other, and announces what is next."""

    def __init__(self, pages: Pages, store: SpanStore) -> None:
        self._pages = pages
        self._store = store
        self._lock = threading.Lock()
        self._streams: list[_Stream] = []  # the most recently active last
        self._most = max(1, MAX_WINDOW // pages.root.chunk_size)

    def before(self, chunk: int) -> None:
        """A chunk is about to be read. Never waits; for threads."""
        with self._lock:
            stream = self._stream_of(chunk)
            if stream is None:
                following, _ = self._next_data(chunk + 1)
                self._streams.append(_Stream(chunk, following, following))
                del self._streams[:-STREAMS]
                return
            if chunk >= stream.more:
                stream.window = min(stream.window * 2, self._most)
                self._announce(stream, chunk)

    def _stream_of(self, chunk: int) -> _Stream | None:
        for n in range(len(self._streams) - 1, -1, -1):
            stream = self._streams[n]
            if stream.begin - SLACK <= chunk < stream.upto + stream.window + SLACK:
                self._streams.append(self._streams.pop(n))
                return stream
        return None

    def _announce(self, stream: _Stream, wanted: int) -> None:
        places: list[Place] = []
        stream.begin = stream.more  # chunks in flight may still be asked for out of turn
        at, place = self._next_data(stream.upto)
        while place is not None and (len(places) < stream.window or at <= wanted):
            if len(places) <= stream.window // 2:
                stream.more = at
            places.append(place)
            at, place = self._next_data(at + 1)
        stream.upto = max(at, wanted + 1)
        for span in spans_of(Kind.CHUNK, places):
            self._store.announce(*span)

    def _next_data(self, chunk: int) -> tuple[int, Place | None]:
        """The first chunk from this one on that is not zeroes, so that holes do not count.

        No place: as far as is known. The reader loads what comes next, and comes back here.
        """
        pages, slots = self._pages, self._pages.root.page_slots
        for _ in range(MAX_LOOKED):
            number = chunk // slots
            data_page = pages.first_not_zero(number)
            chunk = max(chunk, data_page * slots)
            page = pages.peek(data_page) if data_page < len(pages.root) else None
            if page is None:
                break
            index = page.zeroes.find(0, chunk % slots)
            if index < 0:
                chunk = (data_page + 1) * slots
                continue
            chunk = data_page * slots + index
            return chunk, page.page.place(index) if page.page is not None else None
        return chunk, None
