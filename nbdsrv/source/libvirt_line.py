"""One thread on which libvirt is called: its API blocks, and may block for long.

::

    event loop                        thread
    await line.call("what", f, 1) ──> f(1) ... libvirtError
               <── value, or Refused(code, "URI: what: libvirt's words")

Calls run one after the other, in the order they were made: what cleans up after a call that was
cancelled sees all that the call has done. A call that misses its deadline is not waited for any
more, and its line takes no others.
"""

import asyncio
import errno as os_errno
import importlib
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from types import ModuleType
from typing import Any, TypeVar, TypeVarTuple

from nbdsrv.errors import ConfigError
from nbdsrv.source.hypervisor import SourceError

__all__ = [
    "CALL_S",
    "CHECKPOINT_INCONSISTENT",
    "NO_BACKUP",
    "NO_CHECKPOINT",
    "NO_DOMAIN",
    "Line",
    "Refused",
    "bindings",
]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_Job = tuple["asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...]]

CALL_S = 60.0
"""For one call. libvirt itself waits 30 s for a domain that is busy with something else."""

JOIN_S = 5.0
"""For the thread to end; it is waited for out of courtesy."""

NO_DOMAIN = 42
NO_CHECKPOINT = 103
NO_BACKUP = 104
CHECKPOINT_INCONSISTENT = 109
"""Of libvirt's virErrorNumber."""


class Refused(SourceError):
    """libvirt has said no.

    Attributes:
        code: its number for that.
        words: what it said, without what we were about.
    """

    def __init__(self, text: str, code: int, words: str) -> None:
        super().__init__(text)
        self.code = code
        self.words = words


def bindings() -> ModuleType:
    """The Python module that comes with libvirt.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        module = importlib.import_module("libvirt")
    except ImportError as error:
        raise ConfigError(
            "libvirt: needs libvirt's Python module: pip install 'nbdsrv[libvirt]' (it is built"
            " from source with gcc and libvirt-dev), or Debian's python3-libvirt for the"
            f" distribution's Python ({error})"
        ) from error
    # Without a handler libvirt prints every error, also those that are expected, to stderr.
    module.registerErrorHandler(_ignore, None)
    return module


def _ignore(context: object, error: object) -> None:
    """Errors are raised; that is enough."""


class Line:
    """Use from one event loop. ``close`` it."""

    def __init__(self, name: str) -> None:
        """``name``: whom we are talking to, for messages."""
        self.name = name
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._silent = False
        # A daemon: a call that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="nbdsrv-libvirt", daemon=True)
        self._thread.start()

    async def call(
        self,
        what: str,
        work: Callable[[*Ts], T],
        *args: *Ts,
        deadline_s: float = CALL_S,
    ) -> T:
        """Have the thread call ``work(*args)``.

        Cancellation does not stop the work; what is called next is called after it.

        Args:
            what: is done, for messages: "looking up the domain".
            work: blocking.
            args: for it.
            deadline_s: seconds.

        Raises:
            Refused: libvirt raised an error.
            SourceError: it has not answered in time, now or before; or the operating system
                raised one.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if self._silent:
            raise self._no_answer(what)
        self._jobs.put((future, work, args))
        try:
            async with asyncio.timeout(deadline_s):
                return await future
        except TimeoutError:
            self._silent = True
            raise self._no_answer(what) from None
        except OSError as error:
            raise SourceError(
                f"{self.name}: {what}: {error}", error.errno or os_errno.EIO
            ) from error
        except Exception as error:
            code = getattr(error, "get_error_code", None)
            if code is None:
                raise
            words = str(error)
            raise Refused(f"{self.name}: {what}: {words}", code() or 0, words) from error

    def _no_answer(self, what: str) -> SourceError:
        return SourceError(f"{self.name}: {what}: libvirt does not answer", os_errno.ETIMEDOUT)

    async def close(self) -> None:
        """End the thread when all calls have been made. Idempotent."""
        self._jobs.put(None)
        if not self._silent:
            await asyncio.to_thread(self._thread.join, JOIN_S)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work, args = job
            value, error = None, None
            try:
                value = work(*args)
            except BaseException as caught:  # noqa: BLE001 - handed to the loop
                error = caught
            with suppress(RuntimeError):  # the loop has been closed meanwhile
                self._loop.call_soon_threadsafe(_deliver, future, value, error)
            del job, future, work, args, value, error


def _deliver(future: "asyncio.Future[Any]", value: object, error: BaseException | None) -> None:
    if future.done():  # given up
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
