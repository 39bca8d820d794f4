"""``nbdsrv copy repo:A#GROUP repo:B``: restore points into another repository."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import click

from nbdsrv.cli.running import running_workers
from nbdsrv.cli.stopping import run
from nbdsrv.cli.words import human, printable
from nbdsrv.copying.progress import progress
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, CorruptImage
from nbdsrv.export.grammar import Kind, Source, parse_source
from nbdsrv.repository.native.repository import NativeRepository
from nbdsrv.repository.native.transfer import Transfer, Transferred
from nbdsrv.repository.opening import NATIVE, open_vault
from nbdsrv.repository.passphrase import passphrase_of
from nbdsrv.repository.repository import Point, Repository
from nbdsrv.repository.selector import meant, scope_of

__all__ = ["chosen_points", "copy_points", "open_native", "target_passphrase"]

TARGET_VARIABLE = "NBDSRV_TARGET_PASSPHRASE"
INCOMPLETE = 3
"""Exit code when damaged points were left out."""


def copy_points(source: str, target: str, *, as_json: bool, quiet: bool) -> None:
    """Copy the points that SOURCE names, and print what has become of each."""
    from_, to = _repository(source), _repository(target)
    if to.selector:
        raise ConfigError(f"{target}: points keep their names; leave out #{to.selector}")
    if from_.scheme not in NATIVE:
        from nbdsrv.cli.migrate_points import migrate_points

        migrate_points(from_, to, as_json=as_json, quiet=quiet)
        return
    began = time.monotonic()
    left = "points copied before are there; run it again"
    done, damaged = run(_copy(from_, to, quiet=quiet), left)
    duration = round(time.monotonic() - began, 3)
    if as_json:
        facts = {
            "source": source,
            "target": target,
            "points": [asdict(each) for each in done],
            "damaged": damaged,
            "duration_s": duration,
        }
        click.echo(json.dumps(facts))
    elif not quiet:
        for each in done:
            click.echo(_line(each))
    for text in damaged:
        click.echo(f"nbdsrv: not copied: {text}", err=True)
    if damaged:
        sys.exit(INCOMPLETE)


def _repository(text: str) -> Source:
    source = parse_source(text)
    if source.kind is not Kind.REPOSITORY or source.partition is not None:
        raise ConfigError(
            f"{text}: copy takes whole points from one repository to another;"
            " `nbdsrv backup` makes a point of a disk"
        )
    return source


def _line(done: Transferred) -> str:
    name = printable(f"{done.group}@{done.id}")
    if not done.copied:
        return f"{name}: is there already"
    return (
        f"{name}: {human(done.size)}, {human(done.read_bytes)} of it read,"
        f" {human(done.new_bytes)} stored"
    )


def target_passphrase() -> str:
    """The target's own, or the one that is for both."""
    try:
        return passphrase_of(variable=TARGET_VARIABLE)
    except ConfigError as error:
        try:
            return passphrase_of()
        except ConfigError:
            raise error from None


_Outcome = tuple[list[Transferred], list[str]]


async def _copy(source: Source, target: Source, *, quiet: bool) -> _Outcome:
    async with running_workers() as workers:
        from_ = await open_native(source, workers, passphrase_of)
        try:
            to = await open_native(target, workers, target_passphrase)
            try:
                return await _copy_all(from_, to, source.selector, quiet=quiet)
            finally:
                await to.close()
        finally:
            await from_.close()


async def open_native(
    source: Source, workers: Workers, passphrase: Callable[[], str]
) -> NativeRepository:
    vault = await workers.look_up(open_vault, source, passphrase)
    return NativeRepository(vault, workers)


async def _copy_all(
    source: NativeRepository, target: NativeRepository, selector: str, *, quiet: bool
) -> _Outcome:
    points, disk = await chosen_points(source, selector)
    done: list[Transferred] = []
    damaged: list[str] = []
    with progress(selector or source.name, quiet=quiet) as advance:
        total = sum(each.size for point in points for each in point.disks)
        so_far = 0

        def advanced(length: int) -> None:
            nonlocal so_far
            so_far += length
            if advance is not None:
                advance(so_far, total)

        work = Transfer(source, target, advanced)
        for point in points:
            try:
                done.append(await work.copy(point, disk))
            except CorruptImage as error:
                if len(points) == 1:
                    raise
                damaged.append(f"{point.group}@{point.id}: {error}")
    return done, damaged


async def chosen_points(source: Repository, selector: str) -> tuple[Sequence[Point], str | None]:
    """The points to copy, from old to new in each group, and the only disk of them or None."""
    scope = await scope_of(source, selector)
    if scope.said and len(scope.points) > 1:
        text = f"{source.name}#{selector}: means {len(scope.points)} points; say which"
        raise ConfigError(text)
    return meant(scope, selector), scope.disk
