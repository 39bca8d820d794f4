"""Hydration: the base in the overlay, guests first, the rest of it whatever happens."""

import asyncio
import errno
import json
import math
import os
import random
import subprocess
from pathlib import Path

import pytest

from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.throttle import Rate
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.overlay import hydrate
from nbdsrv.overlay.hydrate import Hydration
from nbdsrv.overlay.overlay import Overlay
from nbdsrv.overlay.quiet import NOBODY, Quiet, Traffic
from tests.disk.reading import content
from tests.overlay.bases import make_base, opener
from tests.overlay.server import nbdsrv, nbdsrv_json, running_server, until, uri

MIB = 1 << 20
SIZE = 12 * MIB + 5000


def hydration(overlay: Overlay, traffic: Traffic = NOBODY, rate: float = math.inf) -> Hydration:
    return Hydration(overlay, overlay.base, Quiet(traffic, 0.05), Rate(rate))


async def test_afterwards_the_base_is_read_no_more(tmp_path: Path, workers: Workers) -> None:
    model = bytearray(make_base(tmp_path / "base", SIZE))
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov", wrap=Watched)
    overlay = await open_()
    chance = random.Random(1)
    for _ in range(40):
        at, length = chance.randrange(SIZE - 9000), chance.randrange(1, 9000)
        data = chance.randbytes(length)
        await overlay.write(at, memoryview(data))
        model[at : at + length] = data
    await overlay.zero(5 * MIB, MIB, punch=True, fast=False)
    model[5 * MIB : 6 * MIB] = bytes(MIB)
    work = hydration(overlay)
    await work.run()
    assert work.state == "complete"
    assert work.copied > 6 * MIB
    base = overlay.base
    assert isinstance(base, Watched)
    base.reads = 0
    assert await content(overlay, 0, SIZE) == model
    # What is left are zeroes, which the base is asked for and not read.
    for run in await overlay.runs(0, SIZE):
        assert getattr(run, "fd", -1) != _fd_of(base)
    dirty = await overlay.status("qemu:dirty-bitmap:overlay", 0, SIZE)
    assert sum(e.length for e in dirty if e.flags) < 2 * MIB
    await overlay.close()


def _fd_of(base: "Watched") -> int:
    return base._inside._fd  # type: ignore[attr-defined]


class Watched(Passthrough):
    """A base that counts, and fails where it is told to."""

    reads = 0
    broken: range = range(0)
    away = False
    kind: type[DiskError] = CorruptImage

    def locate(self, offset: int, length: int):
        return self._inside.locate(offset, length)

    async def load(self, offset: int, length: int) -> None:
        await self._inside.load(offset, length)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        if self.away:
            raise DiskError("the base is away", errno.EIO)
        if offset < self.broken.stop and self.broken.start < offset + len(buffer):
            raise self.kind("a broken chunk")
        await super().read_into(offset, buffer)


async def test_goes_on_where_it_was_after_a_restart(tmp_path: Path, workers: Workers) -> None:
    model = make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    overlay = await open_()
    first = hydration(overlay, rate=40 * MIB)
    task = asyncio.create_task(first.run())
    await until(lambda: first.copied >= 2 * MIB)
    task.cancel()
    await asyncio.wait([task])
    before = first.copied
    await overlay.close()
    overlay = await open_()
    again = hydration(overlay)
    await again.run()
    assert again.state == "complete"
    total = sum(1 for at in range(0, SIZE, 4096) if any(model[at : at + 4096])) * 4096
    assert before + again.copied <= total + 4096
    assert again.copied < total
    assert await content(overlay, 0, SIZE) == model
    await overlay.close()


async def test_a_damaged_part_is_left_out_and_told(tmp_path: Path, workers: Workers) -> None:
    make_base(tmp_path / "base", SIZE)
    overlay = await opener(workers, tmp_path / "base", tmp_path / "ov", wrap=Watched)()
    base = overlay.base
    assert isinstance(base, Watched)
    base.broken = range(2 * MIB + 100_000, 2 * MIB + 108_000)
    work = hydration(overlay)
    await work.run()
    assert work.state == "incomplete"
    # 100 000 lies in block 24, 107 999 in block 26.
    assert work.damaged == 3 * 4096
    assert work.error == "a broken chunk"
    with pytest.raises(CorruptImage):
        await overlay.base.read_into(2 * MIB + 100_000, memoryview(bytearray(10)))
    await overlay.close()


async def test_a_base_that_is_away_is_waited_for(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hydrate, "RETRY_S", 0.02)
    model = make_base(tmp_path / "base", SIZE)
    overlay = await opener(workers, tmp_path / "base", tmp_path / "ov", wrap=Watched)()
    base = overlay.base
    assert isinstance(base, Watched)
    base.away = True
    work = hydration(overlay)
    task = asyncio.create_task(work.run())
    await until(lambda: work.state == "base away")
    assert work.facts["error"] == "the base is away"
    base.away = False
    await task
    assert work.state == "complete"
    assert await content(overlay, 0, SIZE) == model
    await overlay.close()


