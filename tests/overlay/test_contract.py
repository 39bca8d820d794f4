"""An overlay is a Disk: untouched, written to, half written to, over a remote base, frozen."""

from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.overlay.frozen import Frozen
from tests.disk.check_disk import CONTRACT, check_disk
from tests.overlay.bases import Remote, make_base, opener

SIZE = (3 << 20) + 700
"""The last block is no whole one, and not even whole sectors."""


@pytest.mark.parametrize("wrap", [None, Remote])
async def test_untouched(tmp_path: Path, workers: Workers, wrap: type[Remote] | None) -> None:
    golden = make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "overlays", wrap=wrap)
    await check_disk(open_, golden)
    assert (tmp_path / "base").read_bytes() == golden


@pytest.mark.parametrize("wrap", [None, Remote])
async def test_half_written(tmp_path: Path, workers: Workers, wrap: type[Remote] | None) -> None:
    base = make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "overlays", wrap=wrap)
    model = bytearray(base)
    disk = await open_()
    for at in range(0, SIZE - 9000, 70_000):
        await disk.write(at, memoryview(b"w" * 9000))
        model[at : at + 9000] = b"w" * 9000
        await disk.zero(at + 20_000, 5000, punch=True, fast=False)
        model[at + 20_000 : at + 25_000] = bytes(len(model[at + 20_000 : at + 25_000]))
        copied = at // 4096 * 4096 + (10 << 12)
        await disk.adopt(copied, memoryview(base[copied : copied + 8192]))
    await disk.close()
    await check_disk(open_, bytes(model))
    assert (tmp_path / "base").read_bytes() == base


async def test_frozen(tmp_path: Path, workers: Workers) -> None:
    """While everything that it shows is being written over."""
    golden = bytearray(make_base(tmp_path / "base", SIZE))
    disk = await opener(workers, tmp_path / "base", tmp_path / "overlays")()
    await disk.write(5000, memoryview(b"before" * 2000))
    golden[5000:17000] = b"before" * 2000

    async def frozen() -> Frozen:
        await disk.write(0, memoryview(bytes(golden)))
        found = await disk.freeze()
        await disk.write(0, memoryview(b"after!" * 300_000))
        await disk.trim(1 << 20, 1 << 19)
        await disk.zero(9000, 60_000, punch=True, fast=False)
        return found

    for check in CONTRACT:
        await check(frozen, bytes(golden))
    await disk.close()
