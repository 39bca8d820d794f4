"""``nbdsrv overlay``: what VMs have written over what they were started from."""

import json
import os
from typing import Any

import click

from nbdsrv.cli.overlay_commit import commit
from nbdsrv.cli.words import human
from nbdsrv.errors import DiskError, NbdsrvError
from nbdsrv.overlay.description import Description
from nbdsrv.overlay.facts import OverlayFacts, overlay_facts
from nbdsrv.overlay.pinning import unpin
from nbdsrv.overlay.place import Place, find_overlay, overlays_in
from nbdsrv.repository.repository import stamp_of

__all__ = ["overlay"]


@click.group(short_help="What clients of serve --overlay have written.")
def overlay() -> None:
    """List, describe, commit and drop the overlays of `nbdsrv serve --overlay DIR`."""


overlay.add_command(commit)


@overlay.command()
@click.argument("directory", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ls(directory: str, *, as_json: bool) -> int:
    """List the overlays in DIR. Exit code 3: one of them is damaged."""
    rows: list[OverlayFacts] = []
    damaged: list[DiskError] = []
    for path in overlays_in(directory):
        try:
            rows.append(overlay_facts(path))
        except DiskError as error:
            damaged.append(error)
    if as_json:
        click.echo(json.dumps([_row(row) for row in rows]))
    else:
        _print_table(rows)
    for problem in damaged:
        click.echo(f"nbdsrv: {problem}", err=True)
    return 3 if damaged else 0


@overlay.command()
@click.argument("path", metavar="DIR/NAME")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(path: str, *, as_json: bool) -> None:
    """Describe one overlay: what it is over, what was written, who has it.

    While it is served, what is counted is what has been flushed.
    """
    facts = overlay_facts(find_overlay(path))
    row = _row(facts)
    if as_json:
        click.echo(json.dumps(row))
        return
    for key, value in row.items():
        if key == "base":
            for name, each in value.items():
                click.echo(f"base {name}: {each}")
            continue
        click.echo(f"{key.replace('_', ' ')}: {_in_words(key, value)}")


@overlay.command()
@click.argument("paths", nargs=-1, required=True, metavar="DIR/NAME...")
@click.option("--dry-run", is_flag=True, help="Only say what would be given up.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
def drop(paths: tuple[str, ...], *, dry_run: bool, quiet: bool) -> None:
    """Remove overlays, and with them what was written. Not while they are served.

    The points they stand on are not pinned any more, and `nbdsrv prune` may delete them.
    """
    for text in paths:
        path = find_overlay(text)
        place = Place.take(path, create=False)
        try:
            if not dry_run:
                place.take_back()
            facts = overlay_facts(path, mine=True, damaged_too=True)
            if not dry_run:
                place.remove()
                _unpin(facts.description)
        except OSError as error:
            raise DiskError.from_os(f"overlay {path}", error) from error
        finally:
            place.let_go()
        if not quiet:
            verb = "would drop" if dry_run else "dropped"
            click.echo(f"{verb} {path}: {human(facts.dirty_bytes)} written")


def _unpin(found: Description) -> None:
    """The overlay is gone by now: a repository that cannot be reached does not bring it back."""
    try:
        unpin(found)
    except NbdsrvError as error:
        said = f"{found.selector} stays pinned in its repository; `nbdsrv prune --force` overrides"
        click.echo(f"nbdsrv: warning: {said}: {error}", err=True)


def _in_words(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "size" or key.endswith("bytes"):
        return f"{human(value)} ({value})"
    if key == "created":
        return stamp_of(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _row(facts: OverlayFacts) -> dict[str, Any]:
    said: Description = facts.description
    return {
        "path": facts.path,
        "export": said.export,
        "source": said.source,
        "selector": said.selector or None,
        "size": said.size,
        "created": said.created,
        "dirty_bytes": facts.dirty_bytes,
        "zero_bytes": facts.zero_bytes,
        "copied_bytes": facts.copied_bytes,
        "disk_bytes": facts.disk_bytes,
        "in_use": facts.in_use,
        "pid": facts.pid or None,
        "id": said.id,
        "base": said.base,
    }


_HEADINGS = ("NAME", "BASE", "SIZE", "WRITTEN", "COPIED", "ON DISK", "IN USE")


def _print_table(rows: list[OverlayFacts]) -> None:
    table = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(row[n]) for row in table) for n in range(len(_HEADINGS))]
    for cells in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        click.echo(line.rstrip())


def _cells(facts: OverlayFacts) -> tuple[str, ...]:
    said = facts.description
    used = f"by {facts.pid}" if facts.pid else "yes"
    return (
        os.path.basename(facts.path),
        said.selector or said.source,
        human(said.size),
        human(facts.dirty_bytes),
        human(facts.copied_bytes),
        human(facts.disk_bytes),
        used if facts.in_use else "no",
    )
