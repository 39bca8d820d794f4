"""The options of every command that writes a disk somewhere: ``copy`` and ``restore``."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from nbdsrv.copying.target import WRITTEN

__all__ = ["target_options"]

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--to", type=click.Choice(WRITTEN), help="Format of TARGET."),
    click.option(
        "--compress", metavar="METHOD[:LEVEL]", help="Of a qcow2 image: zlib, zstd or none."
    ),
    click.option(
        "--backing",
        default="",
        metavar="FILE",
        help="Make a qcow2 image that holds only what differs from FILE.",
    ),
    click.option(
        "--connections",
        type=click.IntRange(1, 64),
        metavar="N",
        help="To an NBD server at most, of SOURCE or TARGET.  [default: 4]",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print what has been done as JSON."),
    click.option("--quiet", is_flag=True, help="Show no progress and print nothing."),
    click.option("--force", is_flag=True, help="Replace a file that exists."),
)


def target_options(command: F) -> F:
    """Give a command all of them, in this order."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
