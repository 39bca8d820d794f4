"""``nbdsrv copy``: a disk into a new image, or onto a disk that is there."""

import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import click

from nbdsrv.cli.running import opened, running_workers
from nbdsrv.cli.stopping import SIGNALS, run
from nbdsrv.cli.target_options import target_options
from nbdsrv.cli.words import human
from nbdsrv.copying.engine import Copy, Outcome
from nbdsrv.copying.itself import refuse_itself
from nbdsrv.copying.progress import progress
from nbdsrv.copying.target import Place, Target, parse_target
from nbdsrv.copying.writers import (
    Compression,
    Making,
    backing_of,
    check_making,
    image_writer,
    open_in_place,
)
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import Kind, is_native, parse_source
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.writer import ImageWriter

__all__ = ["copy"]


@dataclass(frozen=True, slots=True)
class Order:
    """What the command line asked for."""

    source: str
    target: Target
    making: Making
    connections: int | None
    quiet: bool


@click.command(short_help="A disk into another image, or to a server.")
@click.argument("source")
@click.argument("target")
@target_options
def copy(
    source: str,
    target: str,
    *,
    to: str | None,
    compress: str | None,
    backing: str,
    connections: int | None,
    as_json: bool,
    quiet: bool,
    force: bool,
) -> None:
    """Copy SOURCE to TARGET.

    TARGET is a new image (disk.qcow2, vhd:/path), standard output (- or vmdk:-), a block device or
    an NBD URI; the latter two are overwritten as they are; null: reads everything and keeps
    nothing. A new image appears under its name once
    it is complete; until then, and after an error, there is none.

    If TARGET is a repository (repo:/path), SOURCE names points of another one.
    """
    if is_native(target):
        if to or compress or backing or connections or force:
            raise ConfigError(f"{target}: points are copied as they are; leave out the options")
        from nbdsrv.cli.copy_points import copy_points

        copy_points(source, target, as_json=as_json, quiet=quiet)
        return
    compression = Compression.parse(compress) if compress else None
    making = Making(compression, backing, force)
    order = Order(source, parse_target(target, to), making, connections, quiet)
    check_making(order.target, making)
    if order.target.place is Place.PIPE and sys.stdout.isatty():
        raise ConfigError(f"{target}: standard output is a terminal; redirect it")
    began = time.monotonic()
    outcome = _interruptible(order)
    _report(order, outcome, time.monotonic() - began, as_json=as_json)


def _report(order: Order, outcome: Outcome, duration: float, *, as_json: bool) -> None:
    # The image itself may be what standard output carries.
    aside = order.target.place is Place.PIPE
    if as_json:
        facts: dict[str, Any] = {
            "source": order.source,
            "target": order.target.text,
            "format": order.target.format,
            "size": outcome.size,
            "data_bytes": outcome.data,
            "zero_bytes": outcome.zero,
            "written_bytes": outcome.written,
            "duration_s": round(duration, 3),
        }
        click.echo(json.dumps(facts), err=aside)
    elif not order.quiet:
        rate = human(int(outcome.data / max(duration, 1e-3)))
        name = order.target.text.rstrip(":")  # null:
        done = "read" if order.target.place is Place.NOWHERE else "written"
        click.echo(
            f"{name}: {human(outcome.size)}, {human(outcome.written)} of it {done},"
            f" in {duration:.1f} s ({rate}/s)",
            err=aside,
        )


def _interruptible(order: Order) -> Outcome:
    """Copy; a signal to stop cleans up first."""
    if order.target.place is Place.PIPE:
        for number in SIGNALS:
            # Nothing to clean up but a lease, and a thread may hang in a write that nobody reads.
            kept = parse_source(order.source).kind is Kind.REPOSITORY
            if not kept and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        return run(_copy(order))
    left = "is incomplete" if order.target.in_place else "was not made"
    return run(_copy(order), f"{order.target.text} {left}")


async def _copy(order: Order) -> Outcome:
    target = order.target
    with progress(os.path.basename(target.text), quiet=order.quiet) as bar:
        async with (
            running_workers() as workers,
            opened(order.source, workers, connections=order.connections) as source,
            _base(order, workers) as base,
        ):
            refuse_itself(order.source, target)
            async with _writer(order, workers, base) as writer:
                looking = bar and bar.looking
                work = Copy(source, writer, workers, base=base, advance=bar, looking=looking)
                return await work.run()


@asynccontextmanager
async def _base(order: Order, workers: Workers) -> AsyncIterator[Disk | None]:
    if not order.making.backing:
        yield None
        return
    kind, path = backing_of(order.making.backing)
    base = await open_image(path, kind, Opening(workers))
    try:
        yield base
    finally:
        await base.close()


@asynccontextmanager
async def _writer(order: Order, workers: Workers, base: Disk | None) -> AsyncIterator[ImageWriter]:
    if not order.target.in_place:
        yield await workers.look_up(image_writer, order.target, order.making, workers, base)
        return
    disk, writer = await open_in_place(order.target, workers, order.connections)
    try:
        yield writer
    finally:
        if disk is not None:
            await disk.close()
