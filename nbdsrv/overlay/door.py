"""The way in to an overlay that is being served: a moment of it, for who asks.

::

    DIR/<export>/frozen.sock (0600)   LIST: frozen
         GO ──────────── freeze() ── Frozen        the first client that comes
         disconnect ──── thaw                      the last one that leaves, or dies

While somebody is reading the frozen view the export counts as used, so that the overlay stays open
even if the guest leaves.
"""

import asyncio
import contextlib
import logging
import os

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.errors import ListenError
from nbdsrv.export.exports import Catalogue, Export
from nbdsrv.net.listener import listen
from nbdsrv.net.server import Limits, Server
from nbdsrv.overlay.overlay import Overlay
from nbdsrv.overlay.place import SOCKET_NAME

__all__ = ["FROZEN", "Door"]

log = logging.getLogger(__name__)

FROZEN = "frozen"
"""The export's name."""
LIMITS = Limits(connections=32, handshake_s=10.0, drain_s=1.0)
"""A commit uses a few connections."""
MAX_PATH = 100
"""Bytes of a socket's path; longer ones are reached by way of the open directory."""


class Door:
    """Of one overlay, while it is open. Belongs to the loop."""

    def __init__(self, overlay: Overlay, export: Export) -> None:
        """Knocking freezes ``overlay``, which is what ``export`` has opened."""
        self._overlay = overlay
        self._export = export
        self._server: Server | None = None
        self._path = -1
        self._releases: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen. A file system that has no sockets is no reason not to serve."""
        catalogue = Catalogue()
        catalogue.add(Export(FROZEN, self._freeze, f"a moment of {self._export.name}"))
        try:
            listener = listen(f"unix:{self._address()}", socket_mode=0o600)
        except ListenError as error:
            log.warning("overlay.no_door overlay=%s reason=%s", self._overlay.name, error)
            self._let_go()
            return
        self._server = Server(catalogue, self._overlay.workers, limits=LIMITS)
        self._server.listen(listener)

    def _address(self) -> str:
        path = os.path.join(self._overlay.name, SOCKET_NAME)
        with contextlib.suppress(OSError):
            os.unlink(path)  # of one who died: the overlay is ours now
        if len(os.fsencode(path)) <= MAX_PATH:
            return path
        self._path = os.open(self._overlay.name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._path}/{SOCKET_NAME}"

    async def _freeze(self) -> Disk:
        held = await self._export.acquire()
        try:
            frozen = await self._overlay.freeze()
        except BaseException:
            await self._export.release()
            raise
        log.info("overlay.freeze overlay=%s", held.name)
        return _Held(frozen, self)

    def thawed(self) -> None:
        """The last client of the frozen view has left."""
        log.info("overlay.thaw overlay=%s", self._overlay.name)
        # In a task: what is released may close the overlay, and with it this server, which waits
        # for the one who is calling here.
        task = asyncio.get_running_loop().create_task(self._export.release())
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def close(self) -> None:
        """Show nothing any more; who is reading is cut off. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop()
        self._let_go()
        mine = asyncio.current_task()
        if waiting := [task for task in self._releases if task is not mine]:
            await asyncio.wait(waiting)

    def _let_go(self) -> None:
        if self._path >= 0:
            os.close(self._path)
            self._path = -1


class _Held(Passthrough):
    """The frozen view, which holds the export."""

    def __init__(self, frozen: Disk, door: Door) -> None:
        super().__init__(frozen.workers, frozen)
        self._door: Door | None = door

    async def close(self) -> None:
        """Thaw."""
        door, self._door = self._door, None
        try:
            await super().close()
        finally:
            if door is not None:
                door.thawed()
