"""Random histories of one image, in all dialects, against a bytearray.

::

    write, zero, trim, flush, read, status --> server
                 |                               |
                 v                               v
              model (bytes, or "anything" after a TRIM)  must agree
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served_images import Scratch
from serving import ServerProcess
from wire import Wire

from protocol.constants import Allocation, Command, CommandFlag, Dialect, Errno

SPAN = 1 << 18
"""Bytes the histories play in: small enough for their steps to meet each other."""


@dataclass(frozen=True)
class Step:
    """One request."""

    command: Command
    offset: int
    length: int
    flags: int = 0
    seed: int = 0


_offsets = st.integers(0, SPAN - 1) | st.integers(0, SPAN // 4096 - 1).map(lambda n: n * 4096)
_lengths = st.integers(1, 9000) | st.sampled_from([1, 512, 4096, 65536, 65537, SPAN])


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """A request within SPAN."""
    command = draw(
        st.sampled_from(
            [Command.WRITE, Command.WRITE_ZEROES, Command.TRIM, Command.READ, Command.BLOCK_STATUS]
        )
    )
    offset = draw(_offsets)
    length = min(draw(_lengths), SPAN - offset)
    flags = CommandFlag(0)
    if command in {Command.WRITE, Command.WRITE_ZEROES, Command.TRIM}:
        flags |= draw(st.sampled_from([CommandFlag(0), CommandFlag.FUA]))
    if command is Command.WRITE_ZEROES:
        flags |= draw(st.sampled_from([CommandFlag(0), CommandFlag.NO_HOLE, CommandFlag.FAST_ZERO]))
    return Step(command, offset, length, flags, draw(st.integers(1, 255)))


class Model:
    """What the image must hold; trimmed bytes may be anything, but the same at each look."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.unknown: set[int] = set()

    def apply(self, step: Step, error: int) -> None:
        """Account for a change; ``error`` is what the server answered."""
        start, end = step.offset, step.offset + step.length
        if step.command is Command.WRITE:
            assert error == Errno.OK
            self.content[start:end] = bytes([step.seed]) * step.length
            self.unknown -= set(range(start, end))
        elif step.command is Command.WRITE_ZEROES and error == Errno.OK:
            self.content[start:end] = bytes(step.length)
            self.unknown -= set(range(start, end))
        elif step.command is Command.WRITE_ZEROES:
            assert error == Errno.ENOTSUP
            assert step.flags & CommandFlag.FAST_ZERO
        elif step.command is Command.TRIM:
            assert error == Errno.OK
            self.unknown |= set(range(start, end))

    def check(self, offset: int, data: bytes) -> None:
        """``data`` was read; what was unknown is known from now on."""
        for at in sorted(self.unknown & set(range(offset, offset + len(data)))):
            self.content[at] = data[at - offset]
            self.unknown.discard(at)
        assert bytes(self.content[offset : offset + len(data)]) == data

    def check_zero(self, offset: int, length: int) -> None:
        """The server says that these bytes read as zeroes."""
        self.check(offset, bytes(length))


def play(wires: Sequence[Wire], model: Model, history: Sequence[Step]) -> None:
    """Each step on the next connection: a reply makes it visible on all."""
    for wire, step in zip(itertools.cycle(wires), history, strict=False):
        if step.command is Command.BLOCK_STATUS and wire.dialect is Dialect.SIMPLE:
            continue
        data = bytes([step.seed]) * step.length if step.command is Command.WRITE else None
        answer = wire.call(step.command, step.offset, step.length, step.flags, data)
        if step.command is Command.READ:
            model.check(step.offset, answer.data())
        elif step.command is Command.BLOCK_STATUS:
            at = step.offset
            for length, flags in next(iter(answer.statuses.values())):
                if flags & Allocation.ZERO:
                    model.check_zero(at, min(length, SPAN - at))
                at += length
        else:
            model.apply(step, answer.error)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(history=st.lists(steps(), min_size=5, max_size=40))
def test_histories(writable: ServerProcess, scratch: Scratch, history: list[Step]) -> None:
    with scratch.path.open("r+b") as file:
        file.write(scratch.golden[:SPAN])
    model = Model(scratch.golden[:SPAN])
    wires = [
        writable.connect().enter("", dialect, *queries)
        for dialect, queries in (
            (Dialect.SIMPLE, ()),
            (Dialect.STRUCTURED, ("base:allocation",)),
            (Dialect.EXTENDED, ("base:allocation",)),
        )
    ]
    play(wires, model, history)
    for wire in wires:
        model.check(0, wire.read(0, SPAN))
    assert scratch.bytes()[:SPAN] == bytes(model.content)
    assert scratch.bytes()[SPAN:] == scratch.golden[SPAN:]
    writable.hang_up()
