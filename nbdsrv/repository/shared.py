"""What a repository and the disks opened from it use together: closed behind the last of them.

::

    repository ──┐
    disk A ──────┼──> Shared ── close()         a tree, a vault, borg's processes
    disk B ──────┘                              each leaves once
"""

from collections.abc import Callable

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import RepositoryError

__all__ = ["Shared"]


class Shared:
    """Who uses it. Belongs to the event loop; whoever makes it, the repository, is its first user.

    Attributes:
        closed: has the repository left? Nobody may enter then; disks that are open stay so.
    """

    def __init__(self, name: str, workers: Workers, close: Callable[[], None]) -> None:
        """``close`` is called in a thread, once."""
        self.closed = False
        self._name = name
        self._workers = workers
        self._close = close
        self._users = 1

    def check(self) -> None:
        """Raises RepositoryError if the repository has left."""
        if self.closed:
            raise RepositoryError(f"{self._name} is closed")

    def enter(self) -> None:
        """One more user.

        Raises:
            RepositoryError: the repository has left.
        """
        self.check()
        self._users += 1

    async def leave(self) -> None:
        """One user less; the last one closes. Call once for each ``enter``."""
        self._users -= 1
        if not self._users:
            await self._workers.run(self._close)

    async def close(self) -> None:
        """The repository leaves. Idempotent."""
        if not self.closed:
            self.closed = True
            await self.leave()
