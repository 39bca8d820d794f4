"""What has changed on a disk since an older snapshot, or why nothing can tell.

::

    known bases    c3  c2  c1           the best first; each is looked at until one will do
                   gone │
                        └─ same disk? same size? tracked? ── list_changed_blocks ──> Bitmap

Rule: any doubt is a reason to read everything, and the reason is told. Nothing here is an error.
"""

import base64
import binascii
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from nbdsrv.disk.workers import Workers
from nbdsrv.source.cbt import Bitmap
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.xapi_records import LiveDisk, Vdi, read_vdi
from nbdsrv.source.xapi_session import XapiError, XapiSession

__all__ = ["Changes", "Tracked", "changes_since", "turn_on"]

log = logging.getLogger(__name__)

MAX_TRIES = 32
"""Bases looked at."""


@dataclass(frozen=True, slots=True)
class Tracked:
    """A live disk just before it is frozen.

    Attributes:
        before: were changes tracked already?
        reason: why not, and whether they are now; "" if they were.
    """

    before: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Changes:
    """Since a base.

    Attributes:
        bitmap: None if nothing tells.
        since: uuid of the base, "" if none.
        reason: why nothing tells; "" if something does.
    """

    bitmap: Bitmap | None = None
    since: str = ""
    reason: str = ""


async def turn_on(session: XapiSession, disk: LiveDisk) -> Tracked:
    """Have changes of a live disk tracked, from the next snapshot on."""
    if disk.vdi.cbt:
        return Tracked(before=True)
    try:
        await session.task("VDI.enable_cbt", disk.vdi.ref)
    except XapiError as error:
        text = "changed block tracking is off and cannot be turned on"
        return Tracked(before=False, reason=f"{text}: {error.code}")
    log.info("xapi.cbt disk=%s on=1", disk.name)
    text = "changed block tracking was off; it is on from now, the next backup can be incremental"
    return Tracked(before=False, reason=text)


async def changes_since(
    session: XapiSession,
    workers: Workers,
    disk: LiveDisk,
    tracked: Tracked,
    snapshot: Vdi,
    known: Sequence[str],
) -> Changes:
    """What changed on ``disk`` between the first of ``known`` that will do and ``snapshot``."""
    if not tracked.before:
        return Changes(reason=tracked.reason)
    if not snapshot.cbt:
        text = "changed block tracking was turned off as the snapshot was taken, by an error there"
        return Changes(reason=text)
    if not known:
        return Changes(reason="no checkpoint of it is known")
    doubts = []
    for uuid in known[:MAX_TRIES]:
        try:
            bitmap = await _since(session, workers, disk, snapshot, uuid)
        except (_DoubtError, SourceError) as error:
            log.info("xapi.doubt disk=%s base=%s reason=%s", disk.name, uuid, error)
            doubts.append(str(error))
        else:
            return Changes(bitmap, uuid)
    return Changes(reason=doubts[0])


class _DoubtError(Exception):
    pass


async def _since(
    session: XapiSession, workers: Workers, disk: LiveDisk, snapshot: Vdi, uuid: str
) -> Bitmap:
    base = await _base(session, uuid)
    if base.snapshot_of != disk.vdi.ref:
        raise _DoubtError(f"the base {uuid} is a snapshot of another disk than {disk.vdi.uuid}")
    if not base.cbt:
        raise _DoubtError(f"the base {uuid} has lost its changed block tracking")
    if base.size != snapshot.size:
        text = (
            f"the disk was resized from {base.size} to {snapshot.size} bytes since the base {uuid}"
        )
        raise _DoubtError(text)
    try:
        text = await session.task("VDI.list_changed_blocks", base.ref, snapshot.ref)
    except XapiError as error:
        told = next((each for each in error.details if " " in each), "")
        shown = f"{error.code}: {told}" if told else error.code
        raise _DoubtError(f"what changed since the base {uuid} cannot be told: {shown}") from error
    try:
        bits = base64.b64decode(text, validate=True)
        return await workers.run(Bitmap, bits, snapshot.size)
    except (binascii.Error, ValueError) as error:
        raise _DoubtError(f"what changed since the base {uuid} is no bitmap: {error}") from error


async def _base(session: XapiSession, uuid: str) -> Vdi:
    try:
        return await read_vdi(session, await session.call("VDI.get_by_uuid", uuid))
    except XapiError as error:
        if error.code not in {"UUID_INVALID", "HANDLE_INVALID"}:
            raise
        raise _DoubtError(f"the base {uuid} is gone") from error
