"""Backups into Xen Orchestra repositories for the tests: a clock, a repository, a guest."""

import json
import uuid
from pathlib import Path

from nbdsrv.backup.engine import Order
from nbdsrv.export.grammar import parse_source
from nbdsrv.repository.destination import Storage
from nbdsrv.repository.xo.layout import ENCRYPTION, METADATA
from nbdsrv.repository.xo.sealing import OPEN, Sealing
from nbdsrv.repository.xo.writer_destination import XoDestination, open_xo_destination

__all__ = ["KEY", "MIB", "changes_since", "files", "latest", "make_remote", "opened"]

MIB = 1 << 20
KEY = "0123456789abcdef0123456789abcdef"


def make_remote(root: Path, algorithm: str = OPEN) -> Path:
    """An empty remote, as Xen Orchestra makes it."""
    root.mkdir(exist_ok=True)
    sealing = Sealing.none() if algorithm == OPEN else Sealing.with_key(algorithm, KEY, "test")
    (root / ENCRYPTION).write_bytes(json.dumps({"algorithm": algorithm}).encode())
    (root / METADATA).write_bytes(sealing.seal(json.dumps({"random": str(uuid.uuid4())}).encode()))
    return root


def opened(root: Path, layout: str = "", packing: str = "") -> XoDestination:
    """To be written."""
    return open_xo_destination(parse_source(f"xo:{root}"), Storage(layout, packing), lambda: KEY)


def changes_since(root: Path, context: str, group: str = "vm", **more: float) -> Order:
    """An order that believes what ``context`` says has changed since the latest point."""
    return Order(group, since=latest(root), changed=context, **more)  # type: ignore[arg-type]


def latest(root: Path) -> str:
    return max(path.stem for path in root.glob("xo-vm-backups/*/[0-9]*.json"))


def files(root: Path) -> list[str]:
    """Names of all files, to see what is left."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
