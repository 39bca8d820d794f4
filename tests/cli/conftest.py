"""An image for the tests of the program."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.formats.images import Image


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A small raw image with a hole, of an odd size."""
    path = tmp_path / "disk.img"
    Image("cli", 100_001, ((0, 4096), (65_536, 10))).make(str(path))
    return path


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: the path of a socket has 107 bytes at most, and tests run side by side."""
    with tempfile.TemporaryDirectory(prefix="nbd-") as directory:
        yield Path(directory)
