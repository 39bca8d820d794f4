"""What a backup of a domain leaves when it does not live to clean up, and how it is removed.

::

    job of somebody else ───────────> refused, untouched
    job of ours, its process lives ─> refused
    job of ours, its process dead ──> ended; libvirt removes its scratch files

    directory of a dead process ──┬─> the guest thawed, if it was left frozen
                                  ├─> scratch files and socket removed
                                  └─> its checkpoint: no repository has a point of it? deleted
                                      nobody has said? kept, and the directory as a note of it

Rule: a checkpoint that a repository may have a point of stays. Until its backup is confirmed or
refuted it costs a bitmap and nothing else.
"""

import asyncio
import logging
from collections.abc import Collection
from pathlib import Path

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.libvirt_address import DEFAULT_SCRATCH, LibvirtAddress
from nbdsrv.source.libvirt_checkpoints import PREFIX, token_of
from nbdsrv.source.libvirt_line import Refused
from nbdsrv.source.libvirt_link import Link
from nbdsrv.source.libvirt_workplace import Workplace, abandoned, base_of, is_occupied
from nbdsrv.source.libvirt_xml import Domain, job_paths

__all__ = ["base_directory", "end_job", "job_token", "remove_remains"]

log = logging.getLogger(__name__)

END_S = 60.0
"""For a job to end: QEMU closes the connections and drains what is being written."""
PAUSE_S = 0.05


def base_directory(address: LibvirtAddress) -> str:
    """Where directories are made on this host."""
    return DEFAULT_SCRATCH if address.remote else address.scratch


async def remove_remains(
    link: Link, address: LibvirtAddress, domain: Domain, known: Collection[str]
) -> list[str]:
    """Remove what dead processes left of backups of a domain.

    Args:
        link: to the domain.
        address: of it.
        domain: as it is now.
        known: the checkpoints that repositories have points of; without any, nobody has said.

    Returns:
        What was removed, one line each.

    Raises:
        SourceError: another backup of the domain is running, or something cannot be removed.
    """
    removed = await _end_dead_job(link, address, domain)
    with abandoned(base_directory(address), domain.uuid) as places:
        for place in places:
            removed += await _remove(link, place, known)
    for line in removed:
        log.warning("libvirt.remains removed=%s", line)
    return removed


async def _end_dead_job(link: Link, address: LibvirtAddress, domain: Domain) -> list[str]:
    job = await link.job()
    if job is None:
        return []
    paths = job_paths(job)
    token = next((token for path in paths if (token := token_of(path))), None)
    ending = f"end it by `virsh -c {address.uri} domjobabort {domain.name}`"
    if token is None:
        where = f" (with {paths[0]})" if paths else ""
        text = f"somebody else's backup of {domain.name} is running{where}"
        raise SourceError(f"{text}: wait for it, or {ending}")
    bases = {base_directory(address), *filter(None, map(base_of, paths))}
    if any(is_occupied(base, token) for base in bases):
        raise SourceError(f"another nbdsrv is backing {domain.name} up: wait for it")
    if address.remote and not (Path(DEFAULT_SCRATCH) / f"nbdsrv-libvirt-{token}").is_dir():
        text = f"a backup of {domain.name} that was begun on another host is running"
        raise SourceError(f"{text}: wait for it, or {ending}")
    await end_job(link, token)
    return [f"backup job of {domain.name}, of a process that has died"]


async def _remove(link: Link, place: Workplace, known: Collection[str]) -> list[str]:
    removed = []
    if place.is_frozen:
        try:
            count = await link.thaw_guest() if await link.is_running() else 0
        except Refused as error:  # the note stays: the next backup tries again
            log.warning("libvirt.not_thawed path=%s reason=%s", place.path, error)
            return []
        place.note_thawed()
        removed.append(f"freeze of {count} file systems in the guest")
    if not place.is_empty:
        place.clear()
        removed.append(f"{place.path}: socket and scratch files")
    name = PREFIX + place.token
    if name in known:
        place.remove()  # committed, but killed before it was said: confirmed by that
    elif known:
        if await link.delete_checkpoint(name):
            removed.append(f"checkpoint {name}, which no repository has a point of")
        place.remove()
    return removed


async def job_token(link: Link) -> str | None:
    """Which backup of ours is running, if any."""
    job = await link.job()
    if job is None:
        return None
    return next((token for path in job_paths(job) if (token := token_of(path))), None)


async def end_job(link: Link, token: str) -> None:
    """End the backup job of that token, and wait until it has ended; nothing if it is not running.

    Raises:
        SourceError: it has not ended in time.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + END_S
    told = False
    while await job_token(link) == token:
        if not told:
            await link.abort()
            told = True
        elif loop.time() > deadline:
            raise SourceError(f"the backup job has not ended within {END_S:g} s of being told to")
        await asyncio.sleep(PAUSE_S)
