"""``nbdsrv backup`` of running VMs as a user types it, on real QEMUs without a guest."""

import asyncio
import json
import random
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import COMMAND, environment, nbdsrv
from tests.source.virtual_machine import MIB, Drive, Machine, machine

DRIVES = (Drive("vda", 3 * MIB), Drive("vdb", MIB, "raw"))


@pytest.fixture
async def vms(tmp_path: Path) -> AsyncIterator[list[Machine]]:
    folders = [tmp_path / name for name in ("web", "db")]
    for folder in folders:
        folder.mkdir()
    async with (
        machine(folders[0], DRIVES, "-name", "web") as web,
        machine(folders[1], DRIVES, "-name", "db") as db,
    ):
        for vm in (web, db):
            await vm.write_some(random.Random(1), 10)
        yield [web, db]


def source(vm: Machine, disk: str = "") -> str:
    return f"qemu:{vm.monitor}?scratch={vm.folder}{disk}"


def made(tmp_path: Path, name: str = "repository") -> str:
    repository = f"repo:{tmp_path / name}"
    assert nbdsrv("init", repository, "--chunk-size", "64K").returncode == 0
    return repository


async def back_up(*words: str, code: int = 0) -> tuple[list[dict[str, Any]], list[str]]:
    done = await asyncio.to_thread(nbdsrv, "backup", *words, "--json")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout), done.stderr.splitlines()


async def restored(repository: str, vm: Machine, group: str, tmp_path: Path) -> None:
    for drive in DRIVES:
        out = tmp_path / "restored.img"
        where = f"{repository}#{group}/{drive.name}@latest"
        done = await asyncio.to_thread(nbdsrv, "restore", where, out, "--force", "--quiet")
        assert (done.returncode, done.stderr) == (0, "")
        assert out.read_bytes() == vm.at(len(vm.writes))[drive.name]


async def test_several_vms_with_several_disks(tmp_path: Path, vms: list[Machine]) -> None:
    repository = made(tmp_path)
    sources = [source(vm) for vm in vms]
    rows, said = await back_up(*sources, "--to", repository, "--jobs", "2", "--rate", "1G/s")
    assert said == []
    found = {(row["group"], row["disk"]): row for row in rows}
    names = [(vm, disk) for vm in ("web", "db") for disk in ("vda", "vdb")]
    assert sorted(found) == sorted(names)
    assert {row["mode"] for row in rows} == {"full"}
    assert len({row["point"] for row in rows}) == 2
    assert {row["repository"] for row in rows} == {repository}

    await vms[0].write("vda", 65536, 4096, 7)
    rows, _ = await back_up(*sources, "--to", repository)
    read = {(row["group"], row["disk"]): (row["mode"], row["read_bytes"]) for row in rows}
    assert read["web", "vda"] == ("incremental", 65536)
    assert read["db", "vda"] == ("incremental", 0)
    for vm, group in zip(vms, ("web", "db"), strict=True):
        await restored(repository, vm, group, tmp_path)
        assert await vm.left() == []


async def test_a_dry_run(tmp_path: Path, vms: list[Machine]) -> None:
    repository, vm = made(tmp_path), vms[0]
    rows, _ = await back_up(source(vm), "--to", repository, "--dry-run")
    assert [row["mode"] for row in rows] == ["full", "full"]
    assert all("no point of 'web' has this disk" in row["reason"] for row in rows)
    rows, _ = await back_up(source(vm), "--to", repository)
    await vm.write("vda", 0, 512, 9)
    before = await vm.checkpoints()
    done = await asyncio.to_thread(nbdsrv, "backup", source(vm), "--to", repository, "--dry-run")
    assert done.returncode == 0
    first, _ = done.stdout.splitlines()
    assert first.startswith(f"{repository}#web/vda: incremental (checkpoint nbdsrv-")
    assert first.endswith("3 MiB, 64 KiB changed")
    assert await vm.checkpoints() == before
    assert await vm.left() == []
    done = await asyncio.to_thread(nbdsrv, "ls", f"{repository}#web", "--json")
    assert done.stdout.count(rows[0]["point"]) >= 1
    assert done.stdout.count('"point"') == 1


