"""Moving a disk of a running VM to where it is to live, by QEMU's own jobs.

::

    mirror   device ─> nbd://we/...                      device ─────> TARGET
                            │ blockdev-mirror                ▲
                            └──────> TARGET        ready ── job-complete: the pivot

    stream   device ─> vm1.qcow2 ─> nbd://we/...         device ─> vm1.qcow2
                           ▲   block-stream
                           └───────┘                     nothing to pivot: the image fills up

A mirror copies in the background and carries each write of the guest's out on both sides, so that
it comes to an end however much the guest writes. Until the pivot the old disk is complete, and a
move that is given up leaves it as it was; from then on the new one is.

Job and node have names that a later run finds again: a job that a killed run has left is gone on
with. After the pivot the nodes of the old disk that nobody needs are closed, so that its export is
free.
"""

import asyncio
import hashlib
import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nbdsrv.disk.insist import insist
from nbdsrv.formats.image_lock import check_free
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.qemu_disks import VmDisk, chosen_disks, disks_of
from nbdsrv.source.qemu_graph import jobs
from nbdsrv.source.qmp import QmpClient, QmpLost, QmpRefused, making_sense

__all__ = ["MoveTarget", "Moved", "QemuMove"]

AGAIN_S = 0.5
"""Seconds between two looks at how far a job is."""
PIVOT_S = 600.0
"""For a job to end once it has been told to: what is in flight on a slow disk is waited for."""
HURRY_S = 10.0
"""For a job that is cancelled because we are to end: what is in flight may hang."""
MAX_NODES = 64
"""Of a disk's chain that are closed behind it."""

GOES_ON = (
    "if QEMU still runs, the move may go on; run the command again to finish it, or with --cancel"
    " to end it"
)

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,100}")

Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class MoveTarget:
    """Where a disk goes.

    Attributes:
        path: absolute; a file that QEMU makes, or a block device.
        format: ``qcow2`` or ``raw``.
        device: is it a block device, overwritten in place?
        direct: past the page cache, as a disk that is in production usually is.
    """

    path: str
    format: str
    device: bool = False
    direct: bool = False

    @property
    def node(self) -> str:
        """Its name in QEMU's block graph; the same for the same path."""
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]
        return f"nbdsrv-moved-{digest}"


@dataclass(slots=True)
class Moved:
    """What became of it.

    Attributes:
        device: as QEMU calls it.
        mode: ``mirror`` or ``stream``.
        source: what the disk was on.
        size: bytes of the disk.
        copied: bytes the job has gone through, what the guest rewrote meanwhile included.
        resumed: it was begun by an earlier run.
        kept: nodes of the old disk that somebody else uses, and that stay.
    """

    device: str
    mode: str
    source: str
    size: int
    copied: int = 0
    resumed: bool = False
    kept: list[str] = field(default_factory=list)


