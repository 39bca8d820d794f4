"""One case: open the mutant, read from it everywhere, judge.

What a served mutant has to be, whatever it was mutated into::

    runs       cover what was asked, and lie within the image's files
    extents    are in order and complete; what they call zero reads as zeroes
    reads      give the same twice
    facts      can be printed as JSON
    the end    no descriptor is left open

A read that fails with a DiskError is as good as a refusal, only later.
"""

import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.runs import BlockRun, FileRun, RemoteRun, Run, ZeroRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, NbdsrvError
from nbdsrv.export.grammar import parse_source
from nbdsrv.export.opener import open_source
from nbdsrv.formats.image_file import ImageFile

__all__ = [
    "FoundError",
    "Outcome",
    "check_descriptors",
    "check_message",
    "examine",
    "open_descriptors",
]

WINDOW = 1 << 20
"""Bytes read at a time."""
BEGINNING = 4 << 20
"""Bytes from the start that are looked at completely: more than the specimens have."""
MAX_ANSWERS = 200
"""Block status answers of a window; a mutant may have as many extents as it likes."""
LONGEST_MESSAGE = 2500
"""Characters: two paths of a thousand, and what is to be said of them."""
COUNTED = {"qcow2"}
"""Formats with reference counts, where several users of a cluster are nothing unusual."""
MAX_SIZE = 2**63 - 1

Place = tuple[int, int, int, int]
"""Page of the disk, inode, and from where to where in that file a run is."""

_CORRUPT = re.compile(r"corrupt image: .+ at \d+: .+")
_CORRUPT_CHAIN = re.compile(r"corrupt image: .+(its parent|images in a chain)")
"""What is wrong with a chain has no offset in one file."""


class FoundError(Exception):
    """The reader did what no reader may do."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(slots=True)
class Outcome:
    """What became of a case: ``accepted``, ``refused`` at open, or ``broken`` at some read.

    ``beginning`` is what was read from an accepted one.
    """

    verdict: str
    detail: str = ""
    beginning: bytes = b""


async def examine(
    source: str, names: Sequence[str], workers: Workers, rng: random.Random, content: bytes | None
) -> Outcome:
    """Open and read; ``content`` is what must be found, for an image that was not mutated.

    Raises:
        FoundError: a finding; any other exception is one, too.
    """
    descriptors = open_descriptors()
    beginning = bytearray()
    try:
        disk = await open_source(parse_source(source), workers)
    except NbdsrvError as error:
        check_message(error, names)
        check_descriptors(descriptors)
        return Outcome("refused", str(error))
    try:
        problem = await _look_around(disk, names, rng, content, beginning)
    finally:
        await disk.close()
    check_descriptors(descriptors)
    return Outcome("broken", problem) if problem else Outcome("accepted", "", bytes(beginning))


def open_descriptors() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def check_descriptors(before: int) -> None:
    """No more are open than before."""
    now = open_descriptors()
    if now != before:
        raise FoundError("descriptors", f"{now - before} descriptors are left open")


def check_message(error: NbdsrvError, names: Sequence[str]) -> None:
    """It is one line that says in which file (of ``names``) and where."""
    text = str(error)
    if "\n" in text or not text.isprintable() or not text:
        raise FoundError("message", f"not one printable line: {text!r}"[:400])
    if len(text) > LONGEST_MESSAGE:
        raise FoundError("message", f"{len(text)} characters: {text[:300]}")
    if not any(name in text for name in names):
        raise FoundError("message", f"names no file: {text}")
    if isinstance(error, CorruptImage) and not (_CORRUPT.match(text) or _CORRUPT_CHAIN.match(text)):
        raise FoundError("message", f"CorruptImage without an offset: {text}")


async def _look_around(
    disk: Disk,
    names: Sequence[str],
    rng: random.Random,
    content: bytes | None,
    beginning: bytearray,
) -> str:
    """The first problem a read met, "" if there was none; fills ``beginning``."""
    if not 0 <= disk.size <= MAX_SIZE:
        raise FoundError("size", f"a disk of {disk.size} bytes")
    json.dumps(dict(disk.facts))
    if content is not None and disk.size != len(content):
        raise FoundError("content", f"{disk.size} bytes instead of {len(content)}")
    problem = ""
    places: list[Place] = []
    for offset, length in _windows(disk.size, rng):
        try:
            data = await _look(disk, offset, length, content, places if offset < BEGINNING else [])
            if offset == len(beginning) < BEGINNING:
                beginning += data
        except DiskError as error:
            check_message(error, names)
            problem = problem or str(error)
    _check_overlaps(places)
    return problem


def _check_overlaps(places: list[Place]) -> None:
    """No two ranges of a page may be the same bytes of a file.

    Across pages nobody looks: it would take all tables of a disk, however large, to know.
    """
    places.sort()
    for (page, inode, start, end), (next_page, other, begin, stop) in pairwise(places):
        if (page, inode) == (next_page, other) and begin < end:
            raise FoundError("overlap", f"{start}..{end} and {begin}..{stop} of a file")


def _windows(size: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Ranges to look at: all of the beginning, the end, and a few between."""
    for offset in range(0, min(size, BEGINNING), WINDOW):
        yield offset, min(WINDOW, size - offset)
    if size > BEGINNING:
        yield max(BEGINNING, size - 70_001), min(70_001, size - BEGINNING)
        for _ in range(4):
            offset = rng.randrange(BEGINNING, size)
            yield offset, min(rng.choice((1, 4096, 70_001)), size - offset)


