"""An image for the tests of the program."""

from pathlib import Path

import pytest

from tests.formats.images import Image


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A small raw image with a hole, of an odd size."""
    path = tmp_path / "disk.img"
    Image("cli", 100_001, ((0, 4096), (65_536, 10))).make(str(path))
    return path
