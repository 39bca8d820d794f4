"""A snapshot as a stream over HTTP, spooled into a temporary file: where NBD cannot be had.

::

    GET /export_raw_vdi?format=vhd ── 302 ──> a host that sees the storage
        200, "conectix..." ── a file without a name ── a Disk of that format
        200, "HTTP/1.1 500 ..."  an error: the status was sent before anything was known
    task ── success | failure                             what has the last word

The stream holds what is allocated, in the disk's order, so the file is as large as that. VHD up to
2040 GiB; larger disks, and those that are qcow2 in the pool, as qcow2.
"""

import logging
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import BinaryIO
from urllib.parse import quote, urlencode, urlsplit

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.xapi_http import Answer, HttpServer, exchange
from nbdsrv.source.xapi_records import Vdi
from nbdsrv.source.xapi_session import XapiSession

__all__ = ["begin_export", "open_exported", "stream_format"]

log = logging.getLogger(__name__)

PATH = "/export_raw_vdi"
MAX_REDIRECTS = 4
FIRST_ANSWER_S = 300.0
"""Seconds until the stream begins: the VDI is attached to the control domain first."""
TASK_END_S = 60.0
"""Seconds from the end of the stream to the task's."""
MAX_VHD = 2040 << 30
"""Bytes of the largest disk that XAPI exports as VHD."""
OVERHEAD = 64 << 20
"""Bytes a stream may have beyond what the disk has: tables, bitmaps."""
ATTEMPTS = 3
"""To have a stream whole."""
LEAST_VHD = 2048
"""Bytes: two footers and a header."""
MAGICS = {"vhd": b"conectix", "qcow2": b"QFI\xfb"}
_INSIDE = b"HTTP/"


def stream_format(vdi: Vdi, live: Vdi) -> str:
    """``vhd`` or ``qcow2``. SM forgets it of snapshots, so the live disk is asked too."""
    named = vdi.sm_config.get("image-format") or live.sm_config.get("image-format")
    if named in MAGICS:
        return named
    return "qcow2" if vdi.size > MAX_VHD else "vhd"


class _CutOff(SourceError):
    """A stream that ended before its end."""


@asynccontextmanager
async def open_exported(
    session: XapiSession, vdi: Vdi, kind: str, workers: Workers, directory: str
) -> AsyncIterator[Disk]:
    """Spool a snapshot and open it, until the end of the block.

    Args:
        session: logged in.
        vdi: the snapshot.
        kind: ``vhd`` or ``qcow2``.
        workers: threads.
        directory: for the file; "" for the system's.

    Raises:
        SourceError: it cannot be exported, or is not whole.
        DiskError: no space, or the file is not what it should be.
    """
    try:
        spool = tempfile.NamedTemporaryFile(  # noqa: SIM115 - removed below, once it is open
            prefix="nbdsrv-xapi-", suffix=f".{kind}", dir=directory or None
        )
    except OSError as error:
        raise DiskError.from_os(f"{directory or 'a temporary file'}", error) from error
    with spool:
        await _fill_whole(session, vdi, kind, workers, spool)  # type: ignore[arg-type]
        disk = await open_image(spool.name, kind, Opening(workers))
    try:
        yield disk
    finally:
        await disk.close()


async def _fill_whole(
    session: XapiSession, vdi: Vdi, kind: str, workers: Workers, spool: BinaryIO
) -> None:
    """Ask again for a stream that was cut off: a connection may end before its last bytes came."""
    for left in reversed(range(ATTEMPTS)):
        try:
            await _fill(session, vdi, kind, workers, spool)
            return
        except _CutOff as error:
            if not left:
                raise
            log.warning("xapi.export.again vdi=%s reason=%s", vdi.uuid, error)
        await workers.run(_empty, spool)


def _empty(spool: BinaryIO) -> None:
    spool.seek(0)
    spool.truncate()


