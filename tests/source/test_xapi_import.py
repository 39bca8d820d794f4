"""Disks copied into a simulated pool."""

import asyncio
import random
from pathlib import Path

import pytest

from nbdsrv.copying.engine import Copy
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.xapi_import import PoolWriter, pool_writer
from nbdsrv.source.xapi_place import access_of, parse_place
from tests.source.xapi_pool import pool

SIZE = (9 << 20) + 512


def image(path: Path, size: int = SIZE) -> bytes:
    """Data, a hole of whole blocks, zeroes that are data, data at the end."""
    golden = bytearray(size)
    golden[: 1 << 20] = random.Random(1).randbytes(1 << 20)
    golden[-700:] = b"e" * 700
    with path.open("wb") as file:
        file.truncate(size)
        file.write(golden[: 3 << 20])
        file.seek(size - 700)
        file.write(golden[-700:])
    return bytes(golden)


async def copy_into(simulator: object, path: Path, workers: Workers, name: str) -> PoolWriter:
    address, environment = simulator.address, simulator.environment  # type: ignore[attr-defined]
    place = parse_place(f"xapi://root@{address}#{name}")
    writer = PoolWriter(place, access_of(environment), workers)
    disk = await open_image(str(path), "raw", Opening(workers))
    try:
        await Copy(disk, writer, workers).run()
    finally:
        await disk.close()
    return writer


async def test_a_disk_arrives(tmp_path: Path, workers: Workers) -> None:
    golden = image(tmp_path / "disk")
    with pool(tmp_path) as simulator:
        writer = await copy_into(simulator, tmp_path / "disk", workers, "Local storage/web root")
        assert golden == simulator.content(writer.uuid)
        (vdi,) = simulator.do("vdis")
        assert "web root" == vdi["name_label"]
        state = simulator.do("state")
        assert (0, 0) == (state["sessions"], state["tasks"])


async def test_what_fails_leaves_no_disk(tmp_path: Path, workers: Workers) -> None:
    image(tmp_path / "disk")
    with pool(tmp_path) as simulator:
        simulator.do("trouble", import_error=True)
        with pytest.raises(SourceError, match="importing a disk: VDI_IO_ERROR"):
            await copy_into(simulator, tmp_path / "disk", workers, "Local storage/x")
        assert [] == simulator.do("vdis")
        simulator.do("trouble", import_error=False, import_status=302)
        with pytest.raises(SourceError, match=r"302; give the host|the connection broke"):
            await copy_into(simulator, tmp_path / "disk", workers, "Local storage/x")
        assert [] == simulator.do("vdis")
        with pytest.raises(SourceError, match="no SR is called 'Elsewhere'"):
            await copy_into(simulator, tmp_path / "disk", workers, "Elsewhere")
        assert 0 == simulator.do("state")["sessions"]


async def test_a_cancelled_copy_leaves_no_disk(tmp_path: Path, workers: Workers) -> None:
    image(tmp_path / "disk")
    with pool(tmp_path) as simulator:
        simulator.do("trouble", import_stall_s=1.5)
        task = asyncio.create_task(
            copy_into(simulator, tmp_path / "disk", workers, "Local storage/x")
        )
        while not simulator.do("vdis"):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [] == simulator.do("vdis")


def test_targets_that_are_none() -> None:
    with pytest.raises(ConfigError, match="a target names an SR in the VM's place"):
        pool_writer("xapi://host#sr", None)  # type: ignore[arg-type]
