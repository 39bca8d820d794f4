"""One valid image: its files by name, what is in it, and where a mutation is worth most.

::

    file     |header|..zeroes..|table|====guest data====|table|..
    pieces   |  m   |          |  m  |                  |  m  |      metadata: worth mutating

Guest data is told from metadata by its sectors: they are random and known. What is neither known
nor zero is metadata (or compressed), whatever the format.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = [
    "KIB",
    "MIB",
    "SECTOR",
    "Mend",
    "Specimen",
    "guest_content",
    "is_bomb_turn",
    "spread_content",
]

SECTOR = 512
KIB = 1024
MIB = 1024 * KIB
BOMB_EVERY = 50
"""Cases between two bombs: they take long, and there is nothing to vary."""

Mend = Callable[[bytearray], None]


@dataclass(slots=True)
class Specimen:
    """A valid image.

    Attributes:
        format: row of the table.
        name: of the sub-format, unique within the format.
        files: names and contents; they may refer to each other.
        source: the SOURCE that opens it, ``{}`` standing for the directory.
        content: what a reader finds in it, or None where only refusal or acceptance matters.
        mend: makes a file's checksums right; called for each mutated file.
        known: guest data that is in the files besides ``content``, a backing file's for instance.
        peer: does qemu-img read it? Not differencing images, for instance.
        writes: is it opened for writing, too?
        bomb: not mutated, only given to the reader: unpacking it carelessly costs everything.
    """

    format: str
    name: str
    files: Mapping[str, bytes]
    source: str
    content: bytes | None
    mend: Mend | None = None
    bomb: bool = False
    peer: bool = True
    writes: bool = False
    known: bytes = b""
    _metadata: dict[str, list[int]] = field(default_factory=dict)

    def metadata(self, name: str) -> list[int]:
        """Positions of the sectors of a file that are metadata, at least one."""
        if name not in self._metadata:
            data = self.files[name]
            known = _sectors(self.content or b"") | _sectors(self.known)
            found = [
                at
                for at in range(0, len(data), SECTOR)
                if (piece := data[at : at + SECTOR]) not in known and piece.count(0) != len(piece)
            ]
            self._metadata[name] = found or [0]
        return self._metadata[name]


def _sectors(content: bytes) -> set[bytes]:
    return {content[at : at + SECTOR] for at in range(0, len(content), SECTOR)}


def guest_content(size: int, seed: int = 1) -> bytes:
    """A disk of ``size`` bytes: random, text, written zeroes and untouched parts."""
    source = random.Random(seed)
    content = bytearray(size)
    kinds = "rz.tr..tz.r."
    step = 16 * KIB
    for index, at in enumerate(range(0, size, step)):
        kind = kinds[(index * 5 + index // 12) % len(kinds)]
        length = min(step, size - at)
        if kind == "r":
            content[at : at + length] = source.randbytes(length)
        elif kind == "t":
            words = b"".join(b"%d %08x\n" % (n, source.randrange(99)) for n in range(length // 10))
            content[at : at + length] = words[:length].ljust(length, b"\n")
    return bytes(content)


def spread_content(size: int) -> bytes:
    """A disk of ``size`` bytes with little data: at both ends and in the middle."""
    content = bytearray(size)
    for index, at in enumerate((0, size * 3 // 5, size - 24 * KIB)):
        content[at : at + 24 * KIB] = guest_content(24 * KIB, seed=index)
    return bytes(content)


def is_bomb_turn(number: int) -> bool:
    """Is a bomb given in this case, where the format has one?"""
    return number % BOMB_EVERY == BOMB_EVERY - 1
