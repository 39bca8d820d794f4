"""Worker threads, and a datastore, for the tests of this folder."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

pytest.register_assert_rewrite("tests.disk.check_disk")

from nbdsrv.disk.workers import Workers  # noqa: E402 - once asserts are rewritten
from tests.disk.threads import running_workers  # noqa: E402
from tests.repository.pbs.encoder import Datastore  # noqa: E402


@pytest_asyncio.fixture
async def workers() -> AsyncIterator[Workers]:
    """Threads whose results reach the test's event loop."""
    async with running_workers() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    """An empty datastore."""
    return Datastore(tmp_path / "store")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine's environment says."""
    for name in (
        "NBDSRV_PBS_KEYFILE",
        "NBDSRV_PASSPHRASE",
        "NBDSRV_PASSPHRASE_FILE",
        "PBS_ENCRYPTION_PASSWORD",
        "PBS_ENCRYPTION_PASSWORD_FILE",
    ):
        monkeypatch.delenv(name, raising=False)
