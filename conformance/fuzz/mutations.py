"""What is done to a valid image.

Every mutation changes a ``Mutant`` in place; which one and where is the random source's choice.
Most go for *fields*: aligned integers in sectors that hold metadata. A value that hurts is one of
``HURTFUL``, a neighbour of the value that was there, or the value of another field: the last makes
loops, overlaps and duplicates in any format without knowing it.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from conformance.fuzz.specimen import SECTOR, Specimen

__all__ = ["Mutant", "mutate"]

HURTFUL = [
    *(0, 1, 2, 3, 7, 8, 9, 31, 63, 64, 127, 128, 255, 256, 511, 512, 513, 4095, 4096, 65535),
    *(2**n for n in (16, 17, 20, 21, 24, 28, 30, 31, 32, 33, 40, 44, 48, 53)),
    *(2**31 - 1, 2**32 - 512, 2**32 - 1, 2**56 - 1),
    *(2**62, 2**63 - 1, 2**63 - 512, 2**63, 2**63 + 512, 2**64 - 4096, 2**64 - 2, 2**64 - 1),
]
"""Limits of integer types and of formats, and their neighbours."""

HURTFUL_WORDS = [
    *(b"0", b"-1", b"1", b"4294967296", b"9223372036854775807", b"18446744073709551616"),
    *(b"99999999999999999999999999", b"9" * 5000, b"", b"\0", b"0x10", b"1e9", b"\xff\xfe", b"%s"),
]
HUGE_FILES = [1 << 30, 1 << 40, (1 << 42) + 512]
"""Sizes a file is extended to, sparse: a bound by the file's size is none then."""
READ_WHOLE = {"gzip"}
"""Formats that cannot be opened in less time than it takes to read them."""
LONGEST = 64 << 20
"""Bytes a mutant may have in memory; what goes beyond is given as a sparse size."""
_NUMBER = re.compile(rb"[0-9]+")


@dataclass(slots=True)
class Mutant:
    """The files of a specimen while they are changed.

    Attributes:
        sizes: sizes beyond what is in ``files``, as sparse ends.
    """

    specimen: Specimen
    rng: random.Random
    files: dict[str, bytearray]
    sizes: dict[str, int] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def place(self, name: str, width: int) -> int:
        """Where a field of this width may be, mostly one that is not zero."""
        rng, data = self.rng, self.files[name]
        sectors = self.specimen.metadata(name)
        # The first sectors hold the header: a few bytes that decide everything.
        index = 0 if rng.random() < 0.3 else rng.randrange(len(sectors))
        start = sectors[index]
        if rng.random() < 0.1:
            start += SECTOR * rng.randrange(-2, 3)
        end = min(start + SECTOR, len(data)) - width
        start = max(0, min(start, end))
        align = 1 if rng.random() < 0.1 else width
        at = start
        for _ in range(8):
            at = start + rng.randrange(max(end - start, 0) // align + 1) * align
            if any(data[at : at + width]) or rng.random() < 0.15:
                break
        return at


Mutation = Callable[[Mutant, str], None]


def mutate(specimen: Specimen, rng: random.Random) -> Mutant:
    """A mutant of ``specimen``: one to a handful of changes, mostly mended afterwards."""
    files = {name: bytearray(data) for name, data in specimen.files.items()}
    mutant = Mutant(specimen, rng, files)
    if specimen.bomb:
        return mutant
    names = list(files)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 6))):
        name = rng.choice(names)
        mutation = rng.choice(_MUTATIONS)
        mutant.done.append(f"{mutation.__name__.strip('_')} {name}")
        mutation(mutant, name)
        if len(files[name]) > LONGEST:
            del files[name][LONGEST:]
    if specimen.mend is not None and rng.random() < 0.85:
        for data in files.values():
            specimen.mend(data)
    return mutant


def _flip(mutant: Mutant, name: str) -> None:
    data = mutant.files[name]
    if data:
        data[mutant.place(name, 1)] ^= 1 << mutant.rng.randrange(8)


def _width(mutant: Mutant) -> int:
    return mutant.rng.choice((1, 2, 4, 4, 8, 8))


def _put(mutant: Mutant, name: str, at: int, width: int, value: int, order: str) -> None:
    data = mutant.files[name]
    field_bytes = (value % (1 << 8 * width)).to_bytes(width, "little" if order == "<" else "big")
    data[at : at + width] = field_bytes[: max(0, len(data) - at)]


def _set_field(mutant: Mutant, name: str) -> None:
    width = _width(mutant)
    value, order = mutant.rng.choice(HURTFUL), mutant.rng.choice("<>")
    _put(mutant, name, mutant.place(name, width), width, value, order)


def _set_to_size(mutant: Mutant, name: str) -> None:
    """Where the file ends, or nearly, in bytes, sectors or clusters."""
    width, size = _width(mutant), len(mutant.files[name])
    value = size // mutant.rng.choice((1, 512, 4096, 65536)) + mutant.rng.choice((-512, -1, 0, 1))
    _put(mutant, name, mutant.place(name, width), width, value, mutant.rng.choice("<>"))