async def _fill(
    session: XapiSession, vdi: Vdi, kind: str, workers: Workers, spool: BinaryIO
) -> None:
    task = str(await session.call("task.create", f"nbdsrv export of {vdi.uuid}", ""))
    try:
        async with begin_export(session, vdi, kind, task) as (server, answer):
            await _receive(server, vdi, kind, answer, workers, spool)
    except BaseException:
        await session.forget(task)  # it is ours: XAPI would show it for a day
        raise
    await session.finished(task, f"exporting {vdi.uuid}", within_s=TASK_END_S)


@asynccontextmanager
async def begin_export(
    session: XapiSession, vdi: Vdi, kind: str, task: str = ""
) -> AsyncIterator[tuple[HttpServer, Answer]]:
    """Ask for the stream, wherever that leads; it may be left before its end.

    Args:
        session: logged in.
        vdi: the snapshot.
        kind: ``vhd`` or ``qcow2``.
        task: that will tell what came of it, if somebody wants to know.

    Raises:
        SourceError: it is refused.
    """
    query = {"session_id": session.ref, "vdi": vdi.ref, "format": kind}
    if task:
        query["task_id"] = task
    server, target = session.server, f"{PATH}?{urlencode(query, quote_via=quote)}"
    for _ in range(MAX_REDIRECTS):
        async with exchange(server, "GET", target, answer_s=FIRST_ANSWER_S) as answer:
            if answer.status in {301, 302, 303, 307, 308}:
                server, target = _redirected(server, answer)
                continue
            if answer.status != 200:
                text = f"{server.name}: exporting {vdi.uuid}: HTTP status {answer.status}"
                raise SourceError(text)
            yield server, answer
            return
    raise SourceError(f"{session.server.name}: exporting {vdi.uuid}: redirected too often")


def _redirected(server: HttpServer, answer: Answer) -> tuple[HttpServer, str]:
    """Another host of the pool, by TLS and with a certificate we trust: it is sent a session."""
    where = urlsplit(answer.headers.get("location", ""))
    try:
        port = where.port or 443
    except ValueError:
        port = 0
    if where.scheme != "https" or not where.hostname or not port:
        raise SourceError(f"{server.name}: redirects to {where.scheme}://{where.netloc}, not https")
    target = f"{where.path}?{where.query}"
    if not target.isascii() or not target.isprintable() or " " in target:
        raise SourceError(f"{server.name}: redirects to what is no address")
    log.info("xapi.redirect host=%s", where.hostname)
    return HttpServer(where.hostname, port, server.access), target


async def _receive(
    server: HttpServer, vdi: Vdi, kind: str, answer: Answer, workers: Workers, spool: BinaryIO
) -> None:
    limit = vdi.size + vdi.size // 512 + OVERHEAD
    total, head = 0, b""
    async for part in answer.parts():
        if total < len(MAGICS[kind]):
            head = (head + part)[:512]
        total += len(part)
        if total > limit:
            raise SourceError(f"{server.name}: the stream of {vdi.uuid} does not end")
        await workers.run(_write, spool, part)
    if head.startswith(_INSIDE):
        line = head.split(b"\r\n")[0].decode("latin-1")
        raise SourceError(f"{server.name}: exporting {vdi.uuid} failed there: {line}")
    if not head.startswith(MAGICS[kind]):
        raise SourceError(f"{server.name}: the stream of {vdi.uuid} is no {kind}")
    await workers.run(_check_end, spool, kind, server.name)


def _write(spool: BinaryIO, part: bytes) -> None:
    try:
        spool.write(part)
    except OSError as error:
        raise DiskError.from_os("spooling a disk", error) from error


def _check_end(spool: BinaryIO, kind: str, where: str) -> None:
    """A VHD ends with its footer; a qcow2 that is cut off cannot be told from here, by its task."""
    try:
        spool.flush()
        size = os.fstat(spool.fileno()).st_size
        footer = os.pread(spool.fileno(), 8, max(size - 512, 0))
    except OSError as error:
        raise DiskError.from_os("spooling a disk", error) from error
    if kind == "vhd" and (size < LEAST_VHD or footer != MAGICS["vhd"]):
        raise _CutOff(f"{where}: the stream of a disk ended too soon, after {size} bytes")
