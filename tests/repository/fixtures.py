"""Repositories that other tools wrote: archives, whose README says what is right."""

import subprocess
from pathlib import Path

__all__ = ["FIXTURES", "unpack_fixture"]

FIXTURES = Path(__file__).parents[1] / "fixtures"


def unpack_fixture(name: str, into: Path) -> Path:
    """Unpack an archive; returns ``into``."""
    found = FIXTURES / name
    subprocess.run(["tar", "-I", "zstd", "-xf", found, "-C", into], check=True, timeout=60)
    return into
