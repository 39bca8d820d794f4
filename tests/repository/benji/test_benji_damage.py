"""Broken and hostile storages: an error that says where, nothing wrong, nothing endless."""

import asyncio
import base64
import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, CorruptImage, DiskError
from nbdsrv.repository.benji.config import load
from nbdsrv.repository.repository import Repository
from tests.disk.reading import content
from tests.disk.threads import running_workers
from tests.repository.benji.storage import BLOCK, Storage, Wrapped
from tests.repository.benji.test_benji_versions import KEY, SIZE, opened, three_versions
from tests.repository.virtnbdbackup.backups import random_disk


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


async def broken_blocks(repository: Repository, golden: dict[str, bytes]) -> dict[str, list[int]]:
    """Which blocks of each version cannot be read; the others are golden's."""
    found: dict[str, list[int]] = {}
    for point in await repository.points():
        if "damaged" in point.flags:
            continue
        disk = await repository.open_disk(point, "disk")
        for at in range(0, disk.size, BLOCK):
            length = min(BLOCK, disk.size - at)
            error = await _error_of(content(disk, at, length))
            if isinstance(error, bytes):
                assert error == golden[point.id][at : at + length]
            else:
                found.setdefault(point.id, []).append(at // BLOCK)
        await disk.close()
    return found


async def _error_of(reading: Any) -> bytes | DiskError:
    try:
        return bytes(await reading)
    except DiskError as error:
        if "\n" in str(error):
            raise
        return error


def block_of(made: Storage, left: int, right: int) -> Path:
    return made.path / made.block_path(left, right)


WAYS = {
    "a flipped bit": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "gone": Path.unlink,
    "metadata gone": lambda path: Path(f"{path}.meta").unlink(),
    "metadata of nothing": lambda path: Path(f"{path}.meta").write_text("{}"),
    "metadata that is a list": lambda path: Path(f"{path}.meta").write_text("[]"),
    "metadata that is deep": lambda path: Path(f"{path}.meta").write_text("[" * 60000),
    "metadata that is huge": lambda path: Path(f"{path}.meta").write_text(" " * (1 << 20)),
    "another version": lambda path: edit(path, metadata_version="9.0.0"),
    "a negative size": lambda path: edit(path, size=-1),
    "a size beyond all": lambda path: edit(path, size=1 << 62, object_size=1 << 62),
    "another block's checksum": lambda path: edit(path, checksum="00" * 32),
    "an unknown transform": lambda path: edit(
        path, transforms=[{"name": "x", "module": "os", "materials": {}}]
    ),
}


def edit(path: Path, **changes: object) -> None:
    meta = Path(f"{path}.meta")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | changes))


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("way", WAYS)
async def test_a_broken_block_spoils_itself(
    tmp_path: Path, workers: Workers, way: str, *, encrypted: bool
) -> None:
    made = Storage(tmp_path, Wrapped(KEY) if encrypted else None)
    golden = three_versions(made)
    WAYS[way](block_of(made, 1, 5))  # type: ignore[operator]
    secret = base64.b64encode(KEY).decode() if encrypted else ""
    repository = await opened(tmp_path, workers, secret)
    if way == "an unknown transform":
        check = await repository.verify("chunks")
        assert len(check.findings) + len(check.unread) == 1
        await repository.close()
        return
    found = await broken_blocks(repository, golden)
    assert found == {uid: [4] for uid in golden}
    check = await repository.verify("chunks")
    if way == "another version":
        assert len(check.unread) == 1  # nobody can tell whether it is broken
    else:
        (finding,) = check.findings
        assert finding.key == made.block_path(1, 5)
        assert [hurt.ranges for hurt in finding.hurts] == [[(4 * BLOCK, BLOCK)]] * 3
    await repository.close()


