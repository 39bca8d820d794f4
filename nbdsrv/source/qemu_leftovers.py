"""What a killed backup has left: found by name, in the guest, in QEMU, and on the disk.

::

    frozen                       the guest may stand still: thawed first
    exports, jobs, nodes, since-bitmaps                    nbdsrv-...: qemu_graph.swept
    our NBD server                                         if nobody else has begun to use it
    N.qcow2, nbd.sock                                      of the private directory

Checkpoints are not leftovers: one that no repository has come to know records as well as any, until
its turn comes to be removed as the oldest of too many.
"""

import logging

from nbdsrv.disk.workers import Workers
from nbdsrv.source.qemu_address import AGENT_OFF, QemuAddress
from nbdsrv.source.qemu_agent import GuestAgent, agent_socket
from nbdsrv.source.qemu_graph import listens, swept
from nbdsrv.source.qemu_scratch import Scratch
from nbdsrv.source.qemu_server import stop_server
from nbdsrv.source.qmp import QmpClient

__all__ = ["find_agent", "sweep", "sweep_files"]

log = logging.getLogger(__name__)


async def sweep(
    client: QmpClient, scratch: Scratch, address: QemuAddress, workers: Workers
) -> list[str]:
    """Remove it all; the private directory is locked.

    Returns:
        What was removed, one line each.

    Raises:
        SourceError: something cannot be removed.
    """
    removed = []
    if await workers.look_up(scratch.is_marked):
        if agent := await find_agent(client, address):
            await agent.thaw()
        await workers.look_up(scratch.mark_thawed)
        removed.append("freeze of the guest's file systems")
    removed += await swept(client)
    if await stop_server(client, scratch):
        removed.append(f"NBD server at {scratch.socket}")
    removed += await sweep_files(scratch, workers)
    for line in removed:
        log.info("qemu.swept vm=%s removed=%s", client.name, line)
    return removed


async def sweep_files(scratch: Scratch, workers: Workers) -> list[str]:
    """Remove the files in the private directory; their paths."""
    removed = await workers.look_up(scratch.sweep)
    # Who listens there still is a QEMU that others use too, or that could not be tidied up.
    if not await listens(scratch.socket):
        removed += await workers.look_up(scratch.sweep_socket)
    return removed


async def find_agent(client: QmpClient, address: QemuAddress) -> GuestAgent | None:
    """The guest agent: as was said, or as QEMU says.

    Raises:
        SourceError: QEMU is gone.
    """
    if address.agent == AGENT_OFF:
        return None
    path = address.agent or await agent_socket(client)
    return GuestAgent(path) if path else None
