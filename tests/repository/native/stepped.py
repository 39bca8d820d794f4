"""A store whose caller, in a thread of its own, goes one call at a time: for interleavings."""

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from nbdsrv.store.faulty import Crashed
from nbdsrv.store.store import MAX_OBJECT, Data, Store, Stored

__all__ = ["Stepped", "SteppedRun"]

T = TypeVar("T")
PATIENCE = 20.0


class Stepped(Store):
    """The same objects; every call waits until ``let`` has allowed one more."""

    def __init__(self, inside: Store) -> None:
        self.inside = inside
        self.name = inside.name
        self._turn = threading.Condition()
        self._allowed = 0
        self._made = 0
        self._free = False
        self.dead = False
        self.ended = False

    def let(self, calls: int) -> None:
        """Allow so many calls, one after the other, or as many as there are to come."""
        with self._turn:
            for _ in range(calls):
                made = self._made
                self._allowed += 1
                self._turn.notify_all()
                if not self._turn.wait_for(
                    lambda made=made: self._made > made or self.ended, PATIENCE
                ):
                    raise AssertionError("no further call came")
                if self.ended:
                    return

    @property
    def calls(self) -> int:
        """How many there have been."""
        return self._made

    def run_on(self) -> None:
        """Allow everything from now on."""
        with self._turn:
            self._free = True
            self._turn.notify_all()

    def die(self) -> None:
        """No further call happens: the caller is dead."""
        with self._turn:
            self.dead = True
            self._turn.notify_all()

    def end(self) -> None:
        """The caller has nothing more to do."""
        with self._turn:
            self.ended = True
            self._turn.notify_all()

    def _step(self, act: Callable[[], T]) -> T:
        with self._turn:
            self._turn.wait_for(lambda: self._allowed > 0 or self._free or self.dead)
            if self.dead:
                raise Crashed
            if not self._free:
                self._allowed -= 1
            try:
                return act()
            finally:
                self._made += 1
                self._turn.notify_all()

    def put_new(self, key: str, data: Data) -> bool:
        return self._step(lambda: self.inside.put_new(key, data))

    def put(self, key: str, data: Data) -> None:
        self._step(lambda: self.inside.put(key, data))

    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        return self._step(lambda: self.inside.get(key, limit))

    def get_range(self, key: str, offset: int, length: int) -> Data:
        return self._step(lambda: self.inside.get_range(key, offset, length))

    def list(self, prefix: str) -> Iterator[Stored]:
        return iter(self._step(lambda: [*self.inside.list(prefix)]))

    def delete(self, key: str) -> None:
        self._step(lambda: self.inside.delete(key))


class SteppedRun:
    """Something at work in a thread, over a stepped store.

    Attributes:
        error: what it ended with, if that was no result.
    """

    def __init__(self, store: Store, work: Callable[[Store], object]) -> None:
        self.store = Stepped(store)
        self.error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work(self.store)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        finally:
            self.store.end()

    def step(self, calls: int) -> None:
        """Go on for so many calls."""
        self.store.let(calls)

    def finish(self) -> None:
        """Go on to the end."""
        self.store.run_on()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def kill(self) -> None:
        """Die here."""
        self.store.die()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    @property
    def ended(self) -> bool:
        """Is it through?"""
        return self.store.ended
