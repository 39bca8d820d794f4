"""Worker threads, and real casync where it is installed."""

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

pytest.register_assert_rewrite("tests.disk.check_disk")

from nbdsrv.disk.workers import Workers  # noqa: E402 - once asserts are rewritten
from tests.disk.threads import running_workers  # noqa: E402

Make = Callable[..., Path]


@pytest_asyncio.fixture
async def workers() -> AsyncIterator[Workers]:
    """Threads whose results reach the test's event loop."""
    async with running_workers() as running:
        yield running


@pytest.fixture(autouse=True)
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine's environment says."""
    monkeypatch.delenv("NBDSRV_CASYNC_STORE", raising=False)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(content, "vm1.caibx", ...)``: an index and its chunks, by casync itself."""
    if shutil.which("casync") is None:
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail("casync is not installed")
        pytest.skip("casync is not installed")

    def run(content: bytes, name: str, *options: str, store: str = "default.castr") -> Path:
        index = tmp_path / name
        index.parent.mkdir(parents=True, exist_ok=True)
        raw = tmp_path / "disk.raw"
        raw.write_bytes(content)
        where = f"--store={index.parent / store}"
        subprocess.run(
            ["casync", *options, where, "make", index, raw],
            check=True,
            capture_output=True,
            timeout=60,
        )
        raw.unlink()
        return index

    return run
