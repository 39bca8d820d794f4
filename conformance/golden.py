"""Images of other formats beside the raw content they hold, made and read by qemu-img.

::

    golden.img                                                 size: an odd number of sectors
    | random | hole | text | written zeroes | hole | random ... | hole | random |

A *golden* is that content; every check compares what came through our server with it, or with what
qemu-img itself reads from the same image, which differs where a format rounds its size up.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conformance.context import Context
from conformance.image import KIB, MIB, Image, Span, file_digest
from conformance.process import Finished
from conformance.registry import expect, expect_in
from conformance.server import Server, server_environment

__all__ = [
    "SIZE",
    "Golden",
    "expect_refused",
    "expect_same_content",
    "expect_same_map",
    "nbdsrv",
    "read_back",
    "served",
]

SIZE = 20 * MIB + 64 * KIB + 5 * 512

_TEXT_AT, _TEXT = 4 * MIB, 2 * MIB
_SPANS = (
    Span(0, MIB),
    Span(8 * MIB, 64 * KIB, random=False),
    Span(12 * MIB, MIB + 192 * KIB),
    Span(SIZE // (64 * KIB) * 64 * KIB, SIZE % (64 * KIB)),
)


class Golden:
    """The content, as a raw file in a check's directory."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.raw = Image(context.directory / "golden.img", SIZE, _SPANS).create()
        source = random.Random(7)
        words = [b"%08x: some text that compresses\n" % source.randrange(999) for _ in range(400)]
        with self.raw.path.open("r+b") as file:
            file.seek(_TEXT_AT)
            file.write((b"".join(words) * 256)[:_TEXT])
        self.digest = self.raw.digest()

    def convert(self, form: str, name: str, options: str = "", *flags: str) -> Path:
        """The content as an image of this format, in the check's directory."""
        chosen = ("-o", options) if options else ()
        words = ("-f", "raw", "-O", form, *chosen, *flags)
        self.context.run("qemu-img", "convert", *words, self.raw.path, name)
        return self.context.directory / name


def served(context: Context, source: str | Path, *, write: bool = False) -> Server:
    """Our server with this SOURCE as its default export."""
    return context.serve(Image(Path(source), 0, ()), write=write)


def nbdsrv(context: Context, *words: str | Path, code: int | None = 0) -> Finished:
    """Run one of our commands in the check's directory."""
    command = (sys.executable, "-m", "nbdsrv", *words)
    return context.run(*command, code=code, environment=server_environment(), timeout_s=60)


def expect_refused(context: Context, source: str | Path, *words: str) -> None:
    """``nbdsrv info`` fails with one line that has all of ``words`` in it."""
    finished = nbdsrv(context, "info", source, code=1)
    expect(1, len(finished.stderr.splitlines()), f"lines of {finished.stderr!r}")
    for word in words:
        expect_in(word, finished.stderr, "the error")


def _data_ranges(rows: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Where data is, (start, end) merged, from ``qemu-img map --output=json`` or our ``map``."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if not row["data"] or row["zero"]:
            continue
        start, end = row["start"], row["start"] + row["length"]
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


def read_back(context: Context, path: Path, form: str) -> str:
    """SHA-256 of what qemu-img reads from an image."""
    context.run("qemu-img", "convert", "-f", form, "-O", "raw", path, "reference")
    return file_digest(context.directory / "reference")


def expect_same_content(context: Context, server: Server, digest: str) -> None:
    """What nbdcopy downloads has this SHA-256."""
    context.run("nbdcopy", server.uri(), "download")
    expect(digest, file_digest(context.directory / "download"), "sha256 of nbdcopy's download")
    (context.directory / "download").unlink()


def expect_same_map(context: Context, path: Path, form: str, source: str | None = None) -> None:
    """``qemu-img map`` and ``nbdsrv map`` agree on where data is."""
    text = context.run("qemu-img", "map", "--output=json", "-f", form, path).stdout
    ours = json.loads(nbdsrv(context, "map", "--json", source or path).stdout)
    expect(_data_ranges(json.loads(text)), _data_ranges(ours), "data by map")
