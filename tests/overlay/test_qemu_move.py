"""``nbdsrv migrate`` with a real QEMU whose disk is an export of ours, while it is written to.

The machine has no guest: writes come through its devices by the monitor, and the log of them over
the base's content is what TARGET must hold in the end.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.formats.locked import relied_on
from tests.overlay.bases import make_base
from tests.overlay.server import nbdsrv, nbdsrv_json, start_server
from tests.source.peers import need
from tests.source.virtual_machine import MIB, Machine, machine

SIZE = 24 * MIB
PATIENCE_S = 60


class Restored:
    """A VM that runs off an overlay of ours, and what its disk must hold."""

    def __init__(self, vm: Machine, folder: Path, content: bytes) -> None:
        self.vm = vm
        self.folder = folder
        self.content = bytearray(content)
        self.source = f"qemu:{vm.monitor}#vda"
        self.chance = random.Random(7)

    async def write(self) -> None:
        length = self.chance.choice((512, 4096, 65536))
        offset = self.chance.randrange(0, SIZE - length, 512)
        pattern = self.chance.randrange(1, 256)
        await self.vm.write("vda", offset, length, pattern)
        self.content[offset : offset + length] = bytes([pattern]) * length

    async def migrate(self, *words: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nbdsrv", "migrate", self.source, *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def jobs(self) -> list[dict]:
        return await self.vm.test.execute("query-jobs")

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not await condition():
                await asyncio.sleep(0.02)

    async def begun(self) -> bool:
        """Has a job gone through something, and not all?"""
        return any(0 < job["current-progress"] < job["total-progress"] for job in await self.jobs())

    async def disk_file(self) -> str:
        (device,) = await self.vm.test.execute("query-block")
        return str(device["inserted"]["file"])


@asynccontextmanager
async def restored(folder: Path, *, chain: bool = False) -> AsyncIterator[Restored]:
    """A VM on an overlay; with ``chain``, on a qcow2 above the export."""
    need("qemu-system-x86_64")
    content = make_base(folder / "base.raw", SIZE)
    socket = folder / "s"
    server = start_server(socket, str(folder / "base.raw"), "--overlay", str(folder / "ov"))
    export = f"file.driver=nbd,file.server.type=unix,file.server.path={socket}"
    node = f"driver=raw,node-name=ours,{export}"
    more = ["-blockdev", node]
    top = "ours"
    if chain:
        top = "top"
        image = folder / "top.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(SIZE)]
        subprocess.run(create, check=True)
        above = f"driver=qcow2,node-name=top,file.driver=file,file.filename={image},backing=ours"
        more += ["-blockdev", above]
    more += ["-device", f"virtio-blk-pci,drive={top},id=vda"]
    try:
        async with machine(folder, (), *more) as vm:
            yield Restored(vm, folder, content)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(PATIENCE_S)
        server.communicate()
    assert code == 0


def held(image: Path) -> bytes:
    """What a qcow2 holds, by qemu-img; QEMU may have it open."""
    raw = image.with_suffix(".converted")
    subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", str(image), str(raw)], check=True)
    return raw.read_bytes()


async def written_during(vm: Restored, process: asyncio.subprocess.Process) -> int:
    """Writes until the process has ended; how many."""
    count = 0
    while process.returncode is None:
        await vm.write()
        count += 1
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 0.005)
    return count


async def test_a_vm_moves_while_it_writes_and_lets_the_export_go(tmp_path: Path) -> None:
    async with restored(tmp_path) as vm:
        for _ in range(30):
            await vm.write()
        target = tmp_path / "final.qcow2"
        process = await vm.migrate(str(target), "--rate", "16M", "--json")
        count = await written_during(vm, process)
        out, err = await process.communicate()
        assert process.returncode == 0, err
        report = json.loads(out)
        assert report["mode"] == "mirror"
        assert report["nodes_kept"] == []
        assert not report["resumed"]
        assert count > 5
        for _ in range(30):
            await vm.write()
        assert str(target) in await vm.disk_file()
        assert await vm.jobs() == []
        # Nothing of QEMU's holds the export any more.
        await vm.until(lambda: _free(tmp_path))
        await vm.vm.io("vda", "flush")
        assert held(target) == bytes(vm.content)


async def _free(folder: Path) -> bool:
    rows = await asyncio.to_thread(nbdsrv_json, "overlay", "ls", str(folder / "ov"))
    return not rows[0]["in_use"]


async def test_a_signal_leaves_the_vm_where_it_was(tmp_path: Path) -> None:
    async with restored(tmp_path) as vm:
        target = tmp_path / "final.raw"
        process = await vm.migrate(str(target), "--rate", "4M")
        await vm.until(vm.begun)
        process.send_signal(signal.SIGTERM)
        _, err = await process.communicate()
        assert process.returncode == 128 + signal.SIGTERM
        assert err.decode().count("\n") == 1
        assert "stopped by SIGTERM: the VM goes on where it was" in err.decode()
        assert not target.exists()
        assert await vm.jobs() == []
        nodes = await vm.vm.test.execute("query-named-block-nodes", {"flat": True})
        assert [node["node-name"] for node in nodes if "moved" in node["node-name"]] == []
        await vm.write()
        assert "nbd" in await vm.disk_file()


async def test_what_a_killed_run_has_left_is_finished_or_cancelled(tmp_path: Path) -> None:
    async with restored(tmp_path) as vm:
        target = tmp_path / "final.qcow2"
        process = await vm.migrate(str(target), "--rate", "8M")
        await vm.until(vm.begun)
        process.kill()
        await process.wait()
        other = str(tmp_path / "other.qcow2")
        said = await asyncio.to_thread(nbdsrv, "migrate", vm.source, other, code=1)
        assert "is being moved elsewhere already" in said
        assert not os.path.exists(other)
        said = await asyncio.to_thread(nbdsrv, "migrate", vm.source, "--cancel")
        assert said == "cancelled; the VM is on its old disk\n"
        assert await vm.jobs() == []
        process = await vm.migrate(str(target), "--rate", "8M", "--force")
        await vm.until(vm.begun)
        process.kill()
        await process.wait()
        await vm.write()
        words = ("migrate", vm.source, str(target), "--force")
        report = await asyncio.to_thread(nbdsrv_json, *words)
        assert report["resumed"]
        await vm.write()
        await vm.vm.io("vda", "flush")
        assert held(target) == bytes(vm.content)


async def test_an_image_above_the_export_is_filled_up(tmp_path: Path) -> None:
    async with restored(tmp_path, chain=True) as vm:
        for _ in range(20):
            await vm.write()
        process = await vm.migrate("--rate", "32M", "--json")
        await written_during(vm, process)
        out, err = await process.communicate()
        assert process.returncode == 0, err
        report = json.loads(out)
        assert report["mode"] == "stream"
        assert report["nodes_kept"] == []
        await vm.until(lambda: _nothing_in(tmp_path))
        await vm.write()
        await vm.vm.io("vda", "flush")
        assert held(tmp_path / "top.qcow2") == bytes(vm.content)


async def _nothing_in(folder: Path) -> bool:
    """Nobody wrote to the export, so that its overlay goes with the last client."""
    return all(path.name == ".traces" for path in (folder / "ov").iterdir())


async def test_a_disk_that_is_too_small_fails_and_changes_nothing(tmp_path: Path) -> None:
    async with restored(tmp_path) as vm:
        missing = tmp_path / "not" / "there.qcow2"
        said = await asyncio.to_thread(nbdsrv, "migrate", vm.source, str(missing), code=2)
        assert "there is no directory" in said
        full = "/dev/full"  # a file that takes nothing: as a disk that is full
        target = tmp_path / "t.raw"
        target.symlink_to(full)
        words = ("migrate", vm.source, str(target), "--force")
        said = await asyncio.to_thread(nbdsrv, *words, code=1)
        assert said.count("\n") == 1
        assert await vm.jobs() == []
        await vm.write()
        assert "nbd" in await vm.disk_file()


async def test_the_image_of_another_machine_is_left_alone(tmp_path: Path) -> None:
    async with restored(tmp_path) as vm:
        target = tmp_path / "other.raw"
        target.write_bytes(b"precious")
        words = ("migrate", vm.source, str(target), "--force")
        with relied_on(target):
            said = await asyncio.to_thread(nbdsrv, *words, code=1)
        assert "other.raw: another program has it open" in said
        assert said.count("\n") == 1
        assert target.read_bytes() == b"precious"
        assert "nbd" in await vm.disk_file()


async def test_and_so_is_what_qemu_refuses_to_make_anew(tmp_path: Path) -> None:
    async with restored(tmp_path) as vm:
        target = tmp_path / "directory"
        target.mkdir()
        link = tmp_path / "link.raw"
        link.symlink_to(target)
        words = ("migrate", vm.source, str(link), "--force")
        said = await asyncio.to_thread(nbdsrv, *words, code=1)
        assert said.count("\n") == 1
        assert link.is_symlink()


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (("disk.raw", "x.qcow2"), "expected qemu:SOCKET#DISK"),
        (("libvirt:qemu:///system#a/vda", "x.qcow2"), "virsh blockcopy"),
        (("qemu:/run/no.sock#vda", "x.vhd"), "a VM runs off qcow2 or raw"),
        (("qemu:/run/no.sock#vda", "nbd://host/x"), "a file or a block device"),
        (("qemu:/run/no.sock#vda", "x.qcow2", "--cancel"), "leave TARGET out"),
        (("qemu:/run/no.sock#vda", "--force"), "there is none"),
        (("qemu:/run/no.sock#vda", "/etc/passwd", "--to", "raw"), "is there already"),
    ],
)
def test_bad_use_is_told_in_a_line(words: tuple[str, ...], saying: str) -> None:
    said = nbdsrv("migrate", *words, code=2)
    assert said.count("\n") == 1
    assert saying in said


def test_no_vm_is_told_in_a_line(tmp_path: Path) -> None:
    said = nbdsrv("migrate", f"qemu:{tmp_path}/no.sock#vda", str(tmp_path / "x.raw"), code=1)
    assert said.count("\n") == 1
    assert "is the VM running" in said
