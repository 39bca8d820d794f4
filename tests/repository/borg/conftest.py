"""Worker threads, and repositories that borg itself has made."""

import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

pytest.register_assert_rewrite("tests.disk.check_disk")

from nbdsrv.disk.workers import Workers  # noqa: E402 - once asserts are rewritten
from tests.disk.threads import running_workers  # noqa: E402
from tests.repository.borg.archived import Archived, archive, copied  # noqa: E402


@pytest_asyncio.fixture
async def workers() -> AsyncIterator[Workers]:
    """Threads whose results reach the test's event loop."""
    async with running_workers() as running:
        yield running


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of ours or borg's is set; borg's directories would be below a home that is empty."""
    for name in list(os.environ):
        if name.startswith(("NBDSRV_", "BORG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Archived:
    """Not encrypted; never changed."""
    return archive(tmp_path_factory.mktemp("borg"), "none")


@pytest.fixture
def archived(original: Archived, tmp_path_factory: pytest.TempPathFactory) -> Archived:
    """A copy that may be damaged."""
    return copied(original, tmp_path_factory.mktemp("copy") / "repository")
