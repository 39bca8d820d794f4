"""What QEMU's tools make of an image: they write the golden images, and read them beside us.

::

    raw, commands ── qemu-img, qemu-io ──> image ──┬── qemu-img convert, map, check ──> expected
                                                   └── nbdsrv ──> found
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.opening import Opening, open_image
from protocol.extents import DATA, HOLE, ZERO
from tests.disk.check_disk import OpenDisk
from tests.disk.reading import content
from tests.formats.images import Image

__all__ = [
    "converted",
    "create",
    "opener",
    "qemu_img",
    "qemu_io",
    "read_by_qemu",
    "refusal",
    "states_by_qemu",
]


def qemu_img(*arguments: str | Path) -> str:
    """Run it; what it printed."""
    return _run("qemu-img", *arguments)


def qemu_io(path: str | Path, *commands: str, options: tuple[str, ...] = ()) -> str:
    """Change an image, or read it."""
    given = [word for command in commands for word in ("-c", command)]
    return _run("qemu-io", *options, *given, path)


def _run(program: str, *arguments: str | Path) -> str:
    if shutil.which(program) is None:
        assert os.environ.get("CI") != "true", f"{program} is expected here"
        pytest.skip(f"{program} is not installed")
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, f"{program} {arguments}: {done.stderr}{done.stdout}"
    return done.stdout


def create(path: Path, size: str, *options: str, kind: str = "qcow2") -> Path:
    """An empty image; ``options`` are words for ``qemu-img create``."""
    qemu_img("create", "-q", "-f", kind, *options, path, size)
    return path


def converted(
    directory: Path, image: Image, *options: str, kind: str = "qcow2"
) -> tuple[Path, bytes]:
    """An image with this content, and the content."""
    raw, path = directory / f"{image.name}.raw", directory / f"{image.name}.{kind}"
    golden = image.make(str(raw))
    qemu_img("convert", "-f", "raw", "-O", kind, *options, raw, path)
    return path, golden


def read_by_qemu(path: Path, kind: str = "qcow2", *options: str) -> bytes:
    """The whole content."""
    raw = path.with_name(path.name + ".read")
    qemu_img("convert", "-f", kind, "-O", "raw", *options, path, raw)
    return raw.read_bytes()


def states_by_qemu(path: Path, kind: str = "qcow2") -> bytes:
    """The state of every byte: data, zeroes, or not there."""
    states = bytearray()
    for entry in json.loads(qemu_img("map", "--output=json", "-f", kind, path)):
        state = DATA if entry["data"] and not entry["zero"] else HOLE
        if state == HOLE and entry["present"]:
            state = ZERO
        assert entry["start"] == len(states)
        states += bytes([state]) * entry["length"]
    return bytes(states)


def opener(path: Path, workers: Workers, kind: str = "", snapshot: str = "") -> OpenDisk:
    """Opens it anew each time."""

    async def open_disk() -> Disk:
        return await open_image(str(path), kind, Opening(workers, snapshot=snapshot))

    return open_disk


async def refusal(path: Path, workers: Workers, kind: str = "", snapshot: str = "") -> DiskError:
    """What opening the image and reading all of it raises."""
    try:
        disk = await opener(path, workers, kind, snapshot)()
    except DiskError as error:
        return error
    try:
        with pytest.raises(DiskError) as raised:
            await content(disk, 0, disk.size)
        return raised.value
    finally:
        await disk.close()