class QemuMove:
    """One disk's move, over a monitor that is held meanwhile. Belongs to one event loop."""

    def __init__(self, client: QmpClient, device: str, rate: int = 0) -> None:
        """Nothing is asked yet.

        Args:
            client: connected.
            device: as ``info qemu:...`` shows it; "" if the VM has one disk only.
            rate: bytes a second at most; 0: as fast as it goes.
        """
        self._client = client
        self._device = device
        self._rate = rate
        self._pivoting = False

    async def to(self, target: MoveTarget, advance: Advance | None = None) -> Moved:
        """Mirror the disk to ``target`` and have the VM go on there.

        Cancelled before the pivot, the VM stays where it was, and the file is removed again.

        Raises:
            SourceError: it could not be moved; the VM is on its old disk, and no new file is left.
        """
        disk = await self._disk()
        if disk.node == target.node:
            raise SourceError(f"{self._name}: {disk.name} is on {target.path} already")
        job = _job_of(disk)
        moved = Moved(disk.name, "mirror", disk.file, disk.size)
        chain = await self._chain(disk.node)
        moved.resumed = await self._goes_on(job, target)
        made = moved.resumed and not target.device
        try:
            if not moved.resumed:
                made = await self._prepare(disk, job, target)
                await self._mirror(disk, job, target)
            moved.copied = await self._ready(job, advance)
            self._pivoting = True
            await self._insist(self._pivot(job, disk, target))
        except QmpLost as error:
            raise SourceError(f"{error}; {GOES_ON}") from error
        except BaseException as error:
            self._hear(error)
            if not self._pivoting or await self._still_on(disk):
                await self._ended(self._undo(job, target, made=made))
            raise
        moved.kept = await self._insist(self._close_nodes(chain))
        return moved

    async def stream(self, advance: Advance | None = None) -> Moved:
        """Pull all that lies below the disk's own image into it.

        Cancelled, what has arrived stays, and a later run goes on behind it.

        Raises:
            SourceError: it could not; the disk is as good as it was.
        """
        disk = await self._disk()
        chain = await self._chain(disk.node)
        below = [each for each in chain if each["depth"]]
        if not below:
            text = f"{self._name}: {disk.name} has no backing image to be pulled in"
            raise SourceError(f"{text}; give a TARGET to move it to")
        job = _job_of(disk)
        moved = Moved(disk.name, "stream", str(below[0]["file"]), disk.size)
        moved.resumed = await self._state(job) not in {"", "concluded"}
        try:
            if not moved.resumed:
                await self._dismiss(job)
                arguments = {"device": disk.node, "job-id": job, "auto-dismiss": False}
                await self._client.execute("block-stream", self._at_rate(arguments))
            moved.copied = await self._ready(job, advance)
        except QmpLost:
            raise
        except BaseException as error:
            self._hear(error)
            await self._ended(self._end(job))
            raise
        await self._dismiss(job)
        moved.kept = await self._insist(self._close_nodes(below))
        return moved

    async def cancel(self) -> bool:
        """End a move that a killed run has left; was there one? The VM stays on its old disk."""
        disk = await self._disk()
        job = _job_of(disk)
        if not await self._state(job):
            return False
        await self._end(job)
        for node in await self._nodes():
            if node["node-name"].startswith("nbdsrv-moved-") and node["node-name"] != disk.node:
                await self._delete(str(node["node-name"]))
        return True

    @property
    def _name(self) -> str:
        return self._client.name

    # --- to the end, whatever happens ------------------------------------------------------------

    def _hear(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            self._client.hurry()

    async def _insist(self, work: Awaitable[T]) -> T:
        return await insist(work, hurry=self._client.hurry)

    async def _ended(self, work: Awaitable[None]) -> None:
        """Raises: SourceError if it cannot be, which is more to know than why it was to."""
        try:
            await self._insist(work)
        except SourceError as error:
            raise SourceError(f"{error}; {GOES_ON}") from error

    # --- before ----------------------------------------------------------------------------------

    async def _disk(self) -> VmDisk:
        disks = disks_of(await self._client.execute("query-block"), self._name)
        chosen = chosen_disks(disks, [self._device] if self._device else [], self._name)
        if len(chosen) > 1:
            names = ", ".join(disk.name for disk in chosen)
            raise SourceError(f"{self._name}: which disk? There are {names}; give qemu:...#DISK")
        return chosen[0]

    async def _nodes(self) -> list[dict[str, Any]]:
        found = await self._client.execute("query-named-block-nodes", {"flat": True})
        with making_sense(self._name):
            return [dict(each) for each in found]

    async def _chain(self, top: str) -> list[dict[str, Any]]:
        """The nodes a disk is made of, the uppermost first: name, file, and depth of the image."""
        try:
            graph = await self._client.execute("x-debug-query-block-graph")
        except QmpRefused:  # it is for debugging, and may go one day
            return [{"name": top, "file": "", "depth": 0}]
        files = {str(each["node-name"]): str(each.get("file", "")) for each in await self._nodes()}
        with making_sense(self._name):
            names = {node["id"]: node["name"] for node in graph["nodes"]}
            ids = {name: id_ for id_, name in names.items()}
            found: list[dict[str, Any]] = []
            waiting = [(ids.get(top), 0)]
            while waiting and len(found) < MAX_NODES:
                id_, depth = waiting.pop(0)
                name = names.get(id_)
                if name is None or any(each["name"] == name for each in found):
                    continue
                found.append({"name": name, "file": files.get(name, ""), "depth": depth})
                for edge in graph["edges"]:
                    if edge["parent"] == id_ and edge["child"] in names:
                        below = depth + (edge["name"] == "backing")
                        waiting.append((edge["child"], below))
        return found

    async def _goes_on(self, job: str, target: MoveTarget) -> bool:
        """Is there a job that mirrors to ``target`` already?"""
        if await self._state(job) in {"", "concluded"}:
            await self._dismiss(job)
            return False
        if any(each["node-name"] == target.node for each in await self._nodes()):
            return True
        text = f"{self._name}: this disk is being moved elsewhere already"
        raise SourceError(f"{text}; end that by `nbdsrv migrate --cancel`, or finish it")

    async def _prepare(self, disk: VmDisk, job: str, target: MoveTarget) -> bool:
        """Have QEMU make the target and open it; has it made a file?"""
        await self._delete(target.node)  # of a run that was killed before it began to mirror
        made = _is_new(target)
        try:
            if not target.device:
                file: dict[str, Any] = {"driver": "file", "filename": target.path}
                size = disk.size if target.format == "raw" else 0
                await self._create(job, {**file, "size": size})
                made = True
            below = self._file(target)
            if target.format == "qcow2":
                await self._client.execute("blockdev-add", {**below, "node-name": _under(target)})
                options = {"driver": "qcow2", "file": _under(target), "size": disk.size}
                await self._create(job, options)
                await self._client.execute("blockdev-del", {"node-name": _under(target)})
            node = {"driver": target.format, "node-name": target.node, "discard": "unmap"}
            await self._client.execute("blockdev-add", {**node, "file": below})
        except BaseException as error:
            self._hear(error)
            await self._ended(self._undo(job, target, made=made))
            raise
        return made

    def _file(self, target: MoveTarget) -> dict[str, Any]:
        return {
            "driver": "host_device" if target.device else "file",
            "filename": target.path,
            "discard": "unmap",
            "cache": {"direct": target.direct, "no-flush": False},
        }

    async def _create(self, job: str, options: dict[str, Any]) -> None:
        await self._client.execute("blockdev-create", {"job-id": job, "options": options})
        await self._client.until(lambda: self._is_in(job, {"concluded", ""}), job)
        await self._conclude(job)

    async def _mirror(self, disk: VmDisk, job: str, target: MoveTarget) -> None:
        arguments: dict[str, Any] = {
            "job-id": job,
            "device": disk.node,
            "target": target.node,
            "sync": "full",
            "copy-mode": "write-blocking",
            "auto-dismiss": False,
        }
        try:
            await self._client.execute("blockdev-mirror", self._at_rate(arguments))
        except QmpRefused as error:
            if not await jobs(self._client):
                raise
            # The backup's filter is above the disk. One that was killed is removed by the next.
            text = f"{self._name}: a backup of {disk.name} is running, or was killed"
            hint = "wait for its end, or run another"
            raise SourceError(f"{text}; {hint}: {error.description}") from error

    def _at_rate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {**arguments, "speed": self._rate} if self._rate else arguments

    # --- meanwhile -------------------------------------------------------------------------------

    async def _job(self, job: str) -> dict[str, Any]:
        found = await self._client.execute("query-jobs")
        with making_sense(self._name):
            return next((dict(each) for each in found if each["id"] == job), {})

    async def _state(self, job: str) -> str:
        return str((await self._job(job)).get("status", ""))

    async def _is_in(self, job: str, states: set[str]) -> bool:
        return await self._state(job) in states

    async def _ready(self, job: str, advance: Advance | None) -> int:
        """Wait until a mirror is ready, or a stream has ended; bytes it has gone through.

        Raises:
            SourceError: it has failed.
        """
        copied = 0
        while True:
            found = await self._job(job)
            if not found:
                raise SourceError(f"{self._name}: somebody has ended the move")
            with making_sense(self._name):
                copied, total = int(found["current-progress"]), int(found["total-progress"])
                status = str(found["status"])
            if advance is not None:
                advance(copied, total)
            if status == "ready":
                return copied
            if status == "concluded":
                _check(self._name, found)
                return copied
            await self._client.stirred(AGAIN_S)

    async def _pivot(self, job: str, disk: VmDisk, target: MoveTarget) -> None:
        """From here on there is no way back, and no signal stops it."""
        if not await self._is_in(job, {"concluded"}):
            await self._client.execute("job-complete", {"id": job})
            concluded = self._client.until(
                lambda: self._is_in(job, {"concluded", ""}), "the pivot", timeout_s=PIVOT_S
            )
            await concluded
        await self._conclude(job)
        if await self._still_on(disk):
            text = f"{self._name}: QEMU says it is done, and {disk.name} is not on {target.path}"
            raise SourceError(text)

    async def _still_on(self, disk: VmDisk) -> bool:
        """Is the VM on its old disk? Also if that cannot be asked any more."""
        try:
            return (await self._disk()).node == disk.node
        except SourceError:
            return not self._client.lost

    async def _conclude(self, job: str) -> None:
        found = await self._job(job)
        await self._dismiss(job)
        _check(self._name, found)

    # --- behind it -------------------------------------------------------------------------------

    async def _undo(self, job: str, target: MoveTarget, *, made: bool) -> None:
        """The VM stays where it is; nothing of the new disk remains."""
        if self._client.lost:
            return
        await self._end(job)
        for node in (target.node, _under(target)):
            await self._delete(node)
        if made:
            try:
                os.unlink(target.path)
            except OSError:
                pass  # not made yet; or QEMU's to remove: its directory is not ours

    async def _end(self, job: str) -> None:
        """Cancel a job, whatever state it is in, and wait until it is gone."""
        if await self._state(job) not in {"", "concluded"}:
            try:
                await self._client.execute("job-cancel", {"id": job})
            except QmpRefused:
                pass  # it has just ended by itself
            limit_s = HURRY_S if self._client.hurried else PIVOT_S
            ended = self._client.until(
                lambda: self._is_in(job, {"concluded", ""}), "ending the move", timeout_s=limit_s
            )
            await ended
        await self._dismiss(job)

    async def _dismiss(self, job: str) -> None:
        try:
            await self._client.execute("job-dismiss", {"id": job})
        except QmpRefused:
            pass  # there is none, or it is running

    async def _delete(self, node: str) -> bool:
        """Close a node; False if somebody uses it, or it is not the monitor's."""
        try:
            await self._client.execute("blockdev-del", {"node-name": node})
        except QmpRefused:
            return False
        return True

    async def _close_nodes(self, chain: list[dict[str, Any]]) -> list[str]:
        """Close what the old disk was made of; names of those that must stay."""
        if self._client.lost:
            return []
        for each in chain:
            await self._delete(str(each["name"]))
        there = {str(each["node-name"]) for each in await self._nodes()}
        return [str(each["name"]) for each in chain if each["name"] in there]


def _job_of(disk: VmDisk) -> str:
    name = disk.name
    if _ID.fullmatch(name) is None:
        name = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"nbdsrv-move-{name}"


def _is_new(target: MoveTarget) -> bool:
    """Is there nothing of that name? What is there and cannot be made anew is not ours to remove.

    Raises:
        DiskError: somebody has it open: it is the disk of another machine, or of this one.
    """
    check_free(target.path)
    return not target.device and not os.path.lexists(target.path)


def _under(target: MoveTarget) -> str:
    return f"{target.node}-file"


def _check(name: str, job: dict[str, Any]) -> None:
    if error := job.get("error"):
        text = str(error)
        hint = "; the VM goes on where it was"
        raise SourceError(f"{name}: the move has failed: {text}{hint}")
