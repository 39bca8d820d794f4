"""What was answered survives the server, flushed or not, as long as the kernel does."""

import errno
import os
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.overlay import recent
from nbdsrv.overlay.recent import RECENT_NAME, Recent
from nbdsrv.source.nbd import open_nbd
from tests.disk.reading import content
from tests.overlay.bases import make_base, opener
from tests.overlay.server import start_server, uri

MIB = 1 << 20
SIZE = 12 * MIB + 700
BLOCK = 4096
ID = bytes(range(16))


async def test_nothing_that_was_answered_is_lost_with_the_server(
    tmp_path: Path, workers: Workers
) -> None:
    """A client that connects again sends its FLUSH alone, and must be right to."""
    model = bytearray(make_base(tmp_path / "base", SIZE))
    socket, chance = tmp_path / "s", random.Random(11)
    for turn in range(4):
        server = start_server(socket, str(tmp_path / "base"), "--overlay", str(tmp_path / "ov"))
        try:
            disk = await open_nbd(uri(socket), workers, writable=True)
            assert await content(disk, 0, SIZE) == model, f"turn {turn}"
            for _ in range(120):
                length = chance.choice((512, BLOCK, BLOCK, 3 * BLOCK, 100_000))
                at = chance.randrange(SIZE - length)
                if chance.random() < 0.8:
                    at = at // BLOCK * BLOCK
                if chance.random() < 0.2:
                    await disk.zero(at, length, punch=chance.random() < 0.5, fast=False)
                    model[at : at + length] = bytes(length)
                    continue
                data = chance.randbytes(length)
                await disk.write(at, memoryview(data))
                model[at : at + length] = data
            if turn % 2:
                await disk.flush()
        finally:
            server.kill()
            server.communicate()
            await disk.close()
    overlay = await opener(workers, tmp_path / "base", tmp_path / "ov", export="base")()
    assert await content(overlay, 0, SIZE) == model
    await overlay.close()
    assert not (tmp_path / "ov" / "base" / RECENT_NAME).exists()
    overlay = await opener(workers, tmp_path / "base", tmp_path / "ov", export="base")()
    assert await content(overlay, 0, SIZE) == model
    await overlay.close()


async def test_after_a_power_cut_it_is_not_believed(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", SIZE)
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    overlay = await open_()
    await overlay.write(0, memoryview(b"flushed!" * 512))
    await overlay.flush()
    await overlay.write(MIB, memoryview(b"answered" * 512))
    kept = (tmp_path / "ov" / "disk" / RECENT_NAME).read_bytes()
    map_ = (tmp_path / "ov" / "disk" / "map").read_bytes()
    await overlay.close()
    # As it was before it was closed; and the kernel is another one.
    (tmp_path / "ov" / "disk" / RECENT_NAME).write_bytes(kept)
    (tmp_path / "ov" / "disk" / "map").write_bytes(map_)
    monkeypatch.setattr(recent, "boot_id", lambda: b"0" * 36)
    overlay = await open_()
    assert await content(overlay, 0, BLOCK) == b"flushed!" * 512
    assert await content(overlay, MIB, BLOCK) == base[MIB : MIB + BLOCK]
    await overlay.close()


async def test_an_overlay_on_a_full_disk_is_opened_and_read(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is new finds no room: the guest can still read, overwrite and be moved away."""
    model = bytearray(make_base(tmp_path / "base", SIZE))
    open_ = opener(workers, tmp_path / "base", tmp_path / "ov")
    overlay = await open_()
    await overlay.write(0, memoryview(b"written!" * 512))
    model[:BLOCK] = b"written!" * 512
    await overlay.close()
    with monkeypatch.context() as full:

        def no_room(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full.setattr(os, "pwrite", no_room)
        overlay = await open_()
        assert await content(overlay, 0, SIZE) == model
        with pytest.raises(DiskError) as caught:
            await overlay.write(MIB, memoryview(b"no room!" * 512))
        assert caught.value.errno == errno.ENOSPC
        assert await content(overlay, 0, SIZE) == model
    await overlay.write(MIB, memoryview(b"has room" * 512))
    model[MIB : MIB + BLOCK] = b"has room" * 512
    await overlay.close()
    overlay = await open_()
    assert await content(overlay, 0, SIZE) == model
    await overlay.close()


async def test_where_the_boot_is_hidden_the_log_says_so(
    tmp_path: Path,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_base(tmp_path / "base", SIZE)
    monkeypatch.setattr(recent, "BOOT_ID", str(tmp_path / "hidden"))
    overlay = await opener(workers, tmp_path / "base", tmp_path / "ov")()
    await overlay.write(0, memoryview(b"answered" * 512))
    await overlay.close()
    assert "overlay.no_boot_id" in caplog.text


def test_the_service_sees_which_boot_it_is() -> None:
    """And the prometheus client the boot's time, which lies in /proc as well."""
    unit = Path(__file__).parents[2] / "systemd" / "nbdsrv.service"
    said = [line.partition("=")[::2] for line in unit.read_text().splitlines()]
    assert ("StateDirectory", "nbdsrv") in said  # overlays
    assert dict(said).get("ProcSubset", "all") == "all"


@given(
    st.lists(
        st.tuples(st.integers(0, 40_000), st.integers(1, 9000), st.sampled_from((1, 2))),
        max_size=12,
    )
)
def test_what_was_marked_last_is_told(marks: list[tuple[int, int, int]]) -> None:
    blocks = 50_000
    model = bytearray(blocks)
    with TemporaryDirectory() as path:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        first = Recent(directory, ID, blocks * BLOCK)
        for start, count, state in marks:
            first.mark(start, start + count, state)
            model[start : start + count] = bytes([state]) * count
        first.close()
        again = Recent(directory, ID, blocks * BLOCK)
        found = bytearray(blocks)
        for start, end, state in again.told():
            found[start:end] = bytes([state]) * (end - start)
        assert found == model
        again.close()
        other = Recent(directory, bytes(16), blocks * BLOCK)  # of another overlay
        assert list(other.told()) == []
        other.forget()
        other.close()
        os.close(directory)
