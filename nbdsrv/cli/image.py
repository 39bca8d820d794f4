"""``nbdsrv info`` and ``nbdsrv map``: what a SOURCE is, and where its data lies."""

import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import click

from nbdsrv.cli.layout import allocation_rows, extents, state
from nbdsrv.cli.running import opened, running_workers
from nbdsrv.cli.stopping import run
from nbdsrv.cli.words import human
from nbdsrv.copying.progress import Advance, progress
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.export.grammar import Kind, parse_source
from protocol.contexts import ALLOCATION

__all__ = ["info", "map_"]

T = TypeVar("T")

MAX_CONTEXTS = 5
"""Meta contexts that are named; a restore point has one for each other point."""
MAX_ANSWERS = 1 << 16
"""Questions ``info`` asks about allocation: the most a server of the old kind can be asked about is
128 TiB then, and one that tells of a few bytes at a time does not keep it for ever."""


@click.command(short_help="What a disk is, and what it is made of.")
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(source: str, *, as_json: bool) -> None:
    """Describe SOURCE: format, size in bytes, allocation, its chain of backing images.

    Of a repository (repo:/path): what it is, its groups, how much is stored.
    """
    parsed = parse_source(source)
    if parsed.kind is Kind.REPOSITORY and not parsed.selector and parsed.partition is None:
        from nbdsrv.cli.points import print_repository, repository_facts

        print_repository(_with_workers(partial(repository_facts, parsed)), as_json=as_json)
        return
    _print_info(_with_disk(source, _describe), as_json=as_json)


@click.command(name="map", short_help="Where a disk holds data, zeroes and holes.")
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, in qemu-img's shape.")
@click.option(
    "--context", metavar="C", default=ALLOCATION, show_default=True, help="Meta context to show."
)
def map_(source: str, *, as_json: bool, context: str) -> None:
    """Print the extents of SOURCE: offset and length in bytes, and their state."""
    with progress(source, quiet=False, at_once=False) as bar:
        looking = bar and bar.looking
        if as_json:
            rows = _with_disk(source, lambda disk: _json_rows(disk, context, looking), context)
        else:
            found = _with_disk(
                source, lambda disk: extents(disk, context, advance=looking), context
            )
    if as_json:
        click.echo(json.dumps(rows))
        return
    for offset, length, flags in found:
        click.echo(f"{offset:>16} {length:>16}  {state(context, flags)}")


async def _json_rows(disk: Disk, context: str, looking: Advance | None) -> list[dict[str, Any]]:
    if context == ALLOCATION:
        return await allocation_rows(disk, looking)
    return [
        {"start": start, "length": length, "type": flags, "description": state(context, flags)}
        for start, length, flags in await extents(disk, context, advance=looking)
    ]


def _with_disk(source: str, work: Callable[[Disk], Awaitable[T]], context: str | None = None) -> T:
    async def work_on() -> T:
        async with (
            running_workers() as workers,
            opened(source, workers, context=context) as disk,
        ):
            return await work(disk)

    return run(work_on())


def _with_workers(work: Callable[[Workers], Awaitable[T]]) -> T:
    async def work_on() -> T:
        async with running_workers() as workers:
            return await work(workers)

    return run(work_on())


async def _describe(disk: Disk) -> dict[str, Any]:
    data = zero = hole = 0
    for _, length, flags in await extents(disk, ALLOCATION, MAX_ANSWERS):
        if not flags:
            data += length
        elif flags & 1:
            hole += length
        else:
            zero += length
    unknown = disk.size - data - zero - hole
    sizes = disk.block_sizes
    facts: dict[str, Any] = {
        "source": disk.name,
        "format": disk.format,
        "size": disk.size,
        "data_bytes": data,
        "zero_bytes": zero,
        "hole_bytes": hole,
        **({"unknown_bytes": unknown} if unknown else {}),
        "block_size": {
            "minimum": sizes.minimum,
            "preferred": sizes.preferred,
            "maximum": sizes.maximum,
        },
        "contexts": list(disk.contexts),
    }
    if disk.facts:
        facts["details"] = dict(disk.facts)
    if disk.backing is not None:
        facts["backing"] = _chain_below(disk)
    return facts


def _chain_below(disk: Disk) -> list[dict[str, Any]]:
    """The images below, the nearest first."""
    chain = []
    below = disk.backing
    while below is not None:
        row: dict[str, Any] = {"name": below.name, "format": below.format, "size": below.size}
        if below.facts:
            row["details"] = dict(below.facts)
        chain.append(row)
        below = below.backing
    return chain


def _print_info(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        if key == "details":
            _print_details(value)
        elif key == "contexts" and len(value) > MAX_CONTEXTS:
            more = f"and {len(value) - MAX_CONTEXTS} more"
            click.echo(f"{key:12} {_shown((*value[:MAX_CONTEXTS], more))}")
        elif key == "backing":
            for below in value:
                size = f"{below['size']} ({human(below['size'])})"
                click.echo(f"{'backing':12} {below['name']}: {below['format']}, {size}")
        else:
            click.echo(f"{key.replace('_', ' '):12} {_shown(value)}")


def _print_details(details: dict[str, Any]) -> None:
    for key, value in details.items():
        if value in ([], {}, "", None):
            continue
        click.echo(f"  {key.replace('_', ' ')}: {_shown(value, units=False)}")


def _shown(value: object, *, units: bool = True) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(each, units=False)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_shown(each, units=False) for each in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and units:
        return f"{value} ({human(value)})"
    return str(value)
