"""The options of every command that makes a restore point: ``backup`` and ``proxy --tee``."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import Source
from nbdsrv.repository.destination import Storage

__all__ = ["point_options", "storage_of"]

F = TypeVar("F", bound=Callable[..., Any])

MAX_LEVEL = 19


def _tells_changes(_: click.Context, __: click.Parameter, context: str) -> str:
    # Every server has it, and what is not allocated now may well have been before.
    if context == "base:allocation":
        raise ConfigError(f"--changed {context} tells what is data, not what has changed")
    return context


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
            callback=_tells_changes,
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
            metavar="N",
            help=f"{when}How hard zstd tries; 0 stores as it is.",
        ),
        click.option(
            "--layout",
            type=click.Choice(["vhd-directory", "vhd"]),
            help=f"{when}How an xo: repository gets disks: a file a block, or one file."
            "  [default: as it has them, vhd-directory where it has none]",
        ),
        click.option(
            "--packing",
            type=click.Choice(["brotli", "gzip", "none"]),
            help=f"{when}How the blocks of a vhd-directory are compressed.  [default: brotli]",
        ),
        click.option(
            "--label",
            "labels",
            multiple=True,
            metavar="KEY=VALUE",
            help=f"{when}Kept with the point, for `prune --keep-label`; repeatable.",
        ),
    )

    def give(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return give


def storage_of(layout: str | None, packing: str | None, repositories: Sequence[Source]) -> Storage:
    """What ``--layout`` and ``--packing`` ask for.

    Raises:
        ConfigError: there is no repository they could be for.
    """
    given = f"--layout {layout}" if layout else f"--packing {packing}"
    if (layout or packing) and not any(each.scheme == "xo" for each in repositories):
        raise ConfigError(f"{given}: only xo: repositories leave that choice")
    if layout == "vhd" and packing:
        raise ConfigError(f"--packing {packing}: the blocks of a VHD in one file are not packed")
    return Storage(layout or "", packing or "")
