"""Checking the chunks that disks of many points share, each once, in bounded memory.

::

    indexes ── all digests from 0000 on, until there are too many: then those below 8000, 4000 ...
                 └─> examined in their order, a few at a time ──> broken
               ... the rest, from there on ...
    indexes ── whom do the broken ones hurt? ──> Findings

A chunk is named by its digest and the length the index gives it: an index that is wrong about the
length is found as damage like a chunk that is.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.damage import Check, Finding, Hurt

__all__ = ["DiskUse", "Ref", "Sweep"]

MAX_UNIQUE = 1 << 20
"""Chunks known at a time, some 130 MiB: 4 TiB of chunks of 4 MiB."""
MAX_FINDINGS = 4096
"""Broken chunks that are named one by one; the others are counted, with whom they hurt."""
THREADS = 4
"""Chunks examined at a time, each in memory: unpacking and hashing leave the interpreter."""
TOPS = 1 << 16

Ref = tuple[int, int, bytes]
"""Offset and length on the disk, and the chunk's digest."""


@dataclass(frozen=True, slots=True)
class DiskUse:
    """A disk and the chunks it is made of.

    Attributes:
        point: ``group/id``.
        disk: its name.
        refs: all of them in ascending order, in batches of some thousands; blocking. May be
            called several times, and raise DiskError.
    """

    point: str
    disk: str
    refs: Callable[[], Iterable[Sequence[Ref]]]


@dataclass(slots=True)
class Sweep:
    """One sweep over the chunks of some disks. In threads; not shared by them.

    Attributes:
        check: where findings and counts go.
        uses: the disks.
        examine: looks at one chunk (digest, length), any thread; returns the bytes it read.
            Raises CorruptImage for damage, another DiskError for what cannot be read now.
        key_of: the file's path in the repository, for findings.
        place: where all chunks lie, for what is not named one by one.
        advice: what to do about a broken one.
        advance: as in ``Repository.verify``: bytes of disks.
    """

    check: Check
    uses: Sequence[DiskUse]
    examine: Callable[[bytes, int], int]
    key_of: Callable[[bytes], str]
    place: str
    advice: str
    advance: Callable[[int, int], None] = lambda _, __: None
    _broken: dict[bytes, Finding] = field(default_factory=dict)
    _rest: int = 0
    _done: int = 0
    _lost: set[tuple[str, str]] = field(default_factory=set)

    def run(self) -> Generator[None, None, None]:
        """Do it, step by step: it yields every few milliseconds."""
        low = 0
        with ThreadPoolExecutor(THREADS, "nbdsrv-verify") as threads:
            while low < TOPS:
                keys, low = yield from self._gather(low)
                yield from self._examine(threads, sorted(keys))
        if self._broken:
            yield from self._trace()

    def _gather(self, low: int) -> Generator[None, None, tuple[set[bytes], int]]:
        """The chunks whose digests begin with ``low`` or more, and where they end."""
        high, keys = TOPS, set[bytes]()
        for use in self.uses:
            for batch in self._batches(use):
                for _, length, digest in batch:
                    if low <= (digest[0] << 8 | digest[1]) < high:
                        keys.add(_key(digest, length))
                while len(keys) > MAX_UNIQUE and high - low > 1:
                    high = (low + high) // 2
                    keys = {key for key in keys if (key[0] << 8 | key[1]) < high}
                yield
        return keys, high

    def _batches(self, use: DiskUse) -> Iterator[Sequence[Ref]]:
        """Those of one disk; an index that cannot be read any more is told once."""
        if (use.point, use.disk) in self._lost:
            return
        try:
            yield from use.refs()
        except DiskError as error:
            self._lost.add((use.point, use.disk))
            self.check.unread.append(f"{use.point} {use.disk}: {error}")

    def _examine(
        self, threads: ThreadPoolExecutor, keys: Sequence[bytes]
    ) -> Generator[None, None, None]:
        total = self._done + sum(_length(key) for key in keys)
        waiting: deque[tuple[bytes, Future[int]]] = deque()
        rest: Iterator[bytes] = iter(keys)
        try:
            while True:
                for key in rest:
                    waiting.append((key, threads.submit(self.examine, key[:-4], _length(key))))
                    if len(waiting) > 2 * THREADS:
                        break
                if not waiting:
                    return
                self._account(*waiting.popleft())
                self.advance(self._done, total)
                yield
        finally:
            for _, future in waiting:  # the sweep was given up
                future.cancel()

    def _account(self, key: bytes, future: Future[int]) -> None:
        check = self.check
        self._done += _length(key)
        check.objects += 1
        try:
            check.read_bytes += future.result()
        except CorruptImage as error:
            self._found(key, str(error))
        except DiskError as error:
            check.unread.append(str(error))

    def _found(self, key: bytes, text: str) -> None:
        if len(self._broken) < MAX_FINDINGS:
            found = Finding(self.key_of(key[:-4]), None, text, advice=self.advice)
            self.check.findings.append(found)
            self._broken[key] = found
            return
        self._rest += 1
        if self._rest == 1:
            last = Finding(self.place, None, "", advice=self.advice)
            self.check.findings.append(last)
        else:
            last = self.check.findings[-1]
        last.text = f"{self._rest} more chunks are missing or broken"
        self._broken[key] = last

    def _trace(self) -> Generator[None, None, None]:
        """Whom the broken chunks hurt."""
        for use in self.uses:
            hurts: dict[int, Hurt] = {}
            for batch in self._batches(use):
                for offset, length, digest in batch:
                    finding = self._broken.get(_key(digest, length))
                    if finding is None:
                        continue
                    hurt = hurts.get(id(finding))
                    if hurt is None:
                        hurt = hurts[id(finding)] = Hurt(use.point, use.disk)
                        finding.hurts.append(hurt)
                    hurt.add(offset, length)
                yield


def _key(digest: bytes, length: int) -> bytes:
    return digest + length.to_bytes(4, "little")


def _length(key: bytes) -> int:
    return int.from_bytes(key[-4:], "little")
