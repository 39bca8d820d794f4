"""A simulated pool for the tests, and what they do with it again and again."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from conformance.xapi.simulator import Simulator
from nbdsrv.disk.workers import Workers
from nbdsrv.source.cbt import CONTEXT
from nbdsrv.source.hypervisor import FrozenDisk
from nbdsrv.source.xapi import XapiFrozen, XapiVm
from nbdsrv.source.xapi_place import access_of, parse_place

SIZE = (5 << 20) + 3 * 65536 + 512
"""No multiple of 2 MiB, nor of 64 KiB."""


@contextmanager
def pool(path: Path, hosts: int = 1, **more: bool) -> Iterator[Simulator]:
    """A pool without VMs."""
    with Simulator(path / "x", hosts=hosts, **more) as simulator:
        yield simulator


def add_vm(simulator: Simulator, *disks: str, cbt: bool = True, size: int = SIZE) -> list[str]:
    """The VM ``web`` with disks of these names; their uuids."""
    made = [{"name": name, "size": size, "cbt": cbt} for name in disks]
    return list(simulator.do("vm", name="web", disks=made)["vdis"])


def vm_of(simulator: Simulator, workers: Workers, host: int = 0, vm: str = "web") -> XapiVm:
    """Our side."""
    place = parse_place(f"xapi://root@{simulator.addresses[host]}:{simulator.port}#{vm}")
    return XapiVm(place, access_of(simulator.environment), workers)


async def read_all(disk: FrozenDisk, workers: Workers) -> tuple[bytes, list[tuple[int, int]]]:
    """The bytes, and the ranges that are said to have changed."""
    assert disk.open is not None
    async with disk.open(workers, ()) as opened:
        found = bytearray(opened.size)
        await opened.read_into(0, memoryview(found))
        changed = []
        if disk.context:
            at = 0
            while at < opened.size:
                extents = await opened.status(CONTEXT, at, opened.size - at)
                changed += [(start, span) for start, span, flag in extents.ranges() if flag]
                at = extents.end
        return bytes(found), changed


class Copy:
    """A repository in a nutshell: whole at first, then only what is said to have changed."""

    def __init__(self) -> None:
        self.content = b""
        self.checkpoints: list[str] = []

    async def take(
        self, vm: XapiVm, workers: Workers, disk: str = "xvda", known: Sequence[str] | None = None
    ) -> FrozenDisk:
        """One backup."""
        chosen = self.checkpoints if known is None else known
        async with frozen_at(vm, {disk: list(chosen)}, [disk]) as frozen:
            (found,) = frozen.disks
            content, changed = await read_all(found, workers)
            if found.context:
                merged = bytearray(self.content)
                for at, span in changed:
                    merged[at : at + span] = content[at : at + span]
                content = bytes(merged)
            self.content = content
            if found.checkpoint:
                self.checkpoints.insert(0, found.checkpoint)
            await frozen.succeed()
        return found


@asynccontextmanager
async def frozen_at(
    vm: XapiVm, known: dict[str, list[str]], disks: Sequence[str] = ()
) -> AsyncIterator[XapiFrozen]:
    """``freeze``, with its type."""
    async with vm.freeze(known, disks) as frozen:
        assert isinstance(frozen, XapiFrozen)
        yield frozen