async def test_what_each_level_sees(tmp_path: Path, workers: Workers) -> None:
    made = Storage(tmp_path)
    three_versions(made)
    every = [(1, right) for right in range(20) if block_of(made, 1, right).exists()]
    block_of(made, *every[-1]).unlink()
    edit(block_of(made, *every[-2]), object_size=3)
    flip(block_of(made, *every[-3]))
    repository = await opened(tmp_path, workers)
    counts = []
    for level in ("structure", "packs", "chunks"):
        steps: list[tuple[int, int]] = []
        check = await repository.verify(level, advance=lambda a, b, s=steps: s.append((a, b)))
        counts.append(len(check.findings))
        assert steps[-1][0] == steps[-1][1]
        assert check.points == 3
    assert counts == [1, 2, 3]
    first = [point for point in await repository.points() if point.id == "first"]
    check = await repository.verify("structure", first)
    assert [hurt.point for hurt in check.findings[0].hurts] == ["pool/vm 1/first"]
    await repository.close()


async def test_a_broken_version_beside_sound_ones(tmp_path: Path, workers: Workers) -> None:
    made = Storage(tmp_path, packed=False)
    golden = three_versions(made)
    (path,) = tmp_path.glob("versions/*/*/first")
    path.write_bytes(b"x" * path.stat().st_size)
    repository = await opened(tmp_path, workers)
    points = await repository.points()
    (bad,) = [point for point in points if "damaged" in point.flags]
    assert (bad.id, bad.disks) == ("first", ())
    assert str(path) in str(bad.facts["reason"])
    with pytest.raises(CorruptImage):
        await repository.open_disk(bad, "disk")
    assert await broken_blocks(repository, golden) == {}
    (finding,) = (await repository.verify("structure")).findings
    assert finding.key.endswith("/first")
    await repository.close()


BLOCKS: dict[str, list[Any]] = {
    "index beyond the disk": [{"idx": 99, "uid": {"left": 1, "right": 1}, "size": BLOCK}],
    "indexes out of order": [
        {"idx": 1, "uid": {"left": None, "right": None}, "size": BLOCK},
        {"idx": 0, "uid": {"left": None, "right": None}, "size": BLOCK},
    ],
    "a negative index": [{"idx": -1, "uid": {"left": 1, "right": 1}, "size": BLOCK}],
    "another size": [{"idx": 0, "uid": {"left": 1, "right": 1}, "size": 1 << 40}],
    "a uid too large": [{"idx": 0, "uid": {"left": 1 << 70, "right": 1}, "size": BLOCK}],
    "half a uid": [{"idx": 0, "uid": {"left": 1, "right": None}, "size": BLOCK}],
    "no checksum": [{"idx": 0, "uid": {"left": 1, "right": 1}, "size": BLOCK}],
    "no block": [{"nothing": 1}],
    "no rows": ["x"],
}


@pytest.mark.parametrize("what", BLOCKS)
async def test_hostile_lists_of_blocks(tmp_path: Path, workers: Workers, what: str) -> None:
    made = Storage(tmp_path)
    made.version("one", random_disk(SIZE), blocks=BLOCKS[what])
    repository = await opened(tmp_path, workers)
    (point,) = await repository.points()
    with pytest.raises(CorruptImage, match="list of blocks"):
        await repository.open_disk(point, "disk")
    assert len((await repository.verify("structure")).findings) == 1
    await repository.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"size": -1},
        {"size": 1 << 62},
        {"block_size": 0},
        {"block_size": 1 << 40},
        {"size": 1 << 50, "block_size": 512},
        {"date": "yesterday"},
        {"uid": "another"},
        {"volume": ""},
        {"volume": 5},
        {"snapshot": "a\nb"},
    ],
)
async def test_hostile_heads(tmp_path: Path, workers: Workers, changes: dict[str, Any]) -> None:
    made = Storage(tmp_path)
    made.version("one", random_disk(SIZE), **changes)
    repository = await opened(tmp_path, workers)
    (point,) = await repository.points()
    assert point.flags == ("damaged",)
    with pytest.raises(DiskError):
        await repository.open_disk(point, "disk")
    await repository.close()


