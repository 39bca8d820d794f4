"""``nbdsrv info`` and ``nbdsrv map``: what a SOURCE is, and where its data lies."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import click
import uvloop

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import parse_source
from nbdsrv.export.opener import open_source
from protocol.contexts import ALLOCATION
from protocol.extents import ExtentList

__all__ = ["info", "map_"]

T = TypeVar("T")
STEP = 1 << 40
"""Bytes asked about at a time."""


@click.command()
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(source: str, *, as_json: bool) -> None:
    """Describe SOURCE: format, size in bytes, allocation, block sizes, meta contexts."""
    _print_info(_with_disk(source, _describe), as_json=as_json)


@click.command(name="map")
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--context", default=ALLOCATION, show_default=True, help="Meta context to show.")
def map_(source: str, *, as_json: bool, context: str) -> None:
    """Print the extents of SOURCE: offset and length in bytes, and their state."""
    rows = _with_disk(source, lambda disk: _extents(disk, context))
    if as_json:
        click.echo(json.dumps([_row(context, *row) for row in rows]))
        return
    for offset, length, flags in rows:
        click.echo(f"{offset:>16} {length:>16}  {_name(context, flags)}")


def _with_disk(source: str, work: Callable[[Disk], Awaitable[T]]) -> T:
    async def run() -> T:
        async with _opened(source) as disk:
            return await work(disk)

    return uvloop.run(run())


@asynccontextmanager
async def _opened(text: str) -> AsyncIterator[Disk]:
    loop = asyncio.get_running_loop()
    workers = Workers()
    loop.add_reader(workers.fileno(), workers.complete)
    try:
        disk = await open_source(parse_source(text), workers)
        try:
            yield disk
        finally:
            await disk.close()
    finally:
        loop.remove_reader(workers.fileno())
        workers.close()


async def _describe(disk: Disk) -> dict[str, Any]:
    data = zero = hole = 0
    for _, length, flags in await _extents(disk, ALLOCATION):
        if not flags:
            data += length
        elif flags & 1:
            hole += length
        else:
            zero += length
    sizes = disk.block_sizes
    return {
        "source": disk.name,
        "format": disk.format,
        "size": disk.size,
        "data_bytes": data,
        "zero_bytes": zero,
        "hole_bytes": hole,
        "block_size": {
            "minimum": sizes.minimum,
            "preferred": sizes.preferred,
            "maximum": sizes.maximum,
        },
        "contexts": list(disk.contexts),
    }


def _print_info(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{name} {number}" for name, number in value.items())
        elif isinstance(value, list):
            shown = ", ".join(value)
        elif isinstance(value, int):
            shown = f"{value} ({_human(value)})"
        click.echo(f"{key.replace('_', ' '):12} {shown}")


async def _extents(disk: Disk, context: str) -> list[tuple[int, int, int]]:
    if context not in disk.contexts:
        known = ", ".join(disk.contexts)
        raise ConfigError(f"{disk.name} has no context {context}; it has {known}")
    extents: list[tuple[int, int]] = []
    offset = 0
    while offset < disk.size:
        found = await disk.status(context, offset, min(STEP, disk.size - offset))
        extents += [(extent.length, extent.flags) for extent in found]
        offset = found.end
    return list(ExtentList(0, extents).ranges())


def _name(context: str, flags: int) -> str:
    if context != ALLOCATION:
        return str(flags)
    return {0: "data", 2: "zero", 3: "hole"}.get(flags, str(flags))


def _row(context: str, offset: int, length: int, flags: int) -> dict[str, Any]:
    row: dict[str, Any] = {"offset": offset, "length": length, "type": flags}
    row["description"] = _name(context, flags)
    if context == ALLOCATION:
        # The keys of `qemu-img map --output=json`, so that its readers can read ours.
        row |= {"start": offset, "data": not flags, "zero": bool(flags & 2), "depth": 0}
        row["present"] = not flags & 1
    return row


def _human(size: int) -> str:
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if amount < 1024 or unit == "PiB":
            break
        amount /= 1024
    return f"{amount:.4g} {unit}"
