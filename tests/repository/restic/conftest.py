"""Worker threads, and repositories that restic itself has made."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

pytest.register_assert_rewrite("tests.disk.check_disk")

from nbdsrv.disk.workers import Workers  # noqa: E402 - once asserts are rewritten
from tests.disk.threads import running_workers  # noqa: E402
from tests.repository.restic.made import PASSWORD, Made, copied, make  # noqa: E402


@pytest_asyncio.fixture
async def workers() -> AsyncIterator[Workers]:
    """Threads whose results reach the test's event loop."""
    async with running_workers() as running:
        yield running


@pytest.fixture(autouse=True)
def password(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users set it."""
    for name in list(os.environ):
        if name.startswith(("NBDSRV_", "RESTIC_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RESTIC_PASSWORD", PASSWORD)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of version 2; never changed."""
    return make(tmp_path_factory.mktemp("restic"), version=2)


@pytest.fixture(scope="session")
def original_v1(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of version 1; never changed."""
    return make(tmp_path_factory.mktemp("restic1"), version=1)


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    """A copy that may be damaged."""
    return copied(original, tmp_path / "repository")