async def test_bombs(tmp_path: Path, workers: Workers) -> None:
    made = Storage(tmp_path)
    made.version("one", random_disk(SIZE))
    bomb = zstandard.ZstdCompressor().compress(bytes(300 << 20))
    path = block_of(made, 1, 1)
    path.write_bytes(bomb)
    edit(path, object_size=len(bomb))
    (version,) = tmp_path.glob("versions/*/*/one")
    huge = zstandard.ZstdCompressor(write_content_size=False).compress(b" " * (300 << 20))
    other = version.with_name("bomb")
    made.put("versions/" + _fan("bomb"), b"{}")
    other = tmp_path / "versions" / _fan("bomb")
    other.write_bytes(huge)
    edit(other, object_size=len(huge), size=300 << 20, transforms=_zstd(300 << 20))
    repository = await opened(tmp_path, workers)
    tracemalloc.start()
    points = await repository.points()
    assert {point.flags for point in points} == {(), ("damaged",)}
    sound = next(point for point in points if not point.flags)
    disk = await repository.open_disk(sound, "disk")
    with pytest.raises(CorruptImage):
        await content(disk, 0, BLOCK)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
    await disk.close()
    await repository.close()


def _fan(uid: str) -> str:
    import hashlib

    digest = hashlib.md5(uid.encode()).hexdigest()
    return f"{digest[:2]}/{digest[2:4]}/{uid}"


def _zstd(size: int) -> list[dict[str, Any]]:
    return [{"name": "zs", "module": "zstd", "materials": {"original_size": size}}]


async def test_links_out_of_the_storage_are_not_followed(tmp_path: Path, workers: Workers) -> None:
    made = Storage(tmp_path / "data")
    golden = three_versions(made)
    path = block_of(made, 1, 5)
    path.rename(tmp_path / "secret")
    path.symlink_to(tmp_path / "secret")
    repository = await opened(tmp_path / "data", workers)
    assert await broken_blocks(repository, golden) == {uid: [4] for uid in golden}
    await repository.close()


def test_a_pipe_that_is_called_as_the_configuration_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "benji.yaml"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="no file of at most"):
        load(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "while parsing"),
        ("a: b", "no storages"),
        ("storages: 5", "no storages"),
        ("&a [*a, *a", "while parsing"),
    ],
)
def test_broken_configurations(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "benji.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        load(str(tmp_path / "none.yaml"))


class Sound:
    """A storage, and what its disk was; too large to be shown by hypothesis."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.golden = three_versions(Storage(path))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32))
def test_any_change_is_an_error_or_harmless(sound: Sound, seed: int) -> None:
    path, golden = sound.path, sound.golden
    chance = random.Random(seed)
    files = sorted(each for each in path.rglob("*") if each.is_file())
    file = chance.choice(files)
    before = file.read_bytes()
    data = bytearray(before)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(data) + 1)
        if chance.randrange(2):
            data[at : at + 1] = chance.randbytes(1)
        else:
            data[at : at + chance.randrange(9)] = chance.choice((b"", b"null", b"-1", b"99999999"))
    file.write_bytes(data)
    try:
        asyncio.run(_read_all(path, golden, version="versions" in file.relative_to(path).parts))
    finally:
        file.write_bytes(before)


async def _read_all(path: Path, golden: dict[str, bytes], *, version: bool) -> None:
    async with running_workers(4) as workers:
        repository = await opened(path, workers)
        if not version:  # of blocks every byte is proven
            await broken_blocks(repository, golden)
        for point in await repository.points():
            for facts in point.disks:
                try:
                    disk = await repository.open_disk(point, facts.name)
                except DiskError:
                    continue
                await _error_of(content(disk, 0, min(disk.size, 1 << 20)))
                await disk.close()
        await repository.verify("chunks")
        await repository.close()
