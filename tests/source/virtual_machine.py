"""A VM on a real QEMU whose disks are written to through their devices, and what they must hold.

::

    Machine ── ours.sock   the monitor that is under test
            └─ test.sock   another one: human-monitor-command 'qemu-io -d /machine/... "write ..."'
    Writer  a log of all writes, in the order QEMU did them: any moment can be played back
"""

import asyncio
import random
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.qmp import QmpClient, open_qmp
from tests.source.peers import need

MIB = 1 << 20
BLOCK = 1 << 16


@dataclass(frozen=True)
class Drive:
    """A disk of the machine."""

    name: str
    size: int
    format: str = "qcow2"
    compat: str = "1.1"
    iothread: bool = False


@dataclass
class Machine:
    """A running one."""

    process: subprocess.Popen[bytes]
    folder: Path
    drives: Sequence[Drive]
    test: QmpClient
    writes: list[tuple[str, int, int, int]] = field(default_factory=list)

    @property
    def monitor(self) -> str:
        return str(self.folder / "ours.sock")

    async def write(self, drive: str, offset: int, length: int, pattern: int) -> None:
        """A write of the guest's. The log has it before it is done."""
        self.writes.append((drive, offset, length, pattern))
        how = f"write -P {pattern} {offset} {length}" if pattern else f"write -z {offset} {length}"
        await self.io(drive, how)

    async def io(self, drive: str, how: str) -> None:
        line = f'qemu-io -d /machine/peripheral/{drive}/virtio-backend "{how}"'
        said = await self.test.execute("human-monitor-command", {"command-line": line})
        assert not said, said

    async def write_some(self, chance: random.Random, count: int) -> None:
        for _ in range(count):
            drive = chance.choice(self.drives)
            length = chance.choice((512, 4096, 65536, 70000 // 512 * 512, 300 * 1024))
            offset = chance.randrange(0, drive.size - length, 512)
            pattern = chance.choice((0, chance.randrange(1, 256), chance.randrange(1, 256)))
            await self.write(drive.name, offset, length, pattern)

    def at(self, moment: int) -> dict[str, bytearray]:
        """What the disks hold after so many writes."""
        held = {drive.name: bytearray(drive.size) for drive in self.drives}
        for drive, offset, length, pattern in self.writes[:moment]:
            held[drive][offset : offset + length] = bytes([pattern]) * length
        return held

    def changed(self, drive: str, since: int, until: int) -> set[int]:
        """Numbers of the 64 KiB blocks written to."""
        found: set[int] = set()
        for name, offset, length, _ in self.writes[since:until]:
            if name == drive:
                found.update(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))
        return found

    def bitmaps(self, nodes: Sequence[dict]) -> dict[str, list[str]]:
        return {
            node["node-name"]: sorted(each["name"] for each in node["dirty-bitmaps"])
            for node in nodes
            if node.get("dirty-bitmaps")
        }

    async def left(self) -> list[str]:
        """Whatever a backup could have left but checkpoints."""
        nodes = await self.test.execute("query-named-block-nodes", {"flat": True})
        names = [each["node-name"] for each in nodes]
        names += [each["id"] for each in await self.test.execute("query-jobs")]
        names += [each["id"] for each in await self.test.execute("query-block-exports")]
        names = [each for each in names if each.startswith("nbdsrv")]
        for bitmaps in self.bitmaps(nodes).values():
            names += [each for each in bitmaps if each.startswith("nbdsrv-since")]
        return names

    async def checkpoints(self) -> dict[str, list[str]]:
        nodes = await self.test.execute("query-named-block-nodes", {"flat": True})
        return self.bitmaps(nodes)


@asynccontextmanager
async def machine(
    folder: Path, drives: Sequence[Drive], *more: str, keep: bool = False
) -> AsyncIterator[Machine]:
    """QEMU without a guest: its devices are there, and the tests write through them."""
    need("qemu-system-x86_64")
    command = ["qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-nodefaults", "-S"]
    command += ["-display", "none", "-m", "64", "-name", "vm1"]
    for name in ("ours", "test"):
        (folder / f"{name}.sock").unlink(missing_ok=True)
        command += ["-qmp", f"unix:{folder / name}.sock,server=on,wait=off"]
    for drive in drives:
        path = folder / f"{drive.name}.{drive.format}"
        if not path.exists():
            options = ["-o", f"compat={drive.compat}"] if drive.format == "qcow2" else []
            create = ["qemu-img", "create", "-q", "-f", drive.format, *options]
            subprocess.run([*create, str(path), str(drive.size)], check=True)
        node = f"driver={drive.format},node-name={drive.name}-node"
        command += ["-blockdev", f"{node},file.driver=file,file.filename={path}"]
        device = f"virtio-blk-pci,drive={drive.name}-node,id={drive.name}"
        if drive.iothread:
            command += ["-object", f"iothread,id={drive.name}-thread"]
            device += f",iothread={drive.name}-thread"
        command += ["-device", device]
    command += more
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        test = await _monitor(folder / "test.sock", process)
        try:
            yield Machine(process, folder, drives, test)
            if process.poll() is None:
                await test.execute("quit")
        finally:
            await test.close()
        if not keep:
            await asyncio.to_thread(process.wait, 20)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


async def _monitor(path: Path, process: subprocess.Popen[bytes]) -> QmpClient:
    for _ in range(400):
        with suppress(SourceError):
            return await open_qmp("test", path=str(path))
        if process.poll() is not None:
            assert process.stderr is not None
            raise AssertionError(process.stderr.read().decode())
        await asyncio.sleep(0.02)
    raise AssertionError("QEMU does not start")
