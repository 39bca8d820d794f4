"""``nbdsrv verify`` of another tool's repository: as deep as its format allows."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from nbdsrv.cli.damage import conclude, print_damage
from nbdsrv.cli.running import running_workers
from nbdsrv.cli.stopping import run
from nbdsrv.cli.words import counted, human
from nbdsrv.copying.progress import progress
from nbdsrv.export.grammar import Source
from nbdsrv.repository.damage import Check
from nbdsrv.repository.opening import open_repository
from nbdsrv.repository.repository import Point, Repository
from nbdsrv.repository.selector import meant, scope_of

__all__ = ["verify_foreign"]


def verify_foreign(source: Source, level: str, *, as_json: bool, quiet: bool) -> None:
    """Verify what SOURCE names, print the outcome, and exit with what it means."""
    done = run(_verified(source, level, quiet=quiet))
    if as_json:
        click.echo(json.dumps({"repository": source.text, **asdict(done)}))
    else:
        _print(done, quiet=quiet)
    conclude(done.findings, done.unread)


async def _verified(source: Source, level: str, *, quiet: bool) -> Check:
    async with running_workers() as workers:
        repository = await open_repository(source, workers)
        try:
            points, disk = await _chosen(repository, source.selector)
            with progress("verifying", quiet=quiet) as advance:
                return await repository.verify(
                    level, points, disk, advance=advance or (lambda _, __: None)
                )
        finally:
            await repository.close()


async def _chosen(
    repository: Repository, selector: str
) -> tuple[Sequence[Point] | None, str | None]:
    """The points a selector means, and the only disk of them that is meant, or None."""
    if not selector:
        return None, None
    scope = await scope_of(repository, selector)
    return meant(scope, selector), scope.disk


def _print(done: Check, *, quiet: bool) -> None:
    print_damage(done.findings, done.unread)
    if quiet:
        return
    for note in done.notes:
        click.echo(f"note: {note.key} {note.text}")
    for text in done.unchecked:
        click.echo(f"not checked: {text}")
    damage = f"{len(done.findings)} damaged" if done.findings else "no damage found"
    click.echo(
        f"{counted(done.points, 'point')}, {counted(done.disks, 'disk')},"
        f" {counted(done.objects, 'object')} looked at ({human(done.read_bytes)} read): {damage}"
    )
