"""What a backup adds to QEMU's block graph, disk by disk, and how it is taken away again.

::

    device ──> nbdsrv-0-cbw ───────> vda (live; its bitmaps record)
                     │                ^
                     │ old data       │ backing: what has not been overwritten
                     v                │
    NBD export ──> nbdsrv-0 (qcow2) ──┴──> nbdsrv-0-file ──> 0.qcow2

``blockdev-backup sync=none`` puts the copy-before-write filter in: the only way to do so for
several disks at one moment, in a transaction. What the guest overwrites is copied to the fleece
first; the fleece, an overlay above the live disk, is the disk at that moment, while the job runs.
Whoever ends the job ends that: the exports are removed at once, and ``still_frozen`` tells.

QEMU has a ``snapshot-access`` driver too, that would rather fail than read what is newer. It is not
used: in 7.2 one read of what has been overwritten together with what has not returns the new data.

Everything has a name that begins with ``nbdsrv-``, the same in every run: ``swept`` needs to
remember nothing to find what a killed run has left.
"""

import asyncio
import contextlib
import os
import re
from collections.abc import Sequence
from typing import Any

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.qemu_checkpoints import Base
from nbdsrv.source.qemu_disks import VmDisk
from nbdsrv.source.qmp import QmpClient, QmpRefused

__all__ = [
    "export",
    "jobs",
    "listens",
    "named_nodes",
    "our_files",
    "prepare",
    "remove_bitmap",
    "remove_export",
    "since_bitmap",
    "swept",
    "transaction",
]

GRANULARITY = 1 << 16
"""Bytes a bit of a bitmap stands for: QEMU's default, and what the copy-before-write copies."""
FREEZE_S = 120.0
"""For the transaction: QEMU first waits for all that the disks have in flight."""

_OURS = re.compile(r"nbdsrv-[0-9]+(-[a-z]+)?")
_SINCE = "nbdsrv-since-"


def since_bitmap(base: str) -> str:
    """The bitmap that tells what has changed since ``base``, up to the moment."""
    return _SINCE + base.removeprefix("nbdsrv-")


async def prepare(client: QmpClient, number: int, disk: VmDisk, path: str) -> None:
    """Have QEMU make the file that keeps what the guest overwrites, and open it.

    Raises:
        SourceError: it could not; ``swept`` removes what there is.
    """
    fleece, file = f"nbdsrv-{number}", f"nbdsrv-{number}-file"
    job = f"nbdsrv-{number}-create"
    await _create(client, job, {"driver": "file", "filename": path, "size": 0})
    # Nobody needs it after a crash: no flush of the guest's has to wait for it.
    cache = {"no-flush": True}
    node: dict[str, Any] = {"driver": "file", "node-name": file, "filename": path, "cache": cache}
    await client.execute("blockdev-add", node)
    await _create(client, job, {"driver": "qcow2", "file": file, "size": disk.size})
    node = {"driver": "qcow2", "node-name": fleece, "file": file, "cache": cache}
    await client.execute("blockdev-add", {**node, "backing": disk.node})


async def _create(client: QmpClient, job: str, options: dict[str, Any]) -> None:
    await client.execute("blockdev-create", {"job-id": job, "options": options})
    error = ""

    async def concluded() -> bool:
        nonlocal error
        for each in await client.execute("query-jobs"):
            if each["id"] == job:
                error = str(each.get("error", ""))
                return bool(each["status"] == "concluded")
        return True

    await client.until(concluded, job)
    await client.execute("job-dismiss", {"id": job})
    if error:
        raise SourceError(f"{client.name}: {options.get('filename', job)}: {error}")


async def transaction(
    client: QmpClient,
    disks: Sequence[tuple[VmDisk, Base]],
    checkpoint: str,
) -> None:
    """The moment: all disks at once, or none.

    First all filters, then the bitmaps: a filter's disk stands still until the transaction has
    ended, even one with an I/O thread of its own, so that its bitmaps begin and end with it.

    Raises:
        SourceError: nothing was done.
    """
    actions: list[dict[str, Any]] = []

    def add(kind: str, data: dict[str, Any]) -> None:
        actions.append({"type": kind, "data": data})

    for number, (disk, _) in enumerate(disks):
        fleece = f"nbdsrv-{number}"
        backup = {"device": disk.node, "target": fleece, "sync": "none", "job-id": fleece}
        add("blockdev-backup", {**backup, "filter-node-name": f"{fleece}-cbw"})
    for disk, base in disks:
        bitmap: dict[str, Any] = {"node": disk.node, "granularity": GRANULARITY}
        if base.checkpoint:
            since = since_bitmap(base.checkpoint)
            add("block-dirty-bitmap-add", {**bitmap, "name": since, "disabled": True})
            merge = {"node": disk.node, "target": since, "bitmaps": [base.checkpoint]}
            add("block-dirty-bitmap-merge", merge)
        if not disk.read_only:
            new = {**bitmap, "name": checkpoint, "persistent": disk.keeps}
            add("block-dirty-bitmap-add", new)
    try:
        await client.execute("transaction", {"actions": actions}, timeout_s=FREEZE_S)
    except QmpRefused as error:
        if "by block job" not in error.description:
            raise
        hint = "wait for its end; `nbdsrv migrate --cancel` ends what a killed move has left"
        raise SourceError(f"{error}; {hint}") from error


