"""What a killed backup has left: found by name, in the guest, in QEMU, and on the disk.

::

    frozen                       the guest may stand still: thawed first
    exports, jobs, nodes, since-bitmaps                    nbdsrv-...: qemu_graph.swept
    our NBD server                                         if nobody else has begun to use it
    N.qcow2, nbd.sock                                      of the private directory

QEMU's nodes tell of the private directory of a run that had another one, as it was told another
``?scratch=`` or came by another monitor. If that run is still at work, its lock says so.

Checkpoints are not leftovers: one that no repository has come to know records as well as any, until
its turn comes to be removed as the oldest of too many.
"""

import contextlib
import logging
from collections.abc import AsyncIterator

from nbdsrv.disk.insist import insist
from nbdsrv.disk.workers import Workers
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.qemu_address import AGENT_OFF, QemuAddress
from nbdsrv.source.qemu_agent import GuestAgent, agent_socket
from nbdsrv.source.qemu_graph import listens, our_files, swept
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
        SourceError: something cannot be removed, or belongs to a backup that is running.
    """
    removed = []
    async with _all_directories(client, scratch, workers) as directories:
        for each in directories:
            if await workers.look_up(each.is_marked) and await _thawed(
                client, each, address, workers
            ):
                await workers.look_up(each.mark_thawed)
                removed.append("freeze of the guest's file systems")
        removed += await swept(client)
        for each in directories:
            if await stop_server(client, each):
                removed.append(f"NBD server at {each.socket}")
            removed += await sweep_files(each, workers)
    for line in removed:
        log.info("qemu.swept vm=%s removed=%s", client.name, line)
    return removed


async def _thawed(
    client: QmpClient, scratch: Scratch, address: QemuAddress, workers: Workers
) -> bool:
    """By the agent that may have frozen them, whatever is said about an agent now.

    Returns:
        False if that one does not answer, and no agent is wanted for this backup.

    Raises:
        SourceError: the guest may still be frozen.
    """
    path = await workers.look_up(scratch.frozen_by)
    agent = GuestAgent(path) if path else await find_agent(client, address)
    try:
        if agent is not None:
            await agent.thaw()
    except SourceError as error:
        if address.agent != AGENT_OFF:
            raise
        log.warning("qemu.not_thawed vm=%s reason=%s", client.name, error)
        return False
    return True


@contextlib.asynccontextmanager
async def _all_directories(
    client: QmpClient, scratch: Scratch, workers: Workers
) -> AsyncIterator[list[Scratch]]:
    """This run's, and those that QEMU has files of ours in; all locked."""
    directories = [scratch]
    try:
        for file in await our_files(client):
            other = await workers.look_up(scratch.beside, file)
            if other is not None:
                directories.append(other)
        yield directories
    finally:
        for each in directories[1:]:
            await insist(workers.look_up(each.close))


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
