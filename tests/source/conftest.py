"""Worker threads for the tests of this folder."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

pytest.register_assert_rewrite("tests.disk.check_disk", "tests.disk.changes")

from nbdsrv.disk.workers import Workers  # noqa: E402 - once asserts are rewritten
from tests.disk.threads import running_workers  # noqa: E402


@pytest_asyncio.fixture
async def workers() -> AsyncIterator[Workers]:
    """Threads whose results reach the test's event loop."""
    async with running_workers() as running:
        yield running


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: the path of a socket has 107 bytes at most, and tests run side by side."""
    with tempfile.TemporaryDirectory(prefix="nbd-") as directory:
        yield Path(directory)