async def test_who_fails_fails_alone(tmp_path: Path, vms: list[Machine]) -> None:
    repository, vm = made(tmp_path), vms[0]
    nobody = f"qemu:{tmp_path / 'nobody.sock'}"
    rows, said = await back_up(source(vm), nobody, "--to", repository, code=3)
    assert [row.get("disk") for row in rows] == ["vda", "vdb", None]
    assert rows[2]["source"] == nobody
    assert len(said) == 1
    assert "nobody.sock" in said[0]
    missing = f"repo:{tmp_path / 'missing'}"
    rows, said = await back_up(source(vm), "--to", repository, "--to", missing, code=3)
    assert [row["repository"] for row in rows] == [repository, repository, missing]
    assert {row["mode"] for row in rows[:1]} == {"incremental"}
    assert "no repository there" in said[0]
    _, said = await back_up(nobody, f"{nobody}2", "--to", repository, code=1)
    assert len(said) == 2


async def test_a_repository_that_cannot_be_opened_goes_on_from_its_checkpoint(
    tmp_path: Path, vms: list[Machine]
) -> None:
    """As one that fails in the middle: its disk was not mounted for a few nights."""
    both = [made(tmp_path, name) for name in ("here", "away")]
    words, vm = (source(vms[0]), "--to", both[0], "--to", both[1]), vms[0]
    await back_up(*words)
    (tmp_path / "away").rename(tmp_path / "elsewhere")
    for number in range(2):
        await vm.write("vda", number * 65536, 4096, 7)
        await back_up(*words, code=3)
    (tmp_path / "elsewhere").rename(tmp_path / "away")
    await vm.write("vdb", 0, 4096, 8)
    rows, _ = await back_up(*words)
    assert {row["mode"] for row in rows} == {"incremental"}
    for repository in both:
        await restored(repository, vm, "web", tmp_path)


async def test_disks_that_are_named(tmp_path: Path, vms: list[Machine]) -> None:
    repository, vm = made(tmp_path), vms[0]
    rows, _ = await back_up(source(vm, "#vdb"), "--to", repository, "--group", "one disk")
    assert [(row["group"], row["disk"]) for row in rows] == [("one disk", "vdb")]
    rows, _ = await back_up(source(vm, "#vdb"), source(vm, "#vda"), "--to", repository)
    assert sorted(row["disk"] for row in rows) == ["vda", "vdb"]
    assert len({row["point"] for row in rows}) == 1
    done = await asyncio.to_thread(nbdsrv, "backup", source(vm, "#vdz"), "--to", repository)
    assert done.returncode in {1, 2}
    assert "vdz" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_stopped_by_a_signal(tmp_path: Path, vms: list[Machine], number: int) -> None:
    repository, vm = made(tmp_path), vms[0]
    await back_up(source(vm), "--to", repository)
    before = await vm.checkpoints()
    await vm.write("vda", 0, 2 * MIB, 5)
    words = [*COMMAND, "backup", source(vm), "--to", repository, "--rate", "200K/s"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        # Until it reads: the chunks it stores come after the freeze, and are slow to come.
        while not list(vm.folder.glob("nbdsrv-qemu-*/1.qcow2")):
            assert process.poll() is None
            await asyncio.sleep(0.02)
        process.send_signal(number)
        out, said = await asyncio.to_thread(process.communicate, timeout=20)
    assert (process.returncode, out) == (128 + number, "")
    assert said == f"nbdsrv: stopped by {signal.Signals(number).name}: no restore point was made\n"
    assert await vm.left() == []
    assert await vm.checkpoints() == before
    rows, said_then = await back_up(source(vm), "--to", repository)
    assert said_then == []
    assert {row["mode"] for row in rows} == {"incremental"}
    await restored(repository, vm, "web", tmp_path)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM] * 2, [signal.SIGINT], [signal.SIGHUP, 15]])
async def test_a_server_that_is_stopped_before_it_serves(
    tmp_path: Path, vms: list[Machine], numbers: list[int]
) -> None:
    """What is served beside the frozen VM takes its time to be opened."""
    vm, path = vms[0], tmp_path / "mute.sock"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(path))
        mute.listen()
        words = [*COMMAND, "serve", source(vm), f"nbd+unix:///?socket={path}"]
        words += ["--listen", f"unix:{tmp_path}/sock"]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        ) as process:
            connection, _ = await asyncio.to_thread(mute.accept)
            with connection:
                assert list(vm.folder.glob("nbdsrv-qemu-*/*.qcow2"))  # it is frozen
                for number in numbers:
                    process.send_signal(number)
                    await asyncio.sleep(0.05)
                out, said = await asyncio.to_thread(process.communicate, timeout=20)
    assert (process.returncode, out, said) == (0, "", "")
    assert await vm.left() == []
