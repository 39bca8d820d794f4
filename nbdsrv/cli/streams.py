"""Standard input, output and error as the program finds them: fine, full, or closed."""

import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

from nbdsrv.errors import NbdsrvError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["OutputError", "abandon", "prepare_streams"]


class OutputError(NbdsrvError):
    """Standard output takes nothing more."""


class _Output(io.FileIO):
    """Standard output, whose failures say what it is that failed: we print in many places.

    It is behind a buffer also where ``PYTHONUNBUFFERED`` asks for none: without one Python takes a
    write that went half through, as pipes end long ones now and then, for a whole one. And it is
    waited for where whoever shares the pipe has made it non-blocking.
    """

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            while (count := super().write(data)) is None:
                select.select([], [self], [])
            return count
        except BrokenPipeError:
            raise
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise OutputError(f"writing standard output: {reason}") from None


def prepare_streams() -> None:
    """Have all three, before anything else is opened.

    A descriptor below 3 that nobody gave us would be the next file we open, into which a library's
    last words on standard error are then written; and uvloop aborts when it closes one of them.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Read-only: an image that is copied to no output must not seem to have arrived.
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
    given: object = sys.stdout  # Python has None for what was closed
    if given is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is printed goes nowhere
    else:
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Output(sys.stdout.fileno(), "w", closefd=False)),
            sys.stdout.encoding,
            sys.stdout.errors,
            line_buffering=sys.stdout.isatty(),
        )
    given = sys.stderr
    if given is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def abandon(stream: TextIO) -> None:
    """What could not be written is not tried again, and complained about, as Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
