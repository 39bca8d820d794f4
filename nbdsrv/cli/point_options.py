"""The options of every command that makes a restore point: ``backup`` and ``proxy --tee``."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = ["point_options"]

F = TypeVar("F", bound=Callable[..., Any])

MAX_LEVEL = 19


def point_options(when: str = "") -> Callable[[F], F]:
    """Give a command all of them, in this order; ``when`` begins each help text."""
    options = (
        click.option(
            "--since",
            default="auto",
            show_default=True,
            metavar="auto|full|POINT",
            help=f"{when}The point to build upon: the latest one, none, or this one.",
        ),
        click.option(
            "--changed",
            default="",
            metavar="CONTEXT",
            help=f"{when}A meta context of the source that tells what has changed since then.",
        ),
        click.option(
            "--recheck",
            type=click.FloatRange(0, 100),
            default=1.0,
            show_default=True,
            metavar="PERCENT",
            help=f"{when}Of what is said to be unchanged, read so much all the same.",
        ),
        click.option(
            "--level",
            type=click.IntRange(0, MAX_LEVEL),
            default=2,
            show_default=True,
            help=f"{when}Of zstd; 0 stores as it is.",
        ),
        click.option(
            "--label", "labels", multiple=True, metavar="KEY=VALUE", help=f"{when}Of the point."
        ),
    )

    def give(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return give
