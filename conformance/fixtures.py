"""Repositories that other tools wrote: the archives of ``tests/fixtures``."""

from pathlib import Path

from conformance.context import Context
from conformance.process import PROJECT

__all__ = ["unpacked"]

FIXTURES = PROJECT / "tests" / "fixtures"


def unpacked(context: Context, name: str) -> Path:
    """The check's directory, with an archive unpacked into it."""
    context.run("tar", "-I", "zstd", "-xf", FIXTURES / name)
    return context.directory
