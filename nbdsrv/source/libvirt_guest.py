"""Freezing the guest's file systems around the moment that its disks are frozen at.

::

    note "frozen" ── agent: fsfreeze ── [ the backup job begins ] ── agent: thaw ── note removed
         |                                                              |
         killed in here: the next backup finds the note, and thaws      whatever happened in between

A guest with frozen file systems stands still as soon as it writes: thawing has to happen.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.libvirt_line import Refused
from nbdsrv.source.libvirt_link import Link
from nbdsrv.source.libvirt_workplace import Workplace
from nbdsrv.source.libvirt_xml import Domain

__all__ = ["frozen_guest"]

log = logging.getLogger(__name__)

THAW_ATTEMPTS = 3


@asynccontextmanager
async def frozen_guest(
    link: Link, place: Workplace, domain: Domain, agent: str
) -> AsyncIterator[str]:
    """Keep the guest's file systems frozen in the block, if there is an agent to do it.

    Args:
        link: to the domain.
        place: where it is noted.
        domain: as it is now.
        agent: ``auto``, ``off`` or ``needed``.

    Yields:
        ``filesystem``, or ``crash`` where they are not frozen.

    Raises:
        SourceError: they cannot be frozen and must be; or they cannot be thawed.
    """
    if agent == "off" or (agent == "auto" and not domain.agent):
        yield "crash"
        return
    if not domain.agent:
        text = f"{domain.name}: no guest agent answers, and agent=needed"
        raise SourceError(f"{text}: install qemu-guest-agent in the guest, or leave agent= out")
    place.note_frozen()
    try:
        yield await _freeze(link, domain, agent)
    finally:
        await _thaw(link, domain)
        place.note_thawed()


async def _freeze(link: Link, domain: Domain, agent: str) -> str:
    try:
        count = await link.freeze_guest()
    except Refused as error:
        if agent == "needed":
            raise
        log.warning("libvirt.not_frozen vm=%s reason=%s", domain.name, error.words)
        return "crash"
    log.info("libvirt.frozen vm=%s file_systems=%d", domain.name, count)
    return "filesystem" if count else "crash"


async def _thaw(link: Link, domain: Domain) -> None:
    for attempt in range(THAW_ATTEMPTS):
        try:
            await link.thaw_guest()
            return
        except Refused as error:
            if attempt == THAW_ATTEMPTS - 1:
                thaw = f"virsh domfsthaw {domain.name}"
                text = f"{domain.name}: the guest's file systems may be frozen: {error.words}"
                raise SourceError(f"{text}; try `{thaw}`") from error
