"""``nbdsrv copy xo:/path#GROUP repo:/path``: other tools' restore points into our repository."""

import json
import sys
import time
from dataclasses import asdict

import click

from nbdsrv.backup.migrate import Migrated, Migration, SourceFailed
from nbdsrv.cli.copy_points import chosen_points, open_native, target_passphrase
from nbdsrv.cli.running import running_workers
from nbdsrv.cli.stopping import run
from nbdsrv.cli.words import human
from nbdsrv.copying.progress import progress
from nbdsrv.errors import RepositoryError
from nbdsrv.export.grammar import Source
from nbdsrv.repository.native.repository import NativeRepository
from nbdsrv.repository.opening import open_repository
from nbdsrv.repository.repository import Repository

__all__ = ["migrate_points"]

INCOMPLETE = 3
"""Exit code when points were left out."""

_Outcome = tuple[list[Migrated], list[str]]


def migrate_points(source: Source, target: Source, *, as_json: bool, quiet: bool) -> None:
    """Copy the points that SOURCE names, and print what has become of each."""
    began = time.monotonic()
    left = "points copied before are there; run it again"
    done, failed = run(_migrate(source, target, quiet=quiet), left)
    if as_json:
        facts = {
            "source": source.text,
            "target": target.text,
            "points": [asdict(each) for each in done],
            "damaged": failed,
            "duration_s": round(time.monotonic() - began, 3),
        }
        click.echo(json.dumps(facts))
    elif not quiet:
        for each in done:
            click.echo(_line(each))
    for text in failed:
        click.echo(f"nbdsrv: not copied: {text}", err=True)
    if failed:
        sys.exit(INCOMPLETE if done else 1)


def _line(done: Migrated) -> str:
    name = f"{done.group}@{done.origin}"
    if not done.copied:
        return f"{name}: is there already, {done.id}"
    modes = ", ".join(dict.fromkeys(done.modes.values()))
    return (
        f"{name}: {done.id}, {human(done.size)}, {human(done.read_bytes)} of it read ({modes}),"
        f" {human(done.new_bytes)} stored"
    )


async def _migrate(source: Source, target: Source, *, quiet: bool) -> _Outcome:
    async with running_workers() as workers:
        to = await open_native(target, workers, target_passphrase)
        try:
            from_ = await open_repository(source, workers)
            try:
                return await _migrate_all(from_, to, source.selector, quiet=quiet)
            finally:
                await from_.close()
        finally:
            await to.close()


async def _migrate_all(
    source: Repository, target: NativeRepository, selector: str, *, quiet: bool
) -> _Outcome:
    points, disk = await chosen_points(source, selector)
    done: list[Migrated] = []
    failed: list[str] = []
    with progress(selector or source.name, quiet=quiet) as advance:
        total = sum(
            each.size for point in points for each in point.disks if disk in {None, each.name}
        )
        so_far = 0

        def advanced(length: int) -> None:
            nonlocal so_far
            so_far += length
            if advance is not None:
                advance(min(so_far, total), total)

        work = Migration(source, target, advanced)
        for point in points:
            try:
                done.append(await work.copy(point, disk))
            except SourceFailed as error:
                if len(points) == 1:
                    raise
                failed.append(str(error))
                continue
            if point.flags and "reason" in point.facts:
                failed.append(f"part of point {point.id}: {point.facts['reason']}")
    if not selector:
        failed += source.unread
    if not points and not failed:
        raise RepositoryError(f"{source.name}: has no restore points")
    return done, failed
