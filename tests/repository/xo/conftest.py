"""Worker threads for the tests of this folder."""

from collections.abc import AsyncIterator

import pytest_asyncio

from nbdsrv.disk.workers import Workers
from tests.disk.threads import running_workers


@pytest_asyncio.fixture
async def workers() -> AsyncIterator[Workers]:
    """Threads whose results reach the test's event loop."""
    async with running_workers() as running:
        yield running
