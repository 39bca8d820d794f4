"""Where the boot trace of a disk is kept: with its restore points, or beside its overlays.

::

    a point of our repository     traces/<group>/<disk>.tr       every host that restores has it
    that cannot be written,
    and everything else           DIR/.traces/<name>.json        the overlays' directory

The name is of the VM and its disk, not of the point: next month's point boots alike.

Rule: a trace is help and nothing else. What cannot be read or kept is logged, and no error.
"""

import contextlib
import logging
import os
from collections.abc import Mapping

from nbdsrv.disk.disk import Disk
from nbdsrv.errors import DiskError
from nbdsrv.overlay.place import directory_name
from nbdsrv.overlay.trace import MAX_TRACE, Trace, decode_trace, encode_trace
from nbdsrv.repository.native.disk import PointDisk

__all__ = ["TracePlace"]

log = logging.getLogger(__name__)

DIRECTORY = ".traces"


class TracePlace:
    """Of one disk."""

    def __init__(self, base: Disk, directory: str, source: str) -> None:
        """Looks at nothing yet.

        Args:
            base: what the overlay lies over.
            directory: of the overlays.
            source: what the base is called; its name, where it is no restore point's.
        """
        self._base = base
        self._point = base if isinstance(base, PointDisk) else None
        name = directory_name(_name_of(base.facts, source))
        self._path = os.path.join(directory, DIRECTORY, f"{name}.json")

    async def load(self) -> Trace | None:
        """The last one, if there is any that makes sense."""
        try:
            data = await self._point.boot_trace() if self._point is not None else None
            if data is None:
                data = await self._base.workers.look_up(_read, self._path)
            return None if data is None else decode_trace(data, self._path)
        except DiskError as error:
            log.warning("trace.unread disk=%s reason=%s", self._base.name, error)
            return None

    async def keep(self, trace: Trace) -> None:
        """In place of the last one."""
        data = encode_trace(trace)
        if len(data) > MAX_TRACE:
            return
        if self._point is not None:
            try:
                await self._point.keep_boot_trace(data)
            except DiskError as error:
                log.info("trace.elsewhere disk=%s reason=%s", self._base.name, error)
            else:
                return
        try:
            await self._base.workers.look_up(_write, self._path, data)
        except DiskError as error:
            log.warning("trace.unkept disk=%s reason=%s", self._base.name, error)


def _name_of(facts: Mapping[str, object], source: str) -> str:
    group, disk = facts.get("group"), facts.get("disk")
    if isinstance(group, str) and isinstance(disk, str):
        return f"{group}/{disk}"
    return source


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_TRACE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DiskError.from_os(path, error) from error


def _write(path: str, data: bytes) -> None:
    """Whole or not at all."""
    new = f"{path}.{os.getpid()}.new"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(new, "wb") as file:
            file.write(data)
        os.replace(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise DiskError.from_os(path, error) from error
