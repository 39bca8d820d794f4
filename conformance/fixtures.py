"""Repositories that other tools wrote: archives too large to be kept with the source.

They are looked for in the folder NBDSRV_FIXTURES names, in ``fixtures`` in the project, and in
``shared/fixtures`` beside it.
"""

import os
from pathlib import Path

from conformance.context import Context
from conformance.outcome import MissingPeerError
from conformance.process import PROJECT

__all__ = ["unpacked"]


def unpacked(context: Context, name: str) -> Path:
    """The check's directory, with an archive unpacked into it.

    Raises:
        MissingPeerError: it is not to be had.
    """
    given = os.environ.get("NBDSRV_FIXTURES")
    places = [Path(given)] if given else []
    places += [PROJECT / "fixtures", PROJECT.parent / "shared" / "fixtures"]
    found = next((place / name for place in places if (place / name).is_file()), None)
    if found is None:
        raise MissingPeerError(f"no {name}: set NBDSRV_FIXTURES to the folder it is in")
    context.run("tar", "-I", "zstd", "-xf", found)
    return context.directory
