"""A VM-like disk in three states, each 2 % away from the one before.

::

    base      55 % holes, 30 % text, 15 % random data, in pieces of 1 MiB (see ``formats``)
    changed   2 % of its pieces written anew: two in three with text, one with random data
    again     another 2 %

Each is there as a raw image and as the qcow2 a hypervisor would have: the latter two hold a dirty
bitmap of what was written since the state before. All are made once, from fixed seeds, and kept.
"""

import os
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from conformance.benchmark.formats import PIECE, convert_command, mixed, text, vocabulary
from conformance.benchmark.repository.command import run

__all__ = ["BITMAP", "PIECE", "Disks", "State", "make_disks"]

CHANGED_PART = 0.02
TEXT_PART = 2 / 3
BITMAP = "since"
"""The name of the dirty bitmap in the qcow2 images."""


@dataclass(frozen=True, slots=True)
class State:
    """The disk at one time: two images of the same content, and what is new in it."""

    name: str
    raw: str
    qcow2: str
    changed: tuple[int, ...] = ()
    """Offsets of the pieces written since the state before, ascending."""


@dataclass(frozen=True, slots=True)
class Disks:
    directory: str
    """Where images are kept, and what else is made once."""
    size: int
    base: State
    changed: State
    again: State


def make_disks(directory: str, size: int) -> Disks:
    """The three states, made unless they are there."""
    raw = mixed(directory, size)
    base = State("base", raw, f"{raw.removesuffix('.raw')}.vm.qcow2")
    _make(base.qcow2, lambda path: run(convert_command("qcow2", raw, "raw", path)))
    changed = _after(base, "changed", size, seed=11)
    return Disks(directory, size, base, changed, _after(changed, "again", size, seed=12))


def _after(before: State, name: str, size: int, seed: int) -> State:
    source = random.Random(seed)
    count = max(round(size // PIECE * CHANGED_PART), 1)
    offsets = sorted(at * PIECE for at in source.sample(range(size // PIECE), count))
    stem = before.raw.removesuffix(f"-{before.name}.raw").removesuffix(".raw")
    state = State(name, f"{stem}-{name}.raw", f"{stem}-{name}.vm.qcow2", tuple(offsets))
    if not os.path.exists(state.raw) or not os.path.exists(state.qcow2):
        pieces = dict(zip(offsets, _pieces(source, count), strict=True))
        _make(state.raw, lambda path: _written_raw(before, pieces, path))
        _make(state.qcow2, lambda path: _written_qcow2(before, pieces, path))
    return state


def _pieces(source: random.Random, count: int) -> Iterable[bytes]:
    words = vocabulary(source)
    for _ in range(count):
        is_text = source.random() < TEXT_PART
        yield text(source, words, PIECE) if is_text else source.randbytes(PIECE)


def _written_raw(before: State, pieces: Mapping[int, bytes], path: str) -> None:
    run(convert_command("raw", before.raw, "raw", path))
    with open(path, "r+b") as file:
        for offset, piece in pieces.items():
            file.seek(offset)
            file.write(piece)


def _written_qcow2(before: State, pieces: Mapping[int, bytes], path: str) -> None:
    """The writes go through QEMU, which is what makes the bitmap."""
    run(convert_command("qcow2", before.raw, "raw", path))
    run(["qemu-img", "bitmap", "--add", "-f", "qcow2", path, BITMAP])
    with tempfile.TemporaryDirectory(prefix="pieces-") as scratch:
        writes = []
        for offset, piece in pieces.items():
            name = os.path.join(scratch, str(offset))
            with open(name, "wb") as file:
                file.write(piece)
            writes += ["-c", f"write -q -s {name} {offset} {len(piece)}"]
        run(["qemu-io", "-f", "qcow2", *writes, path])


def _make(path: str, fill: Callable[[str], object]) -> None:
    """Under another name first: an interrupted run leaves no half image."""
    if os.path.exists(path):
        return
    partial = f"{path}.partial"
    fill(partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.rename(partial, path)
