"""A tree that a repository and the disks opened from it read: closed behind the last of them.

::

    repository ──┐
    disk A ──────┼──> SharedTree ── Tree(s)         each leaves once
    disk B ──────┘
"""

from collections.abc import Sequence

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import RepositoryError
from nbdsrv.store.tree import Tree

__all__ = ["SharedTree"]


class SharedTree:
    """Trees and who uses them. Belongs to the event loop; the trees themselves are thread-safe."""

    def __init__(self, trees: Sequence[Tree], workers: Workers) -> None:
        """Becomes the owner of ``trees``; whoever makes it is its first user."""
        self._trees = trees
        self._workers = workers
        self._users = 1

    def enter(self) -> None:
        """One more user.

        Raises:
            RepositoryError: the last one has left.
        """
        if not self._users:
            raise RepositoryError(f"{self._trees[0].name} is closed")
        self._users += 1

    async def leave(self) -> None:
        """One user less; the last one closes. Call once for each ``enter``."""
        self._users -= 1
        if not self._users:
            await self._workers.look_up(self._close)

    def _close(self) -> None:
        for tree in self._trees:
            tree.close()