async def _look(
    disk: Disk,
    offset: int,
    length: int,
    content: bytes | None,
    places: list[Place],
) -> bytearray:
    extents = await _extents(disk, offset, length)
    for context in disk.contexts:
        await disk.status(context, offset, length)
    runs = await disk.runs(offset, length)
    _check_runs(disk, offset, runs, length, places)
    first, second = bytearray(length), bytearray(length)
    await disk.read_into(offset, memoryview(first))
    await disk.read_into(offset, memoryview(second))
    if first != second:
        raise FoundError("unstable", f"two reads of {length} bytes at {offset} differ")
    for start, end, flags in extents:
        # Counted: any() would go through them one by one.
        if flags & 2 and first.count(0, start - offset, end - offset) != end - start:
            raise FoundError("zero", f"{start}..{end} is called zero and is not")
    if content is not None and first != content[offset : offset + length]:
        differing = next(i for i in range(length) if first[i] != content[offset + i])
        raise FoundError("content", f"wrong bytes from {offset + differing} on")
    return first


async def _extents(disk: Disk, offset: int, length: int) -> list[tuple[int, int, int]]:
    found = []
    at, end = offset, offset + length
    for _ in range(MAX_ANSWERS):
        if at >= end:
            break
        answer = await disk.extents(at, end - at)
        for start, span, flags in answer.ranges():
            if start != at or start + span > end:
                raise FoundError("extents", f"{span} bytes at {start}, asked for {at}..{end}")
            found.append((start, start + span, flags))
            at = start + span
    return found


def _check_inside(disk: Disk, run: FileRun, wanted: int) -> None:
    """In the image's own file, which may be a part of another: an archive's member."""
    file = getattr(disk, "file", None)
    if not isinstance(file, ImageFile) or run.fd != file.fd:
        return  # another file: what lies beyond its end cannot be read
    if run.position < file.base or run.position + wanted > file.base + file.size:
        text = f"{wanted} bytes at {run.position}, the file is {file.base}+{file.size}"
        raise FoundError("outside", text)


def _check_runs(
    disk: Disk, offset: int, runs: Sequence[Run], length: int, places: list[Place]
) -> None:
    covered = 0
    page_span = 0 if disk.format in COUNTED else getattr(disk, "page_span", 0)
    for run in runs:
        at = offset + covered
        if run.length < 1:
            raise FoundError("runs", f"an empty run: {run}")
        covered += run.length
        if isinstance(run, FileRun):
            # The part that was asked for; a run may promise more than anybody will read.
            wanted = run.length - max(0, covered - length)
            _check_inside(disk, run, wanted)
            if page_span:
                inside = min(wanted, page_span - at % page_span)
                inode = os.fstat(run.fd).st_ino
                place = (at // page_span, inode, run.position, run.position + inside)
                places.append(place)
        elif not isinstance(run, ZeroRun | BlockRun | RemoteRun):
            raise FoundError("runs", f"no run: {run!r}")
    if covered < length:
        raise FoundError("runs", f"{covered} bytes of {length}")
