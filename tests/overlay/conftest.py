"""Worker threads for the tests of this folder."""

from collections.abc import AsyncIterator

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
