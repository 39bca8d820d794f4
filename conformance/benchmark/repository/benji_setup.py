"""Benji's virtual environment, made once in the cache directory, and its repair.

``pip install benji`` fails to build on current Pythons: its pins are of 2022. What it needs is
named here instead. Its NBD server passes ``loop=`` to asyncio.start_server, which Python 3.10 has
removed; that argument is taken out, and nothing else of it is touched.
"""

import os
import shutil
import sys
from pathlib import Path

from conformance.benchmark.report import BenchmarkError
from conformance.benchmark.repository.command import run

__all__ = ["VERSION", "benji_command"]

VERSION = "0.17.0"
REQUIREMENTS = (
    *("ruamel.yaml<0.18", "sqlalchemy>=1.4,<1.5", "alembic<1.9", "pyparsing<3"),
    *("python-dateutil<3", "pycryptodome<4", "dateparser<1.2", "zstandard", "sparsebitfield"),
    *("cerberus", "diskcache", "structlog", "semantic_version", "PrettyTable", "setproctitle"),
    *("argcomplete", "colorama", "setuptools<81"),
)
BROKEN, REPAIRED = "addr, port, loop=loop)", "addr, port)"


def benji_command(cache: str) -> list[str]:
    """The words ``benji`` is started with, its environment made first if need be."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    final = os.path.join(cache, f"benji-{VERSION}-python{python}")
    if not os.path.isdir(final):
        _make(final)
    # Not the script pip made: that names the directory it was made in.
    code = "import sys; from benji.scripts.benji import main; sys.exit(main())"
    return [os.path.join(final, "bin", "python"), "-c", code]


def _make(final: str) -> None:
    partial = f"{final}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    run([sys.executable, "-m", "venv", partial])
    pip = [os.path.join(partial, "bin", "python"), "-m", "pip", "install", "--quiet"]
    run([*pip, "--no-deps", f"benji=={VERSION}"])
    run([*pip, *REQUIREMENTS])
    _repair(partial)
    os.rename(partial, final)


def _repair(environment: str) -> None:
    for path in Path(environment).glob("lib/python*/site-packages/benji/nbdserver.py"):
        source = path.read_text(encoding="utf-8")
        if source.count(BROKEN) == 1:
            path.write_text(source.replace(BROKEN, REPAIRED), encoding="utf-8")
            return
    raise BenchmarkError("benji's NBD server is not the one this repair is for")
