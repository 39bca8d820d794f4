"""A new disk in a pool: created in a storage repository and filled by one HTTP PUT.

::

    copy ── data ──> VhdWriter ── a pipe ── PUT /import_raw_vdi?format=vhd ──> VDI
    open    log in, find the storage
    begin   VDI.create, task.create                 Content-Length: known from the plan
    finish  the footer, the end of the pipe, and what the task says
    abort   VDI.destroy

XAPI takes no chunked bodies and tells what came of an import only by its task.

Limits: 2040 GiB, as for any VHD; and the host that is asked must see the storage, for a PUT cannot
be sent on to another one halfway.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable
from urllib.parse import quote, urlencode

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError
from nbdsrv.formats.target_file import TargetFile
from nbdsrv.formats.vhd.writer import BLOCK, VhdWriter, stream_length
from nbdsrv.formats.writer import ImageWriter, Plan
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.xapi_http import exchange
from nbdsrv.source.xapi_place import Access, XapiPlace, access_of, parse_place
from nbdsrv.source.xapi_session import XapiError, XapiSession

__all__ = ["PoolWriter", "pool_writer"]

PATH = "/import_raw_vdi"
PART = 1 << 18
"""Bytes read from the pipe at a time."""
ANSWER_S = 600.0
"""Seconds from the last byte to the answer: the storage writes out what it has."""
SECTOR = 512
DEFAULT_NAME = "restored by nbdsrv"


def pool_writer(text: str, workers: Workers) -> "PoolWriter":
    """The writer for ``xapi://USER@HOST#SR[/NAME]``. Blocking: reads certificates.

    Raises:
        ConfigError: it is something else, or the environment has no password.
    """
    try:
        place = parse_place(text)
    except ConfigError as error:
        raise ConfigError(f"{error}; a target names an SR in the VM's place") from error
    return PoolWriter(place, access_of(), workers)


class PoolWriter(ImageWriter):
    """A new VDI.

    Attributes:
        uuid: its, once ``finish`` has returned.
    """

    granularity = BLOCK
    seekable = False

    def __init__(self, place: XapiPlace, access: Access, workers: Workers) -> None:
        """``place.vm`` is the SR's name or uuid, ``place.disk`` the new disk's name."""
        self.uuid = ""
        self._place = place
        self._workers = workers
        self._session = XapiSession(place, access)
        self._target = _Pipe()
        self._vhd = VhdWriter(workers, self._target)
        self._stack = contextlib.AsyncExitStack()
        self._sr = ""
        self._vdi = ""
        self._task = ""
        self._put: asyncio.Task[None] | None = None

    async def open(self, size: int) -> None:
        """Log in and look for the SR.

        Raises:
            SourceError: there is no such SR.
        """
        await self._vhd.open(size)
        await self._stack.enter_async_context(self._session)
        self._sr = await self._find_sr()

    async def begin(self, plan: Plan) -> None:
        """Create the VDI and begin to send.

        Raises:
            SourceError: XAPI refuses.
        """
        session = self._session
        self._vdi = await session.task("VDI.create", self._record(plan.size))
        self._task = str(await session.call("task.create", "nbdsrv import", ""))
        length = await self._workers.run(stream_length, plan)
        read_end = self._target.make()
        self._put = asyncio.get_running_loop().create_task(self._send(read_end, length))
        await self._piped(self._vhd.begin(plan))

    def _record(self, size: int) -> dict[str, object]:
        return {
            "name_label": self._place.disk or DEFAULT_NAME,
            "name_description": "restored by nbdsrv",
            "SR": self._sr,
            "virtual_size": -(-size // SECTOR) * SECTOR,
            "type": "user",
            "sharable": False,
            "read_only": False,
            "other_config": {},
            "xenstore_data": {},
            "sm_config": {},
            "tags": [],
        }

    async def _find_sr(self) -> str:
        name, session = self._place.vm, self._session
        try:
            return str(await session.call("SR.get_by_uuid", name))
        except XapiError as error:
            if error.code != "UUID_INVALID":
                raise
        found = await session.call("SR.get_by_name_label", name)
        if not isinstance(found, list) or len(found) != 1:
            many = f"{len(found)} SRs are" if found else "no SR is"
            raise SourceError(f"{session.server.name}: {many} called {name!r}; give a uuid")
        return str(found[0])

    async def _send(self, read_end: int, length: int) -> None:
        """The PUT; when it ends, however it ends, the pipe breaks for the writer."""
        session = self._session
        query = {"session_id": session.ref, "task_id": self._task, "vdi": self._vdi}
        target = f"{PATH}?{urlencode({**query, 'format': 'vhd'}, quote_via=quote)}"
        where = session.server.name
        try:
            body = self._body(read_end)
            async with exchange(
                session.server, "PUT", target, body=body, length=length, answer_s=ANSWER_S
            ) as answer:
                if answer.status != 200:
                    text = f"{where}: importing a disk: HTTP status {answer.status}"
                    hint = "; give the host that sees this SR" if answer.status // 100 == 3 else ""
                    raise SourceError(text + hint)
        finally:
            os.close(read_end)

    async def _body(self, read_end: int) -> AsyncIterator[bytes]:
        while part := await self._workers.run(os.read, read_end, PART):
            yield part

    async def data(self, offset: int, data: memoryview) -> None:
        """Whole blocks, in order."""
        await self._piped(self._vhd.data(offset, data))

    async def zero(self, offset: int, length: int) -> None:
        """A block that is left out is zeroes."""

    async def finish(self) -> None:
        """Send the end, and believe nothing but the task.

        Raises:
            SourceError: the import failed.
        """
        assert self._put is not None
        session = self._session
        await self._piped(self._vhd.finish())
        await self._put
        await session.finished(self._task, "importing a disk", within_s=ANSWER_S)
        self.uuid = str(await session.call("VDI.get_uuid", self._vdi))
        self._vdi = ""
        await self._stack.aclose()

    async def _piped(self, work: Awaitable[None]) -> None:
        """What writes into the pipe; if that breaks, why the PUT has ended is what matters."""
        writing = asyncio.ensure_future(work)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            if self._put is not None:  # a thread may hang in a pipe that nobody reads
                self._put.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            raise
        except DiskError:
            if self._put is not None and self._put.done() and not self._put.cancelled():
                self._put.result()
            raise

    async def abort(self) -> None:
        """Destroy the VDI."""
        await self._vhd.abort()
        if self._put is not None:
            self._put.cancel()
            await asyncio.gather(self._put, return_exceptions=True)
        vdi, self._vdi = self._vdi, ""
        if vdi:
            with contextlib.suppress(SourceError):
                await self._session.task("VDI.destroy", vdi)
                await self._session.call("task.destroy", self._task)
        await self._stack.aclose()


class _Pipe(TargetFile):
    """What a ``VhdWriter`` appends to."""

    def __init__(self) -> None:
        super().__init__("an import")
        self.seekable = False

    def make(self) -> int:
        """The end to be read from; it is the caller's."""
        read_end, self.fd = os.pipe2(os.O_CLOEXEC)
        return read_end

    def open(self) -> None:
        """It is made already."""

    @property
    def _name(self) -> str:
        return self.path