def _nudge_field(mutant: Mutant, name: str) -> None:
    width, order = _width(mutant), mutant.rng.choice("<>")
    at = mutant.place(name, width)
    value = int.from_bytes(mutant.files[name][at : at + width], "little" if order == "<" else "big")
    change = mutant.rng.choice(
        (value + 1, value - 1, value * 2, value // 2, -value, value + 512, value - 512, value << 9)
    )
    _put(mutant, name, at, width, change, order)


def _copy_field(mutant: Mutant, name: str) -> None:
    """One field's value in another's place: loops, overlaps, duplicates."""
    width = mutant.rng.choice((4, 4, 8, 8, 16))
    data = mutant.files[name]
    source, target = mutant.place(name, width), mutant.place(name, width)
    piece = data[source : source + width]
    data[target : target + len(piece)] = piece[: max(0, len(data) - target)]


def _repeat_field(mutant: Mutant, name: str) -> None:
    """A whole stretch of a table says the same."""
    width = mutant.rng.choice((4, 8))
    data = mutant.files[name]
    at = mutant.place(name, width)
    piece = bytes(data[at : at + width])
    stretch = piece * mutant.rng.choice((2, 4, 16, 64))
    stretch = stretch[: max(0, len(data) - at)]
    data[at : at + len(stretch)] = stretch


def _fill(mutant: Mutant, name: str) -> None:
    data = mutant.files[name]
    at = mutant.place(name, 4)
    length = min(mutant.rng.choice((4, 8, 16, 64, 512, 4096)), len(data) - at)
    kind = mutant.rng.choice((b"\0", b"\xff", None))
    data[at : at + length] = mutant.rng.randbytes(length) if kind is None else kind * length


def _swap_sectors(mutant: Mutant, name: str) -> None:
    rng, data = mutant.rng, mutant.files[name]
    sectors = mutant.specimen.metadata(name)
    size = rng.choice((SECTOR, SECTOR, 4096, 65536))
    first, second = (rng.choice(sectors) // size * size for _ in range(2))
    length = min(size, len(data) - max(first, second))
    if length > 0 and abs(first - second) >= length:
        one, two = data[first : first + length], data[second : second + length]
        data[first : first + length], data[second : second + length] = two, one


def _copy_sector(mutant: Mutant, name: str) -> None:
    """Also from another file of the image: a child that is its own parent, a foreign table."""
    rng, data = mutant.rng, mutant.files[name]
    donor_name = rng.choice(list(mutant.files))
    donor, size = mutant.files[donor_name], rng.choice((SECTOR, 1024, 4096))
    source = rng.choice(mutant.specimen.metadata(donor_name))
    target = rng.choice(mutant.specimen.metadata(name))
    piece = donor[source : source + size][: max(0, len(data) - target)]
    data[target : target + len(piece)] = piece


def _cut(mutant: Mutant, name: str) -> None:
    rng, data = mutant.rng, mutant.files[name]
    at = rng.choice(
        (
            rng.randrange(len(data) + 1),
            rng.randrange(len(data) + 1) // SECTOR * SECTOR,
            rng.choice(mutant.specimen.metadata(name)) + rng.choice((0, 1, 8, 511)),
            len(data) - rng.choice((1, 8, 16, 511, 512, 513, 1024, 65536)),
        )
    )
    del data[max(0, at) :]


def _extend(mutant: Mutant, name: str) -> None:
    rng, data = mutant.rng, mutant.files[name]
    kind = rng.randrange(4)
    if kind == 0 and mutant.specimen.format not in READ_WHOLE:
        mutant.sizes[name] = rng.choice(HUGE_FILES)
    elif kind == 1:
        data += bytes(rng.choice((1, 511, 512, 4096, 65536, 1 << 20)))
    elif kind == 2:
        data += rng.randbytes(rng.choice((1, 512, 4096)))
    else:
        data += data[-rng.choice((512, 1024, 4096)) :]


def _insert(mutant: Mutant, name: str) -> None:
    rng, data = mutant.rng, mutant.files[name]
    at = mutant.place(name, 1) if data else 0
    data[at:at] = rng.choice((bytes(512), rng.randbytes(rng.randrange(1, 20)), b"\n", b"\xff" * 8))


def _remove(mutant: Mutant, name: str) -> None:
    data = mutant.files[name]
    at = mutant.place(name, 1) if data else 0
    del data[at : at + mutant.rng.choice((1, 2, 4, 8, 512, 4096))]


def _change_word(mutant: Mutant, name: str) -> None:
    """A number written in digits: descriptors, tar headers, XML."""
    rng, data = mutant.rng, mutant.files[name]
    start = rng.choice(mutant.specimen.metadata(name))
    numbers = list(_NUMBER.finditer(bytes(data[start : start + 2 * SECTOR])))
    if not numbers:
        _set_field(mutant, name)
        return
    match = rng.choice(numbers)
    word = rng.choice(HURTFUL_WORDS) if rng.random() < 0.6 else b"%d" % rng.choice(HURTFUL)
    first, last = start + match.start(), start + match.end()
    if rng.random() < 0.5:  # in place, so that what follows stays where it is
        word = word[: match.end() - match.start()].ljust(match.end() - match.start(), b"0")
    data[first:last] = word


def _repeat_line(mutant: Mutant, name: str) -> None:
    rng, data = mutant.rng, mutant.files[name]
    start = rng.choice(mutant.specimen.metadata(name))
    lines = bytes(data[start : start + 4 * SECTOR]).split(b"\n")
    line = rng.choice(lines) + b"\n"
    at = start + data[start : start + 4 * SECTOR].find(line)
    if rng.random() < 0.3:
        line = line * 1000
    data[at:at] = line


_MUTATIONS: tuple[Mutation, ...] = (
    *(_set_field,) * 6,
    *(_nudge_field,) * 4,
    *(_copy_field,) * 4,
    *(_flip,) * 3,
    *(_set_to_size,) * 2,
    *(_cut,) * 2,
    *(_repeat_field, _fill, _swap_sectors, _copy_sector, _extend),
    *(_insert, _remove, _change_word, _change_word, _repeat_line),
)
