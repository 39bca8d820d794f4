"""The lock that Xen Orchestra's jobs take on a VM, taken by us: they and we never write at once.

::

    xo-vm-backups/<vm>.lock/      made: ours. Its mtime is renewed every few seconds
                                  there, mtime of the last ten seconds: somebody is at work
                                  there, older: whoever had it has died; it is taken over

As the npm module proper-lockfile does it, with its default times. A directory is made or not, on
every file system, NFS too.
"""

import errno as os_errno
import os
import threading
import time
from contextlib import suppress

from nbdsrv.errors import RepositoryError
from nbdsrv.repository.xo.layout import LOCK, VM_BACKUPS
from nbdsrv.repository.xo.writer_place import Place
from nbdsrv.store.store import StoreError

__all__ = ["VmLock"]

STALE_S = 10.0
"""Without a sign of life for so long a lock is dead."""
RENEW_S = 2.5
"""A fourth of it: one renewal may be late by as much as three."""


class VmLock:
    """Held from ``take`` to ``release``. Any thread may call; all methods block.

    Attributes:
        path: of the lock, in the repository.
    """

    def __init__(self, place: Place, vm: str) -> None:
        self.path = f"{VM_BACKUPS}/{vm}{LOCK}"
        self._full = place.full(self.path)
        self._ended = threading.Event()
        self._lost = ""
        self._mtime = 0
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take it; the VM's directory must be there.

        Raises:
            RepositoryError: a job is at work on this VM.
            StoreError: nothing can be written there.
        """
        for _ in range(3):
            try:
                os.mkdir(self._full)
            except FileExistsError:
                self._take_over()
            except OSError as error:
                raise self._failed(error) from error
            else:
                break
        else:
            raise self._held()
        try:
            self._touch()
        except StoreError:
            with suppress(OSError):
                os.rmdir(self._full)
            raise
        self._thread = threading.Thread(target=self._renew, name="nbdsrv-xo-lock", daemon=True)
        self._thread.start()

    def _take_over(self) -> None:
        """Remove a lock whose owner has died.

        Raises:
            RepositoryError: he lives.
        """
        try:
            modified = os.stat(self._full).st_mtime
            if time.time() - modified <= STALE_S:
                raise self._held()
            os.rmdir(self._full)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Is it still ours? To be asked before anything becomes visible.

        Raises:
            RepositoryError: somebody has taken it over, or may have.
        """
        if not self._lost:
            self._look()
        if self._lost:
            raise RepositoryError(f"{self._full}: {self._lost}; nothing was made visible")

    def release(self) -> None:
        """Give it back, if it is still ours. Idempotent."""
        self._ended.set()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join()
        if not self._lost:
            self._look()
        if not self._lost:
            with suppress(OSError):
                os.rmdir(self._full)

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(RENEW_S) and not self._lost:
            self._look()
            if time.monotonic() - renewed > STALE_S:
                self._lost = "was not renewed in time; another may have taken it"
            if not self._lost:
                try:
                    self._touch()
                    renewed = time.monotonic()
                except StoreError as error:
                    self._lost = str(error)

    def _look(self) -> None:
        try:
            if os.stat(self._full).st_mtime_ns != self._mtime:
                self._lost = "another has taken this lock over"
        except OSError as error:
            self._lost = f"the lock is gone: {error.strerror}"

    def _touch(self) -> None:
        try:
            os.utime(self._full)
            self._mtime = os.stat(self._full).st_mtime_ns
        except OSError as error:
            raise self._failed(error) from error

    def _held(self) -> RepositoryError:
        text = f"{self._full}: a job of Xen Orchestra, or another backup, is at work on this VM"
        return RepositoryError(f"{text}; try again when it has ended", os_errno.EBUSY)

    def _failed(self, error: OSError) -> StoreError:
        number = error.errno or os_errno.EIO
        return StoreError(f"{self._full}: {os.strerror(number)}", number)
