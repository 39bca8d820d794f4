"""Exports: opened once, shared, closed behind the last; what a catalogue finds and shows."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError
from nbdsrv.export.exports import Catalogue, Export, export_info
from nbdsrv.export.grammar import parse_source
from nbdsrv.export.opener import open_source
from protocol.constants import TransmissionFlag
from tests.disk.reading import content


def open_files(path: Path) -> int:
    """How often this process has ``path`` open."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{fd}") == str(path)
        except OSError:
            continue  # the listing's own descriptor
    return found


class Opener:
    """Opens a real image, and counts how often it was asked to."""

    def __init__(self, workers: Workers, path: Path, *, writable: bool = False) -> None:
        self._workers, self._path, self._writable = workers, path, writable
        self.calls = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self) -> Disk:
        self.calls += 1
        await self.go_on.wait()
        source = parse_source(str(self._path))
        return await open_source(source, self._workers, writable=self._writable)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "disk.img").write_bytes(b"golden" * 1000)
    return tmp_path / "disk.img"


async def test_nothing_is_opened_before_it_is_wanted(workers: Workers, path: Path) -> None:
    opener = Opener(workers, path)
    Catalogue().add(Export("disk", opener))
    assert opener.calls == 0
    assert open_files(path) == 0


async def test_shared_by_all_and_closed_behind_the_last(workers: Workers, path: Path) -> None:
    opener = Opener(workers, path)
    export = Export("disk", opener)
    disks = [await export.acquire() for _ in range(3)]
    assert disks[0] is disks[1] is disks[2]
    assert open_files(path) == 1
    await export.release()
    await export.release()
    assert await content(disks[0], 0, 6) == b"golden"
    await export.release()
    assert open_files(path) == 0
    assert opener.calls == 1
    again = await export.acquire()
    assert again is not disks[0]
    assert await content(again, 0, 6) == b"golden"
    await export.release()
    assert (opener.calls, open_files(path)) == (2, 0)


async def test_many_who_come_at_once_open_once(workers: Workers, path: Path) -> None:
    opener = Opener(workers, path)
    opener.go_on.clear()
    export = Export("disk", opener)
    waiting = [asyncio.ensure_future(export.acquire()) for _ in range(50)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert opener.calls == 1
    opener.go_on.set()
    disks = await asyncio.gather(*waiting)
    assert len({id(disk) for disk in disks}) == 1
    await asyncio.gather(*(export.release() for _ in disks))
    assert (opener.calls, open_files(path)) == (1, 0)


async def test_whoever_gives_up_while_it_opens_leaves_the_others_be(
    workers: Workers, path: Path
) -> None:
    opener = Opener(workers, path)
    opener.go_on.clear()
    export = Export("disk", opener)
    first, second = (asyncio.ensure_future(export.acquire()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    opener.go_on.set()
    disk = await second
    assert await content(disk, 0, 6) == b"golden"
    await asyncio.wait([first])
    assert first.cancelled()
    await export.release()
    assert open_files(path) == 0


async def test_a_failure_to_open_is_tried_again_by_the_next(workers: Workers, path: Path) -> None:
    opener = Opener(workers, path)
    export = Export("disk", opener)
    path.rename(path.with_name("away"))
    for _ in range(2):
        with pytest.raises(DiskError, match="No such file"):
            await export.acquire()
    path.with_name("away").rename(path)
    assert (await export.acquire()).size == 6000
    await export.release()
    assert (opener.calls, open_files(path)) == (3, 0)


async def test_coming_and_going_at_random(workers: Workers, path: Path) -> None:
    export = Export("disk", Opener(workers, path))

    async def client(pause: int) -> None:
        for _ in range(5):
            disk = await export.acquire()
            for _ in range(pause):
                await asyncio.sleep(0)
            assert await content(disk, 0, 6) == b"golden"
            await export.release()

    await asyncio.gather(*(client(pause % 7) for pause in range(20)))
    assert open_files(path) == 0


def catalogue(*exports: Export) -> Catalogue:
    made = Catalogue()
    for export in exports:
        made.add(export)
    return made


async def never() -> Disk:
    raise AssertionError("only names are looked at here")


async def test_a_lone_export_is_the_default_one() -> None:
    only = Export("disk", never)
    assert await catalogue(only).find("") is only
    assert await catalogue(only).find("disk") is only
    assert await catalogue(only).find("Disk") is None


async def test_with_several_the_default_is_only_the_one_called_so() -> None:
    one, two, unnamed = Export("one", never), Export("two", never), Export("", never)
    assert await catalogue(one, two).find("") is None
    assert await catalogue(one, unnamed).find("") is unnamed
    assert await catalogue(one, two).find("two") is two


def names(listed: Sequence[tuple[str, str]]) -> list[str]:
    return [name for name, _ in listed]


async def test_exports_for_tls_only_are_not_shown_in_plain_text() -> None:
    exports = catalogue(Export("open", never, "text"), Export("secret", never, tls_only=True))
    assert await exports.listed(secure=False) == [("open", "text")]
    assert names(await exports.listed(secure=True)) == ["open", "secret"]


def test_names_that_cannot_be() -> None:
    exports = catalogue(Export("disk", never), Export("x" * 4096, never))
    for name in ("disk", "y" * 4097, "\u00e4" * 2049, "a\0b"):
        with pytest.raises(ConfigError):
            exports.add(Export(name, never))
    assert len(exports) == 2


def test_a_name_that_is_not_utf8_is_refused_in_words() -> None:
    with pytest.raises(ConfigError):
        catalogue(Export(os.fsdecode(b"\xff.img"), never))


@pytest.mark.parametrize("writable", [False, True])
async def test_flags_say_what_the_disk_can_do(
    workers: Workers, path: Path, *, writable: bool
) -> None:
    export = Export("disk", Opener(workers, path, writable=writable), "some text")
    disk = await export.acquire()
    info = export_info(export, disk)
    assert (info.name, info.size, info.description) == ("disk", 6000, "some text")
    changing = (
        TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.SEND_TRIM
        | TransmissionFlag.SEND_WRITE_ZEROES
        | TransmissionFlag.SEND_FAST_ZERO
    )
    always = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_CACHE
    always |= TransmissionFlag.CAN_MULTI_CONN
    expected = always | (changing if writable else TransmissionFlag.READ_ONLY)
    assert info.flags == expected
    assert (Ability.WRITE in disk.abilities) is writable
    await export.release()
