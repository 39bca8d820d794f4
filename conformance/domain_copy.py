"""One backup of a domain into plain files, by nbdsrv's ``libvirt:`` source alone; a process.

::

    python -m conformance.domain_copy LOCATION DOMAIN DIRECTORY
        stdout  {"frozen": {"vda": {"mode", "reason", "checkpoint"}, ...}}
        stdin   go                        the test has changed the disks meanwhile
        stdout  {"read": {"vda": bytes read}}
        stdin   succeed | leave
        stdout  {"done": ...}

DIRECTORY has an image of each disk at each checkpoint, and known.json: which there are. Between
these steps, and in them, it can be killed.
"""

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from nbdsrv.cli.running import running_workers
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import NbdsrvError
from nbdsrv.source.hypervisor import FrozenDisk
from nbdsrv.source.libvirt import LibvirtDomain
from nbdsrv.source.opening import open_frozen

PIECE = 1 << 20


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def _hear() -> str:
    line: str = await asyncio.to_thread(sys.stdin.readline)
    return line.strip()


async def _changed(disk: Disk, context: str) -> list[tuple[int, int]]:
    found, offset = [], 0
    while offset < disk.size:
        extents = await disk.status(context, offset, disk.size - offset)
        found += [(at, length) for at, length, flags in extents.ranges() if flags]
        offset = extents.end
    return found


async def _copy(frozen: FrozenDisk, workers: Workers, home: Path) -> int:
    """The image of a disk at its new checkpoint; bytes read for it."""
    target = home / f"{frozen.name}.{frozen.checkpoint or 'now'}.new"
    if frozen.since:
        shutil.copyfile(home / f"{frozen.name}.{frozen.since}", target)
    else:
        target.write_bytes(b"")
    async with open_frozen(frozen, workers) as disk:
        ranges = [(0, disk.size)]
        if frozen.since:
            ranges = await _changed(disk, frozen.context)
        with target.open("r+b") as file:
            file.truncate(disk.size)
            for start, length in ranges:
                for offset in range(start, start + length, PIECE):
                    buffer = bytearray(min(PIECE, start + length - offset))
                    await disk.read_into(offset, memoryview(buffer))
                    file.seek(offset)
                    file.write(buffer)
    return sum(length for _, length in ranges)


def _commit(home: Path, disks: list[FrozenDisk], known: dict[str, list[str]]) -> None:
    for disk in disks:
        point = disk.checkpoint or "now"
        (home / f"{disk.name}.{point}.new").rename(home / f"{disk.name}.{point}")
        shutil.copyfile(home / f"{disk.name}.{point}", home / f"{disk.name}.latest")
        if disk.checkpoint:
            known.setdefault(disk.name, []).insert(0, disk.checkpoint)
    (home / "known.new").write_text(json.dumps(known))
    (home / "known.new").rename(home / "known.json")


async def _main(location: str, domain: str, directory: str) -> None:
    home = Path(directory)
    home.mkdir(exist_ok=True)
    known: dict[str, list[str]] = {}
    if (home / "known.json").exists():
        known = json.loads((home / "known.json").read_text())
    async with running_workers() as workers:
        source = LibvirtDomain(location, domain, workers)
        async with source.freeze(known) as frozen:
            disks = list(frozen.disks)
            _say(
                frozen={
                    disk.name: {
                        "mode": "incremental" if disk.since else "full",
                        "since": disk.since,
                        "reason": disk.reason,
                        "checkpoint": disk.checkpoint,
                    }
                    for disk in disks
                },
                consistency=frozen.consistency,
            )
            end = await _hear()
            if end == "go":
                _say(read={disk.name: await _copy(disk, workers, home) for disk in disks})
                end = await _hear()
            await frozen.still_frozen()
            if end == "succeed":
                _commit(home, disks, known)
                _say(committed=True)
                await frozen.succeed()
    _say(done=True)


if __name__ == "__main__":
    try:
        asyncio.run(_main(*sys.argv[1:4]))
    except NbdsrvError as error:
        print(f"nbdsrv: {error}", file=sys.stderr)
        os._exit(1)  # a thread may still wait for stdin
    os._exit(0)
