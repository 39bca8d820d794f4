"""Where peers that are downloaded, not installed, are kept between runs.

Rule: outside the checkout, below ``$XDG_CACHE_HOME/nbdsrv`` (``~/.cache/nbdsrv``), one directory
per exact version, that appears complete or not at all.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from conformance.outcome import CheckFailedError, MissingPeerError

__all__ = ["cached"]


def cached(name: str, fill: Callable[[Path], None]) -> Path:
    """The cache directory of this name, filled first if it does not exist.

    Two runs at once may both fill it; the first to finish wins.

    Raises:
        MissingPeerError: filling it failed; nothing is left behind.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbdsrv"
    final = base / name
    if final.is_dir():
        return final
    base.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=base))
    try:
        try:
            fill(scratch)
        except CheckFailedError as error:
            raise MissingPeerError(f"{name} could not be downloaded: {error}") from error
        try:
            scratch.rename(final)
        except OSError:
            if not final.is_dir():
                raise
        return final
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
