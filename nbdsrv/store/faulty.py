"""A store that goes wrong on purpose, for the tests of everything above.

::

    FaultyStore(inside)                      counts and records, nothing else
        crash=Crash(n, Moment.AFTER)         call n is the last one that happens
        failures=[Failure(choice, ENOSPC)]   chosen calls raise StoreError
        flips=[Flip(choice, bit)]            chosen reads return wrong bytes
        lost=choice, stale=k                 listings that do not show everything
        delay_s=0.02                         every call takes that long

A test of crashes runs once to see how many calls there are, then once for each of them, and looks
at ``inside``, which is what a later process would find::

    for n, moment in crashes(whole_run.log):
        inside = MemoryStore()
        with pytest.raises(Crashed):
            backup(FaultyStore(inside, crash=Crash(n, moment)))
        verify(inside)

Rule: calls are numbered from 0 in the order in which they are made, whatever becomes of them.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, TypeVar

from nbdsrv.store.store import MAX_OBJECT, Data, Store, Stored, StoreError

__all__ = [
    "Call",
    "Choice",
    "Crash",
    "Crashed",
    "Failure",
    "FaultyStore",
    "Flip",
    "Moment",
    "calls",
    "crashes",
]

T = TypeVar("T")

CHANGING = frozenset({"put_new", "put", "delete"})


class Crashed(BaseException):
    """The process is dead, as far as the store is concerned. No handler of errors catches it."""


class Call(NamedTuple):
    """One call, as recorded.

    Attributes:
        number: from 0.
        method: ``put_new``, ``put``, ``get``, ``get_range``, ``list`` or ``delete``.
        key: or the prefix of a listing.
    """

    number: int
    method: str
    key: str


Choice = Callable[[Call], bool]


def calls(*methods: str, key: str = ".*", numbers: Collection[int] | None = None) -> Choice:
    """Choose calls.

    Args:
        methods: their names; none for all.
        key: a regular expression for the whole key or prefix.
        numbers: of the calls, None for all.
    """
    pattern = re.compile(key)

    def chosen(call: Call) -> bool:
        return (
            (not methods or call.method in methods)
            and (numbers is None or call.number in numbers)
            and pattern.fullmatch(call.key) is not None
        )

    return chosen


class Moment(Enum):
    """When, within the crashing call."""

    BEFORE = auto()
    """It does not reach the store inside."""
    AFTER = auto()
    """It happens, but its caller never learns."""
    TORN = auto()
    """A put leaves the first half under its key, as no store should; other calls: BEFORE."""


@dataclass(frozen=True, slots=True)
class Crash:
    """Where everything ends."""

    number: int
    moment: Moment = Moment.BEFORE


@dataclass(frozen=True, slots=True)
class Failure:
    """Chosen calls raise ``StoreError``.

    Attributes:
        choice: which.
        errno: of the error.
        times: how often at most; None for always.
        done: the store inside does it all the same: an outcome the caller cannot know.
    """

    choice: Choice
    errno: int
    times: int | None = None
    done: bool = False


@dataclass(frozen=True, slots=True)
class Flip:
    """Chosen ``get`` and ``get_range`` return one wrong bit.

    Attributes:
        choice: which.
        bit: of what is returned; beyond its end, counted from its beginning again.
    """

    choice: Choice
    bit: int = 0


def crashes(log: Sequence[Call], *, torn: bool = False) -> Iterator[tuple[int, Moment]]:
    """Every crash that leaves something different behind.

    Args:
        log: of a run without faults.
        torn: also those that leave half an object.
    """
    for call in log:
        if call.method not in CHANGING:
            continue
        yield call.number, Moment.BEFORE
        if torn and call.method != "delete":
            yield call.number, Moment.TORN
    if log:
        yield log[-1].number, Moment.AFTER  # of all others the next one's BEFORE is the same


class FaultyStore(Store):
    """A store around a store. Without faults it is that store, with a log.

    ``get_ranges`` counts as one ``get_range`` for each. A listing is taken when it is asked for.

    Attributes:
        inside: the store around which this is.
        log: the calls so far. With threads, in the order of their numbers.
        crashed: has the crash happened? Every call raises ``Crashed`` from then on.
    """

    def __init__(
        self,
        inside: Store,
        *,
        crash: Crash | None = None,
        failures: Sequence[Failure] = (),
        flips: Sequence[Flip] = (),
        lost: Callable[[Call, str], bool] | None = None,
        stale: int = 0,
        delay_s: float = 0.0,
    ) -> None:
        """A store that goes wrong as told.

        Args:
            inside: where what does happen happens.
            crash: at which call the process dies.
            failures: the first one that matches a call counts.
            flips: all that match are applied.
            lost: is a key left out of the listing of this call?
            stale: a listing leaves out what the last so many calls before it have put through
                this store.
            delay_s: seconds every call sleeps, in its own thread.
        """
        self.inside = inside
        self.name = inside.name
        self.distant = inside.distant
        self.log: list[Call] = []
        self.crashed = False
        self._crash = crash
        self._failures = failures
        self._left = [failure.times for failure in failures]
        self._flips = flips
        self._lost = lost
        self._stale = stale
        self._delay_s = delay_s
        self._put_at: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def calls(self) -> int:
        """How many there have been, failed ones included."""
        return len(self.log)

    def put_new(self, key: str, data: Data) -> bool:
        return self._change("put_new", key, data, lambda: self.inside.put_new(key, data))

    def put(self, key: str, data: Data) -> None:
        self._change("put", key, data, lambda: self.inside.put(key, data) or True)

    def delete(self, key: str) -> None:
        self._change("delete", key, None, lambda: self.inside.delete(key) or False)

    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        call = self._begin("get", key)
        data = self._act(call, lambda: self.inside.get(key, limit))
        return bytes(self._flipped(call, data))

    def get_range(self, key: str, offset: int, length: int) -> Data:
        call = self._begin("get_range", key)
        data = self._act(call, lambda: self.inside.get_range(key, offset, length))
        return self._flipped(call, data)

    def list(self, prefix: str) -> Iterator[Stored]:
        call = self._begin("list", prefix)
        found = self._act(call, lambda: list(self.inside.list(prefix)))
        with self._lock:
            shown = [row for row in found if not self._hidden(call, row.key)]
        return self._while_alive(shown)

    def close(self) -> None:
        """Closes the store inside; not a call, and possible after a crash."""
        self.inside.close()

    def _change(self, method: str, key: str, data: Data | None, act: Callable[[], bool]) -> bool:
        call = self._begin(method, key)
        if self._crash == Crash(call.number, Moment.TORN) and data is not None:
            half = bytes(data[: len(data) // 2])
            with self._lock:
                self.crashed = True
            if method == "put":
                self.inside.put(key, half)
            else:
                self.inside.put_new(key, half)
            raise Crashed(call)
        return self._act(call, act)

    def _begin(self, method: str, key: str) -> Call:
        if self._delay_s:
            time.sleep(self._delay_s)
        with self._lock:
            if self.crashed:
                raise Crashed(method, key)
            call = Call(len(self.log), method, key)
            self.log.append(call)
            crash = self._crash
            if crash is None or call.number != crash.number or crash.moment is Moment.AFTER:
                return call
            if crash.moment is Moment.TORN and method in {"put", "put_new"}:
                return call
            self.crashed = True
        raise Crashed(call)

    def _act(self, call: Call, act: Callable[[], T]) -> T:
        failure = self._failure_of(call)
        try:
            if failure is None or failure.done:
                result = act()
                if result is True:
                    with self._lock:
                        self._put_at[call.key] = call.number
            if failure is None:
                return result
        finally:
            self._end(call)
        text = f"{self.name}/{call.key}: {call.method}: {os.strerror(failure.errno)}"
        raise StoreError(text, failure.errno)

    def _end(self, call: Call) -> None:
        """Whatever became of it: has this been the last call?"""
        with self._lock:
            if self._crash == Crash(call.number, Moment.AFTER):
                self.crashed = True
            if self.crashed:
                raise Crashed(call)

    def _failure_of(self, call: Call) -> Failure | None:
        with self._lock:
            for index, failure in enumerate(self._failures):
                left = self._left[index]
                if left == 0 or not failure.choice(call):
                    continue
                if left is not None:
                    self._left[index] = left - 1
                return failure
        return None

    def _hidden(self, call: Call, key: str) -> bool:
        recent = self._put_at.get(key, -self._stale - 1) >= call.number - self._stale
        return (self._stale > 0 and recent) or (self._lost is not None and self._lost(call, key))

    def _flipped(self, call: Call, data: Data) -> Data:
        bits = [flip.bit for flip in self._flips if flip.choice(call)]
        if not bits or not len(data):
            return data
        wrong = bytearray(data)
        for bit in bits:
            wrong[bit // 8 % len(wrong)] ^= 1 << bit % 8
        return wrong

    def _while_alive(self, rows: Sequence[Stored]) -> Iterator[Stored]:
        for row in rows:
            if self.crashed:
                raise Crashed(row.key)
            yield row