async def export(client: QmpClient, number: int, disk: VmDisk, base: Base) -> None:
    """Serve the disk as it was, under its name.

    Raises:
        SourceError: it could not.
    """
    node = f"nbdsrv-{number}"
    served: dict[str, Any] = {"type": "nbd", "id": node, "node-name": node, "name": disk.name}
    # Found below the fleece, in its backing chain.
    if base.checkpoint:
        served["bitmaps"] = [since_bitmap(base.checkpoint)]
    await client.execute("block-export-add", {**served, "writable": False})


# --- taking it away --------------------------------------------------------------------------


async def swept(client: QmpClient) -> list[str]:
    """Remove all that a backup adds but its checkpoints.

    Returns:
        What was removed, one line each.

    Raises:
        SourceError: something could not be removed, for instance because QEMU is gone.
    """
    removed = []
    for export_id in await _exports(client):
        await remove_export(client, export_id)
        removed.append(f"export {export_id}")
    removed += await _end_our_jobs(client)
    for node in await _our_nodes(client):
        await client.execute("blockdev-del", {"node-name": node})
        removed.append(f"node {node}")
    for node, description in (await named_nodes(client)).items():
        for bitmap in description.get("dirty-bitmaps", ()):
            name = str(bitmap.get("name", ""))
            if name.startswith(_SINCE):
                await client.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
                removed.append(f"bitmap {name} of {node}")
    return removed


async def _exports(client: QmpClient) -> list[str]:
    found = [str(each["id"]) for each in await client.execute("query-block-exports")]
    return [each for each in found if _OURS.fullmatch(each)]


async def remove_export(client: QmpClient, export_id: str) -> None:
    """End an export at once, whoever is reading.

    Raises:
        SourceError: it does not end.
    """
    with _absent():
        await client.execute("block-export-del", {"id": export_id, "mode": "hard"})

    async def gone() -> bool:
        return export_id not in await _exports(client)

    await client.until(gone, f"the end of export {export_id}")


async def _end_our_jobs(client: QmpClient) -> list[str]:
    ended = []
    for job in await jobs(client):
        # One that makes a file ends by itself, in no time, and waits to be dismissed.
        with _absent():
            await client.execute("job-cancel", {"id": job})
        ended.append(f"job {job}")

    async def gone() -> bool:
        left = await jobs(client)
        for job, status in left.items():
            if status == "concluded":
                with _absent():
                    await client.execute("job-dismiss", {"id": job})
        return not left

    await client.until(gone, "the end of our jobs")
    return ended


async def jobs(client: QmpClient) -> dict[str, str]:
    """Our jobs, and the state of each.

    Raises:
        SourceError: QEMU is gone.
    """
    found = await client.execute("query-jobs")
    return {str(e["id"]): str(e["status"]) for e in found if _OURS.fullmatch(str(e["id"]))}


async def named_nodes(client: QmpClient) -> dict[str, dict[str, Any]]:
    """QEMU's block graph, by name of the node.

    Raises:
        SourceError: QEMU is gone.
    """
    found = await client.execute("query-named-block-nodes", {"flat": True})
    return {str(each["node-name"]): each for each in found}


async def _our_nodes(client: QmpClient) -> list[str]:
    """The fleeces, then their files; filters go with their jobs."""
    matches = [match for match in map(_OURS.fullmatch, await named_nodes(client)) if match]
    fleeces = [match[0] for match in matches if match[1] is None]
    return fleeces + [match[0] for match in matches if match[1] == "-file"]


async def our_files(client: QmpClient) -> list[str]:
    """One file of each directory that fleeces are in, as QEMU names them.

    Raises:
        SourceError: QEMU is gone.
    """
    files = [
        str(description["image"]["filename"])
        for name, description in (await named_nodes(client)).items()
        if (match := _OURS.fullmatch(name)) and match[1] == "-file"
    ]
    return list({os.path.dirname(file): file for file in files}.values())


async def remove_bitmap(client: QmpClient, node: str, name: str) -> bool:
    """Remove a bitmap if it is there; was it?

    Raises:
        SourceError: QEMU is gone.
    """
    try:
        await client.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
    except QmpRefused:
        return False
    return True


@contextlib.contextmanager
def _absent() -> Any:
    """What is to be ended has ended by itself."""
    with contextlib.suppress(QmpRefused):
        yield


async def listens(path: str) -> bool:
    """Does anybody listen at a Unix socket?"""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
