"""Another tool's repository, served: what every such check asks of it.

::

    states of a disk ── the tool itself ──> its repository ── nbdsrv serve ──> nbdinfo, nbdcopy
                                                │
                                    is byte for byte as before, when all is done
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from conformance.context import Context
from conformance.image import file_digest
from conformance.outcome import CheckFailedError, MissingPeerError
from conformance.registry import expect
from conformance.repository import Repository
from conformance.server import Server

__all__ = ["commands", "listed", "prove", "read_only", "state_of"]


def commands(context: Context, source: str, environment: Mapping[str, str]) -> Repository:
    """Our commands on that repository."""
    return Repository(context, source, environment)


def listed(context: Context, server: Server) -> list[str]:
    """The names nbdinfo lists."""
    text = context.run("nbdinfo", "--list", "--json", server.uri()).stdout
    return sorted(each["export-name"] for each in json.loads(text)["exports"])


def prove(
    context: Context, server: Server, states: Mapping[str, Path], *, holes: bool = True
) -> None:
    """Export by export: nbdcopy gets the state's content, and no hole is called one that is none.

    Args:
        context: of the check.
        server: serves them.
        states: by name, the disk as it was.
        holes: must there be some?

    Raises:
        CheckFailedError: it does not.
    """
    download = context.directory / "download.img"
    for name, state in states.items():
        uri = server.uri(name)
        context.run("nbdcopy", "-C", "4", uri, download, timeout_s=120)
        expect(file_digest(state), file_digest(download), f"SHA-256 of {name}")
        download.unlink()
        rows = json.loads(context.run("nbdinfo", "--map", "--json", uri).stdout)
        data = state.read_bytes()
        expect(len(data), sum(row["length"] for row in rows), f"bytes the map of {name} is about")
        told = [row for row in rows if row["type"] & 2]
        lies = [row for row in told if any(data[row["offset"] : row["offset"] + row["length"]])]
        expect([], lies, f"holes of {name} with data in them")
        if holes and not told:
            raise CheckFailedError(f"{name}: no holes at all")


def state_of(path: Path) -> dict[str, str]:
    """Everything that must not change: names, modification times, content."""
    found = {}
    for each in sorted(path.rglob("*")):
        digest = hashlib.sha256(each.read_bytes()).hexdigest() if each.is_file() else ""
        found[str(each.relative_to(path))] = f"{each.stat().st_mtime_ns} {digest}"
    return found


def read_only(context: Context, path: Path) -> Path:
    """The same directory on a read-only mount, until the check is over.

    Raises:
        MissingPeerError: we may not mount.
    """
    if os.geteuid() != 0:
        raise MissingPeerError("read-only mounts need root")
    place = context.directory / "read-only"
    place.mkdir()
    mounted = context.run("mount", "--bind", path, place, code=None)
    if mounted.code:
        raise MissingPeerError(f"no bind mounts here: {mounted.stderr.strip()}")
    context.at_end(lambda: context.run("umount", place))
    context.run("mount", "-o", "remount,bind,ro", place)
    return place
