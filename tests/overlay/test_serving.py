"""``serve --overlay`` and ``overlay ...`` with real processes: killed, restarted, committed."""

import asyncio
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.overlay.place import directory_name, in_use
from nbdsrv.source.nbd import open_nbd
from tests.disk.reading import content
from tests.overlay.bases import make_base
from tests.overlay.server import (
    nbdsrv,
    nbdsrv_json,
    running_server,
    start_server,
    until,
    uri,
)
from tests.repository.fixtures import unpack_fixture

SIZE = 8 << 20
BLOCK = 4096


def digest(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "leases" not in path.parts
    }


def repository_with_a_point(tmp_path: Path) -> tuple[str, bytes]:
    base = make_base(tmp_path / "sda.img", SIZE)
    repository = f"repo:{tmp_path}/repo"
    nbdsrv("init", repository, "--chunk-size", "64K", "--quiet")
    nbdsrv("backup", f"{tmp_path}/sda.img", "--to", repository, "--group", "vm1", "--quiet")
    return repository, base


async def test_killed_again_and_again(tmp_path: Path, workers: Workers) -> None:
    """What was flushed before a kill -9 is there after it; the rest is old or new."""
    base = make_base(tmp_path / "base.img", SIZE)
    socket, chance = tmp_path / "s", random.Random(7)
    flushed = bytearray(base)
    for turn in range(4):
        server = start_server(socket, f"{tmp_path}/base.img", "--overlay", f"{tmp_path}/ov")
        try:
            disk = await open_nbd(uri(socket), workers, writable=True)
            found = await content(disk, 0, SIZE)
            assert found == bytes(flushed), f"turn {turn}"
            for step in range(60):
                at = chance.randrange(SIZE // 512 - 40) * 512
                data = chance.randbytes(chance.choice((512, BLOCK, 5 * BLOCK)))
                at = at // BLOCK * BLOCK if len(data) == BLOCK else at
                await disk.write(at, memoryview(data))
                flushed[at : at + len(data)] = data
                if step % 9 == 8:
                    await disk.flush()
            await disk.flush()
            # And some that nobody flushes, while the server dies.
            place = SIZE - (40 << 12)
            busy = [
                asyncio.ensure_future(disk.write(place + (n << 12), memoryview(b"?" * BLOCK)))
                for n in range(40)
            ]
            await asyncio.sleep(0.001 * turn)
        finally:
            server.kill()
            server.communicate()
        await asyncio.gather(*busy, return_exceptions=True)
        with pytest.raises(DiskError):
            await disk.flush()
        await disk.close()
        server = start_server(socket, f"{tmp_path}/base.img", "--overlay", f"{tmp_path}/ov")
        disk = await open_nbd(uri(socket), workers)
        tail = await content(disk, place, SIZE - place)
        for at in range(0, len(tail), BLOCK):
            part = tail[at : at + BLOCK]
            assert part in {b"?" * BLOCK, bytes(flushed[place + at : place + at + BLOCK])}
        flushed[place:] = tail
        await disk.close()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        server.communicate()
    assert (tmp_path / "base.img").read_bytes() == base


async def test_commit_while_the_guest_writes(tmp_path: Path, workers: Workers) -> None:
    repository, base = repository_with_a_point(tmp_path)
    (first,) = nbdsrv_json("ls", repository)
    before = digest(tmp_path / "repo")
    overlay = f"{tmp_path}/ov/vm1/sda@latest"
    socket, model = tmp_path / "s", bytearray(base)
    with running_server(socket, repository, "--overlay", f"{tmp_path}/ov"):
        guest = await open_nbd(uri(socket, "vm1/sda"), workers, writable=True)
        for at, data in ((1000, b"a" * 9000), (1 << 20, b"b" * 65536), (SIZE - 700, b"c" * 700)):
            await guest.write(at, memoryview(data))
            model[at : at + len(data)] = data
        await guest.trim(2 << 20, 1 << 20)
        model[2 << 20 : 3 << 20] = bytes(1 << 20)

        async def scribble() -> None:
            chance = random.Random(1)
            while True:
                at = chance.randrange(4 << 20, (7 << 20) // BLOCK * BLOCK) // BLOCK * BLOCK
                await guest.write(at, memoryview(chance.randbytes(BLOCK)))

        # The moment is somewhere in between: compare where nobody scribbles.
        writer = asyncio.ensure_future(scribble())
        (row,) = await asyncio.to_thread(
            nbdsrv_json, "overlay", "commit", overlay, "--to", repository
        )
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
        assert row["mode"] == "incremental"
        assert row["read_bytes"] < SIZE
        assert (row["group"], row["disk"]) == ("vm1", "sda")
        # With the guest holding still, bit by bit; the parent is the served point still.
        quiet = await content(guest, 0, SIZE)
        assert quiet[: 4 << 20] == model[: 4 << 20]
        (second,) = await asyncio.to_thread(
            nbdsrv_json, "overlay", "commit", overlay, "--to", repository
        )
        points = nbdsrv_json("ls", repository)
        assert [point["parent"] for point in points] == [None, first["point"], first["point"]]
        (tmp_path / "quiet").write_bytes(quiet)
        source = f"{repository}#vm1/sda@{second['point']}"
        nbdsrv("compare", source, f"raw:{tmp_path}/quiet")
        assert in_use(str(tmp_path / "ov" / "vm1%2Fsda%40latest"))
        nbdsrv("overlay", "drop", overlay, code=1)
        await guest.close()
    assert {name: before[name] for name in before} == {
        name: value for name, value in digest(tmp_path / "repo").items() if name in before
    }
    # Not served, and over the old point although there are newer ones.
    (third,) = nbdsrv_json("overlay", "commit", overlay, "--to", repository)
    assert third["mode"] == "incremental"
    nbdsrv("compare", f"{repository}#vm1/sda@{third['point']}", f"raw:{tmp_path}/quiet")
    (row,) = nbdsrv_json("overlay", "ls", f"{tmp_path}/ov")
    said = nbdsrv("overlay", "info", row["path"])
    assert re.search(r"^created: 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$", said, re.MULTILINE)
    assert "\nin use: no\n" in said
    assert row["selector"] == f"vm1/sda@{first['point']}"
    nbdsrv("overlay", "drop", overlay)
    assert nbdsrv_json("overlay", "ls", f"{tmp_path}/ov") == []


async def test_a_commit_is_of_the_directory_that_was_named(
    tmp_path: Path, workers: Workers
) -> None:
    """Renamed, linked to, copied: the overlay is what lies there, not what its export is called."""
    repository, base = repository_with_a_point(tmp_path)
    model = bytearray(base)
    with running_server(tmp_path / "s", repository, "--overlay", f"{tmp_path}/ov"):
        guest = await open_nbd(uri(tmp_path / "s", "vm1/sda"), workers, writable=True)
        await guest.write(2 * BLOCK, memoryview(b"written!" * 512))
        await guest.close()
    model[2 * BLOCK : 3 * BLOCK] = b"written!" * 512
    kept, link = tmp_path / "ov" / "kept", tmp_path / "link"
    (tmp_path / "ov" / directory_name("vm1/sda@latest")).rename(kept)
    link.symlink_to(kept)
    for path in (kept, link):
        (row,) = nbdsrv_json("overlay", "commit", str(path), "--to", repository)
        nbdsrv("copy", f"{repository}#vm1/sda@{row['point']}", f"{tmp_path}/back.raw", "--force")
        assert (tmp_path / "back.raw").read_bytes() == bytes(model)
    assert [each.name for each in (tmp_path / "ov").iterdir()] == ["kept"]


async def test_a_commit_into_the_remote_of_xen_orchestra_that_the_base_lies_in(
    tmp_path: Path, workers: Workers
) -> None:
    """Upon the point the overlay is over while that is the latest: a chain has no branches."""
    size = 8 << 20
    base = make_base(tmp_path / "sda.img", size)
    remote = f"xo:{tmp_path}/xo"
    (tmp_path / "xo").mkdir()
    nbdsrv("backup", f"{tmp_path}/sda.img", "--to", remote, "--group", "vm1", "--quiet")
    before = digest(tmp_path / "xo")
    (served,) = nbdsrv_json("ls", remote)
    with running_server(tmp_path / "s", remote, "--overlay", f"{tmp_path}/ov"):
        guest = await open_nbd(uri(tmp_path / "s", "vm1/sda@latest"), workers, writable=True)
        await guest.write(5000, memoryview(b"mine"))
        await guest.close()
    overlay = f"{tmp_path}/ov/vm1/sda@latest"
    (first,) = nbdsrv_json("overlay", "commit", overlay, "--to", remote)
    assert (first["mode"], served["point"] in first["reason"]) == ("incremental", True)
    assert first["new_bytes"] <= 2 << 20
    (second,) = nbdsrv_json("overlay", "commit", overlay, "--to", remote)
    assert (second["mode"], "is not the latest" in second["reason"]) == ("full", True)
    after = digest(tmp_path / "xo")
    kept = {name for name in before if not name.endswith("cache.json.gz")}  # a list of all points
    assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}
    changed = base[:5000] + b"mine" + base[5004:]
    for row, expected in zip(nbdsrv_json("ls", remote), (base, changed, changed), strict=True):
        nbdsrv("restore", f"{remote}#vm1/sda@{row['point']}", f"{tmp_path}/out.raw", "--force")
        assert (tmp_path / "out.raw").read_bytes() == expected


async def test_over_a_whole_vm_that_xen_orchestra_has_backed_up(
    tmp_path: Path, workers: Workers
) -> None:
    """An XVA is a restore point like any other: it stays the base when a newer one comes."""
    root = unpack_fixture("xo-repositories.tar.zst", tmp_path) / "repos" / "xva-full"
    remote, overlay = f"xo:{root}", f"{tmp_path}/ov/research-vm/root@latest"
    (served,) = nbdsrv_json("ls", remote)
    arguments = (remote, "--overlay", f"{tmp_path}/ov")
    with running_server(tmp_path / "s", *arguments):
        guest = await open_nbd(
            uri(tmp_path / "s", "research-vm/root@latest"), workers, writable=True
        )
        await guest.write(5000, memoryview(b"mine"))
        await guest.close()
    (told,) = root.glob("xo-vm-backups/*/20*.json")
    newer = "20260104T020304Z"
    shutil.copy(told.with_suffix(".xva"), told.with_name(f"{newer}.xva"))
    text = told.read_text().replace(served["point"], newer)
    told.with_name(f"{newer}.json").write_text(text)
    assert newer == nbdsrv_json("ls", remote)[-1]["point"]
    with running_server(tmp_path / "s", *arguments):
        guest = await open_nbd(uri(tmp_path / "s", "research-vm/root@latest"), workers)
        assert await content(guest, 5000, 4) == b"mine"
        await guest.close()
    nbdsrv("init", f"repo:{tmp_path}/repo")
    (row,) = nbdsrv_json("overlay", "commit", overlay, "--to", f"repo:{tmp_path}/repo")
    assert (row["group"], row["disk"], row["mode"]) == ("research-vm", "root", "full")
    (row,) = nbdsrv_json("overlay", "commit", overlay, "--to", remote)
    assert "was made by Xen Orchestra" in row["reason"]


async def test_latest_does_not_move_under_an_overlay(tmp_path: Path, workers: Workers) -> None:
    repository, base = repository_with_a_point(tmp_path)
    socket = tmp_path / "s"
    arguments = (repository, "--overlay", f"{tmp_path}/ov")
    with running_server(socket, *arguments):
        guest = await open_nbd(uri(socket, "vm1/sda@latest"), workers, writable=True)
        await guest.write(0, memoryview(b"mine"))
        await guest.close()
        (tmp_path / "sda.img").write_bytes(b"newer" + base[5:])
        nbdsrv("backup", f"{tmp_path}/sda.img", "--to", repository, "--group", "vm1", "--quiet")
        again = await open_nbd(uri(socket, "vm1/sda"), workers)
        assert await content(again, 0, SIZE) == b"mine" + base[4:]
        await again.close()
    with running_server(socket, *arguments):
        again = await open_nbd(uri(socket, "vm1/sda@latest"), workers)
        assert await content(again, 0, SIZE) == b"mine" + base[4:]
        await again.close()
        nbdsrv("overlay", "drop", f"{tmp_path}/ov/vm1/sda@latest")
        newest = await open_nbd(uri(socket, "vm1/sda@latest"), workers)
        assert await content(newest, 0, SIZE) == b"newer" + base[5:]
        await newest.close()


async def test_a_commit_that_is_killed_thaws(tmp_path: Path, workers: Workers) -> None:
    make_base(tmp_path / "base.img", SIZE)
    socket = tmp_path / "s"
    door = tmp_path / "ov" / "base.img" / "frozen.sock"
    with running_server(socket, f"{tmp_path}/base.img", "--overlay", f"{tmp_path}/ov"):
        guest = await open_nbd(uri(socket), workers, writable=True)
        await guest.write(0, memoryview(b"before"))
        assert oct(os.stat(door).st_mode & 0o777) == "0o600"
        code = (
            "import socket,sys,time; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
            "s.recv(18); z=bytes; s.sendall(z([0,0,0,3])+b'IHAVEOPT'+z([0,0,0,7,0,0,0,12,0,0,0,6])"
            "+b'frozen'+z(2)); s.recv(20); print('frozen', flush=True); time.sleep(60)"
        )
        reader = subprocess.Popen(
            [sys.executable, "-c", code, str(door)], stdout=subprocess.PIPE, text=True
        )
        assert reader.stdout is not None
        assert reader.stdout.readline() == "frozen\n"
        await guest.write(0, memoryview(b"after!"))
        assert await _moment(door, workers) == b"before"  # who comes meanwhile sees the same one
        reader.kill()
        reader.communicate()
        async with asyncio.timeout(20):
            while await _moment(door, workers) != b"after!":
                await asyncio.sleep(0.02)
        await guest.close()
    await until(lambda: not in_use(str(tmp_path / "ov" / "base.img")))


async def _moment(door: Path, workers: Workers) -> bytes:
    disk = await open_nbd(uri(door, "frozen"), workers)
    try:
        return await content(disk, 0, 6)
    finally:
        await disk.close()


def test_a_running_vm_has_no_overlay(tmp_path: Path) -> None:
    text = nbdsrv("serve", "qemu:/nowhere", "--overlay", f"{tmp_path}/ov", code=2)
    assert "a running VM has no overlay" in text
