"""``nbdsrv ls``: the restore points of a repository; and what ``info`` says of a whole one."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from nbdsrv.cli.running import running_workers
from nbdsrv.cli.stopping import run
from nbdsrv.cli.words import counted, human, printable
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError
from nbdsrv.export.grammar import Kind, Source, parse_source
from nbdsrv.repository.native.layout import POINTS, group_of
from nbdsrv.repository.native.repository import NativeRepository
from nbdsrv.repository.opening import open_repository
from nbdsrv.repository.repository import UNREAD, Point
from nbdsrv.repository.selector import scope_of

__all__ = ["ls", "print_repository", "repository_facts"]

PARTIAL = 3
"""Exit code where points are listed of which nothing is known but that they are there."""
MAX_NAMED = 100
"""Groups ``info`` names."""


@click.command(short_help="The restore points of a repository.")
@click.argument("repository", metavar="REPOSITORY[#GROUP]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ls(repository: str, *, as_json: bool) -> None:
    """List the restore points of REPOSITORY, by group and from old to new.

    Exit code 3: some of them cannot be read now, and may be the next time.

    Every line names a point as other commands take it: repo:/path#GROUP/DISK@POINT.
    """
    source = parse_source(repository)
    if source.kind is not Kind.REPOSITORY or source.partition is not None:
        raise ConfigError(
            f"{repository}: not a repository; one is named by its kind, as repo:/path"
        )
    points = run(_points(source))
    if as_json:
        click.echo(json.dumps([_row(point) for point in points]))
    else:
        _print_table(points)
    if not points and not as_json:  # maybe that is not where they are
        click.echo(f"nbdsrv: {repository}: no restore points", err=True)
    unread = [point for point in points if UNREAD in point.flags]
    if unread:
        text = f"{counted(len(unread), 'point')} could not be read: {unread[0].facts['reason']}"
        click.echo(f"nbdsrv: {repository}: {text}", err=True)
        raise click.exceptions.Exit(PARTIAL)


async def _points(source: Source) -> Sequence[Point]:
    async with running_workers() as workers:
        repository = await open_repository(source, workers)
        try:
            if not source.selector:
                points = await repository.points()
            else:
                points = (await scope_of(repository, source.selector)).points
            if not isinstance(repository, NativeRepository):
                return points
            try:
                pinned = await repository.pinned()
            except DiskError as error:  # no reason not to list
                click.echo(f"nbdsrv: {error}", err=True)
                return points
            return [_flagged(point, pinned) for point in points]
        finally:
            await repository.close()


def _flagged(point: Point, pinned: frozenset[str]) -> Point:
    if f"{point.group}/{point.id}" not in pinned:
        return point
    return replace(point, flags=(*point.flags, "pinned"))


def _row(point: Point) -> dict[str, Any]:
    return {
        "group": point.group,
        "point": point.id,
        "created": point.created,
        "time": point.stamp,
        "parent": point.parent,
        "flags": list(point.flags),
        **point.facts,
        "disks": [{"name": disk.name, "size": disk.size, **disk.facts} for disk in point.disks],
    }


_HEADINGS = ("GROUP", "POINT", "TIME", "DISKS", "MODE", "NEW", "FLAGS")


def _print_table(points: Sequence[Point]) -> None:
    rows = [_HEADINGS, *(_cells(point) for point in points)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(_HEADINGS))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _cells(point: Point) -> tuple[str, ...]:
    disks = ", ".join(f"{printable(disk.name)} {human(disk.size)}" for disk in point.disks)
    modes = dict.fromkeys(str(disk.facts.get("mode", "")) for disk in point.disks)
    # Some tools count a point as a whole, some do not count.
    counts = [disk.facts.get("new_bytes") for disk in point.disks]
    counts = [each for each in counts if each is not None] or [point.facts.get("new_bytes")]
    new = None if None in counts else sum(map(int, filter(None, counts)))
    return (
        printable(point.group),
        point.id,
        point.stamp,
        disks or "-",
        ", ".join(filter(None, modes)) or "-",
        human(new) if point.disks and new is not None else "-",
        ", ".join(point.flags),
    )


# --- info of a whole repository --------------------------------------------------------------


async def repository_facts(source: Source, workers: Workers) -> dict[str, Any]:
    """What ``info`` says of it, by listings alone: no point is read."""
    repository = await open_repository(source, workers)
    try:
        facts: dict[str, Any] = {"source": repository.name, "format": repository.kind}
        if isinstance(repository, NativeRepository):
            facts |= await workers.run(_native_facts, repository)
        else:
            points = await repository.points()
            facts["points"] = len(points)
            facts["groups"] = sorted({point.group for point in points})
        return facts
    finally:
        await repository.close()


def _native_facts(repository: NativeRepository) -> dict[str, Any]:
    """Blocking."""
    vault = repository.vault
    config = vault.config
    groups: set[str] = set()
    points, objects, stored = 0, 0, 0
    for each in vault.store.list(""):
        objects += 1
        stored += each.size
        if each.key.startswith(POINTS) and (group := group_of(each.key)) is not None:
            points += 1
            groups.add(group)
    return {
        "id": str(config.id),
        "hash": config.hash,
        "cipher": config.cipher or "none",
        "chunk_size": config.chunk_size,
        "points": points,
        "groups": sorted(groups),
        "objects": objects,
        "stored_bytes": stored,
    }


def print_repository(facts: dict[str, Any], *, as_json: bool) -> None:
    """As ``info`` prints."""
    if as_json:
        click.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        shown = str(value)
        if key == "groups":
            named = ", ".join(printable(group) for group in value[:MAX_NAMED])
            more = len(value) - MAX_NAMED
            shown = f"{len(value)} ({named}{f' and {more} more' if more > 0 else ''})"
        elif key in {"chunk_size", "stored_bytes"}:
            shown = f"{value} ({human(value)})"
        click.echo(f"{key.replace('_', ' '):12} {shown}")