async def test_the_last_of_the_disk_is_the_guests(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hydrate, "ROOM_S", 0.02)
    make_base(tmp_path / "base", SIZE)
    overlay = await opener(workers, tmp_path / "base", tmp_path / "ov")()
    free = 0

    def found(_path: str) -> os.statvfs_result:
        return os.statvfs_result((4096, 4096, 1000, free, free, 0, 0, 0, 0, 255))

    monkeypatch.setattr(hydrate.os, "statvfs", found)
    work = hydration(overlay)
    task = asyncio.create_task(work.run())
    await until(lambda: work.state == "no room")
    assert work.copied == 0
    assert not os.path.exists(tmp_path / "ov" / "disk" / "data")
    free = 900
    await task
    assert work.state == "complete"
    await overlay.close()


async def test_guests_come_first_and_patience_has_an_end() -> None:
    requests = 0
    waited_for = False

    def traffic() -> int | None:
        nonlocal requests
        requests += 1
        return None if waited_for else requests

    loop = asyncio.get_running_loop()
    quiet = Quiet(traffic, 0.06)
    began = loop.time()
    await quiet.pause()  # a guest that never pauses
    assert loop.time() - began >= 0.06
    waited_for = True
    began = loop.time()
    await quiet.pause()  # one whose answer takes its time
    assert loop.time() - began >= 0.06
    patient = Quiet(NOBODY, 3600)
    await patient.pause()  # or this test would time out


async def test_writes_meanwhile_are_never_copied_over(tmp_path: Path, workers: Workers) -> None:
    model = bytearray(make_base(tmp_path / "base", SIZE))
    overlay = await opener(workers, tmp_path / "base", tmp_path / "ov")()
    work = hydration(overlay, rate=30 * MIB)
    task = asyncio.create_task(work.run())
    chance = random.Random(3)
    while not task.done():
        length = chance.choice((512, 4096, 12288, 100))
        at = chance.randrange(SIZE - length)
        data = chance.randbytes(length)
        await overlay.write(at, memoryview(data))
        model[at : at + length] = data
        await asyncio.sleep(0)
    await task
    assert await content(overlay, 0, SIZE) == model
    await overlay.close()


def test_served_with_hydrate_it_is_told_in_status_and_info(tmp_path: Path) -> None:
    base, socket, admin = tmp_path / "base", tmp_path / "s", tmp_path / "admin"
    make_base(base, SIZE)
    words = (str(base), "--overlay", str(tmp_path / "ov"), "--hydrate=1G")
    with running_server(socket, *words, "--admin-socket", str(admin)):
        client = subprocess.Popen(
            ["qemu-io", "-f", "raw", uri(socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )

        def hydrated() -> bool:
            document = json.loads(nbdsrv("status", "--json", "--socket", str(admin)))
            states = [each["hydration"]["state"] for each in document["overlays"]]
            return states == ["complete"]

        asyncio.run(until(hydrated))
        said = nbdsrv("status", "--once", "--socket", str(admin))
        assert "complete" in said
        client.communicate(b"quit\n", timeout=20)
    facts = nbdsrv_json("overlay", "info", str(tmp_path / "ov" / "base"))
    assert facts["dirty_bytes"] == 0
    assert facts["copied_bytes"] > 6 * MIB


def test_hydrate_is_refused_where_it_makes_no_sense(tmp_path: Path) -> None:
    make_base(tmp_path / "base", MIB)
    said = nbdsrv("serve", str(tmp_path / "base"), "--hydrate", code=2)
    assert "it goes with --overlay DIR" in said
    words = ("serve", "--overlay", str(tmp_path), "--hydrate", str(tmp_path / "base"))
    assert "not a rate" in nbdsrv(*words, str(tmp_path / "base"), code=2)


def test_a_configuration_says_hydrate_beside_overlay(tmp_path: Path) -> None:
    make_base(tmp_path / "base", MIB)
    file = tmp_path / "c.toml"
    export = f'[[export]]\nname = "a"\nsource = "{tmp_path}/base"\n'
    overlay = f'overlay = "{tmp_path}/ov"\n'
    for line in ("hydrate = true\n", 'hydrate = "50M"\n'):
        file.write_text(export + overlay + line)
        assert "no mistake found" in nbdsrv("serve", "--config", str(file), "--check")
    file.write_text(export + "hydrate = true\n")
    said = nbdsrv("serve", "--config", str(file), "--check", code=2)
    assert "hydrate fills an overlay" in said
    file.write_text(export + overlay + 'hydrate = "fast"\n')
    said = nbdsrv("serve", "--config", str(file), "--check", code=2)
    assert f"{file}:5" in said
    assert "export.a.hydrate: 'fast' is not a rate, for instance 50M\n" in said
