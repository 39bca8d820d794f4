"""Objects in a bucket of Amazon S3 or a service that speaks its language, by obstore.

::

    s3://bucket/prefix/packs/0f/0fa9...
         └ name ─────┘ └ key ─────────┘      prefix may be "": the bucket is ours alone then

    put_new    PUT, If-None-Match: *         412: it is there already
    get_range  GET, Range                    neighbours asked for at once become one request
    list       GET ?list-type=2, pages of 1000

Rules:

* What may help to repeat is repeated, a bounded number of times: 5xx, connections that fail or
  break, answers that stall. After a put_new whose outcome got lost, "already there" may mean the
  very object of that call; all keys are such that this is well.
* Every answer is checked for its length: services exist that ignore Range or stop early.
* The service must honour If-None-Match. One that ignores it is only found out by trying, so
  whoever makes a repository puts its first object twice.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError

from nbdsrv.store.keys import check_key, check_prefix, is_key
from nbdsrv.store.s3_bucket import FAILURES, BucketReader, open_bucket
from nbdsrv.store.s3_errors import Said
from nbdsrv.store.s3_options import S3Options
from nbdsrv.store.store import MAX_OBJECT, Data, ObjectMissing, Store, Stored, StoreError

__all__ = ["S3Store"]

COALESCE = 1 << 20
"""Bytes between two ranges that are rather read too than asked for around: a round trip's worth."""
MAX_COALESCED = 16 << 20
"""Bytes of one coalesced request: what is held in memory for one small range of it, at most."""
PARALLEL = 8
"""Requests of one ``get_ranges`` at a time."""
PAGE = 1000
"""Keys of a listing at a time: what services send in one answer."""

T = TypeVar("T")


class S3Store(Store):
    """The objects of a bucket below a prefix.

    Keeps connections, which obstore's threads serve; the calls themselves block their own thread
    and let go of the interpreter meanwhile.
    """

    distant = True

    def __init__(self, bucket: str, prefix: str = "", options: S3Options | None = None) -> None:
        """Nothing is asked of the service yet.

        Raises:
            ConfigError: the options make no sense; see ``S3Options.check``.
        """
        options = options or S3Options.from_environment()
        self._reader = BucketReader(bucket, prefix, options)
        self.name = self._reader.name
        self._prefix = prefix
        self._options = options
        # A long upload is no stall: the answer to it comes after the last byte only.
        self._writing = open_bucket(bucket, prefix, options, stall=False)
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def put_new(self, key: str, data: Data) -> bool:
        check_key(self.name, key)

        def create() -> bool:
            try:
                obstore.put(self._writing, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError as error:
                if Said(error).status == 409:  # not yet: another writer is creating it just now
                    raise
                return False
            return True

        return self._repeated(key, create)

    def put(self, key: str, data: Data) -> None:
        check_key(self.name, key)
        try:
            self._reader.ask(
                key, lambda: obstore.put(self._writing, key, data, use_multipart=False)
            )
        except FAILURES as error:
            raise self._reader.explain(key, error) from error

    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        check_key(self.name, key)
        return self._reader.get(key, limit)

    def get_range(self, key: str, offset: int, length: int) -> Data:
        check_key(self.name, key)
        return self._reader.get_range(key, offset, length)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[Data]:
        # obstore.get_ranges panics if an object is shorter than it should be.
        groups = _coalesced(ranges)
        if len(groups) < 2:
            parts: Sequence[Data] = [self.get_range(key, *group) for group in groups]
        else:
            parts = list(self._pool().map(lambda group: self.get_range(key, *group), groups))
        views = [
            (offset, offset + length, memoryview(part))
            for (offset, length), part in zip(groups, parts, strict=True)
        ]
        return [_cut(views, offset, length) for offset, length in ranges]

    def list(self, prefix: str) -> Iterator[Stored]:
        check_prefix(self.name, prefix)
        return self._listing(prefix)

    def delete(self, key: str) -> None:
        check_key(self.name, key)
        with suppress(ObjectMissing):
            self._repeated(key, lambda: obstore.delete(self._writing, key))

    def close(self) -> None:
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()

    def _listing(self, prefix: str) -> Iterator[Stored]:
        last = ""
        try:
            pages = iter(obstore.list(self._reader.objects, prefix or None, chunk_size=PAGE))
            while (page := self._reader.ask(prefix, partial(next, pages, None))) is not None:
                for row in page:
                    key = row["path"]
                    if not is_key(key) or not key.startswith(prefix):
                        continue
                    if key <= last:
                        # "folder/" of other tools; obstore cuts the slash off, so that it seems
                        # to be an empty object and may be out of order.
                        if not row["size"]:
                            continue
                        raise StoreError(
                            f"{self.name}/{prefix}: listed out of order ({key} after {last}); "
                            "directory buckets cannot hold a repository"
                        )
                    last = key
                    yield Stored(key, row["size"], row["last_modified"].timestamp())
        except FAILURES as error:
            raise self._reader.explain(prefix, error) from error

    def _repeated(self, key: str, act: Callable[[], T]) -> T:
        """Repeat also what obstore does not, as it cannot know that doing it twice is well:
        creates and deletes that got no answer, and conflicts with another writer.
        """
        last = time.monotonic() + self._options.patience_s
        attempt = 0
        while True:
            try:
                return self._reader.ask(key, act)
            except FAILURES as error:
                said = Said(error)
                again = attempt < self._options.retries and time.monotonic() < last
                if not again or not (said.timed_out or said.status == 409):
                    raise self._reader.explain(key, error) from error
            self._pause(attempt)
            attempt += 1

    def _pause(self, attempt: int) -> None:
        longest = min(self._options.pause_s * 2**attempt, self._options.pause_s * 50)
        time.sleep(longest * random.uniform(0.5, 1))  # noqa: S311 - so that two writers part

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(PARALLEL, "nbdsrv-s3")
            return self._threads


def _coalesced(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The requests, ascending, that cover ``ranges``."""
    groups: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if groups:
            start, whole = groups[-1]
            joined = max(start + whole, offset + length) - start
            inside = joined == whole
            near = offset - start - whole <= COALESCE and joined <= MAX_COALESCED
            if inside or near:
                groups[-1] = (start, joined)
                continue
        groups.append((offset, length))
    return groups


def _cut(parts: Sequence[tuple[int, int, memoryview]], offset: int, length: int) -> memoryview:
    for start, end, data in parts:
        if start <= offset and offset + length <= end:
            return data[offset - start :][:length]
    raise AssertionError
