"""The point an overlay stands on: kept by ``prune`` while nobody serves it, until it is dropped."""

import logging
import os
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.overlay.pinning import pin
from nbdsrv.overlay.place import read_description
from nbdsrv.source.nbd import open_nbd
from tests.overlay.bases import make_base
from tests.overlay.server import nbdsrv, nbdsrv_json, running_server, uri

SIZE = 1 << 20


def backed_up(tmp_path: Path) -> str:
    """A repository with two points."""
    repository = f"repo:{tmp_path}/repo"
    nbdsrv("init", repository, "--chunk-size", "64K", "--quiet")
    for seed in (1, 2):
        make_base(tmp_path / "sda.img", SIZE, seed=seed)
        nbdsrv("backup", f"{tmp_path}/sda.img", "--to", repository, "--group", "vm1", "--quiet")
    return repository


async def written(tmp_path: Path, workers: Workers, source: str, export: str) -> None:
    """Serve it with an overlay, write, and leave."""
    with running_server(tmp_path / "s", source, "--overlay", f"{tmp_path}/ov"):
        guest = await open_nbd(uri(tmp_path / "s", export), workers, writable=True)
        await guest.write(0, memoryview(b"mine"))
        await guest.close()


def flags(repository: str) -> list[list[str]]:
    return [row["flags"] for row in nbdsrv_json("ls", repository)]


def fates(repository: str, *more: str) -> list[str | None]:
    done = nbdsrv_json("prune", repository, "--keep-last", "1", *more)
    return [point["spared"] for point in done["groups"][0]["points"]]


async def test_a_point_is_pinned_from_the_first_write_until_the_overlay_is_dropped(
    tmp_path: Path, workers: Workers
) -> None:
    repository = backed_up(tmp_path)
    old = nbdsrv_json("ls", repository)[0]["point"]
    with running_server(tmp_path / "s", repository, "--overlay", f"{tmp_path}/ov"):
        guest = await open_nbd(uri(tmp_path / "s", f"vm1/sda@{old}"), workers)
        await guest.close()
    assert flags(repository) == [[], []], "who only looks pins nothing"
    await written(tmp_path, workers, repository, f"vm1/sda@{old}")
    assert flags(repository) == [["pinned"], []]
    for _ in range(2):
        (newest, spared) = fates(repository)
        assert newest is None
        assert spared is not None
        assert f"overlay {tmp_path}/ov/vm1%2Fsda%40{old} on " in spared
        assert spared.endswith("stands on it")
    nbdsrv("overlay", "drop", f"{tmp_path}/ov/vm1/sda@{old}")
    assert flags(repository) == [[], []]
    assert fates(repository) == [None, None]
    assert len(flags(repository)) == 1


async def test_force_overrides_and_forgets(tmp_path: Path, workers: Workers) -> None:
    repository = backed_up(tmp_path)
    old = nbdsrv_json("ls", repository)[0]["point"]
    await written(tmp_path, workers, repository, f"vm1/sda@{old}")
    assert fates(repository, "--force", "--dry-run") == [None, None]
    assert len(os.listdir(tmp_path / "repo" / "pins")) == 1
    assert fates(repository, "--force") == [None, None]
    assert flags(repository) == [[]]
    assert os.listdir(tmp_path / "repo" / "pins") == []
    nbdsrv("overlay", "drop", f"{tmp_path}/ov/vm1/sda@{old}")


async def test_a_pin_that_was_lost_comes_back(tmp_path: Path, workers: Workers) -> None:
    repository = backed_up(tmp_path)
    old = nbdsrv_json("ls", repository)[0]["point"]
    await written(tmp_path, workers, f"{repository}#vm1/sda@{old}", "")
    (name,) = os.listdir(tmp_path / "repo" / "pins")
    before = (tmp_path / "repo" / "pins" / name).stat().st_ino
    await written(tmp_path, workers, f"{repository}#vm1/sda@{old}", "")
    assert (tmp_path / "repo" / "pins" / name).stat().st_ino == before, "put once"
    (tmp_path / "repo" / "pins" / name).unlink()
    await written(tmp_path, workers, f"{repository}#vm1/sda@{old}", "")
    assert flags(repository) == [["pinned"], []]


async def test_a_repository_that_cannot_be_written_is_a_warning(
    tmp_path: Path, workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    repository = backed_up(tmp_path)
    await written(tmp_path, workers, f"{repository}#vm1/sda@latest", "")
    (overlay,) = (tmp_path / "ov").iterdir()
    fd = os.open(overlay, os.O_RDONLY)
    found = read_description(str(overlay), fd)
    os.close(fd)
    assert found is not None
    pins = tmp_path / "repo" / "pins"
    (pins / f"{found.id}.json").unlink()
    pins.rmdir()
    pins.write_bytes(b"in the way")  # of root, too
    with caplog.at_level(logging.WARNING):
        pin(found, str(overlay))
    assert "overlay.unpinned" in caplog.text
    assert found.selector in caplog.text
    pins.unlink()
    pin(found, str(overlay))
    assert flags(repository) == [[], ["pinned"]]


async def test_an_overlay_is_dropped_though_its_repository_is_gone(
    tmp_path: Path, workers: Workers
) -> None:
    repository = backed_up(tmp_path)
    await written(tmp_path, workers, f"{repository}#vm1/sda@latest", "")
    (overlay,) = (tmp_path / "ov").iterdir()
    (tmp_path / "repo").rename(tmp_path / "away")
    (tmp_path / "repo").write_bytes(b"")
    nbdsrv("overlay", "drop", str(overlay))
    assert not overlay.exists()


def test_a_pin_that_makes_no_sense_stops_prune_and_not_ls(tmp_path: Path) -> None:
    repository = backed_up(tmp_path)
    name = f"{'0' * 32}.json"
    (tmp_path / "repo" / "pins").mkdir()
    (tmp_path / "repo" / "pins" / "README").write_text("somebody's")
    assert flags(repository) == [[], []]
    for text in ("", "[]", '{"v": 1}', '{"v": 2, "point": "vm1/x"}', "[" * 9999, "x" * (1 << 17)):
        (tmp_path / "repo" / "pins" / name).write_text(text)
        assert flags(repository) == [[], []]
        error = nbdsrv("prune", repository, "--keep-last", "1", code=1)
        assert f"pins/{name}" in error
        assert error.count("\n") == 1
    assert len(flags(repository)) == 2
    nbdsrv("prune", repository, "--keep-last", "1", "--force")
    assert len(flags(repository)) == 1
