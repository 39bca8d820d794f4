"""Cases by number: what is given to a reader, the same for the same specimens and seed.

::

    ... -2 -1        the specimens as they are
    0 1 2 ... 48     mutants
    49 99 149 ...    a bomb, where the format has some
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.fuzz.mutations import Mutant, mutate
from conformance.fuzz.specimen import Specimen, is_bomb_turn

__all__ = ["Case", "choose", "write_files"]

AS_IT_IS = -1
"""Case numbers from here down are the specimens themselves: -1 the first, -2 the second."""


@dataclass(slots=True)
class Case:
    """What is given to the reader."""

    mutant: Mutant
    content: bytes | None


def choose(specimens: Sequence[Specimen], seed: int, number: int) -> Case:
    """The case of this number: the same for the same specimens and seed."""
    if number <= AS_IT_IS:
        specimen = specimens[AS_IT_IS - number]
        files = {name: bytearray(data) for name, data in specimen.files.items()}
        return Case(Mutant(specimen, random.Random(0), files), specimen.content)
    rng = random.Random(f"{seed}/{specimens[0].format}/{number}")
    bombs = [each for each in specimens if each.bomb]
    others = [each for each in specimens if not each.bomb]
    chosen = bombs if bombs and is_bomb_turn(number) else others
    return Case(mutate(rng.choice(chosen), rng), None)


def write_files(mutant: Mutant, directory: Path) -> None:
    """The files of a case; zeroes are left out where there are many."""
    directory.mkdir(parents=True)
    step = 64 << 10
    zeroes = bytes(step)
    for name, data in mutant.files.items():
        with (directory / name).open("wb") as file:
            for at in range(0, len(data), step):
                piece = data[at : at + step]
                if piece != zeroes[: len(piece)]:
                    file.seek(at)
                    file.write(piece)
            file.truncate(max(len(data), mutant.sizes.get(name, 0)))
