"""Repositories that other tools wrote: archives too large to be kept with the source.

They are looked for in the folder NBDSRV_FIXTURES names, in ``fixtures`` beside ``tests``, and in
``shared/fixtures`` beside the project.
"""

import os
import subprocess
from pathlib import Path

import pytest

__all__ = ["unpack_fixture"]

_ROOT = Path(__file__).parents[2]


def unpack_fixture(name: str, into: Path) -> Path:
    """Unpack an archive; skips the test where it is not to be had, and fails under CI=true."""
    given = os.environ.get("NBDSRV_FIXTURES")
    places = [Path(given)] if given else []
    places += [_ROOT / "fixtures", _ROOT.parent / "shared" / "fixtures"]
    found = next((place / name for place in places if (place / name).is_file()), None)
    if found is None:
        text = f"no {name}: set NBDSRV_FIXTURES to the folder it is in"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(text)
        pytest.skip(text)
    subprocess.run(["tar", "-I", "zstd", "-xf", found, "-C", into], check=True, timeout=60)
    return into
