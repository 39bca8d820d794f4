"""``nbdsrv verify``: is a repository what it was, and if not, what is lost?"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict

import click

from nbdsrv.cli.damage import conclude, print_damage
from nbdsrv.cli.durations import parse_duration
from nbdsrv.cli.quantities import parse_size
from nbdsrv.cli.running import running_workers
from nbdsrv.cli.stopping import run
from nbdsrv.cli.verify_foreign import verify_foreign
from nbdsrv.cli.words import counted, human
from nbdsrv.copying.progress import Advance, progress
from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import Kind, Source, parse_source
from nbdsrv.repository.native.point import PointRecord
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.native.verify import LEVELS, Budget, Verified
from nbdsrv.repository.native.verify import verify as verify_vault
from nbdsrv.repository.opening import NATIVE, open_keyless, open_repository, open_vault
from nbdsrv.repository.selector import meant, scope_of

__all__ = ["verify"]


Chosen = Callable[[PointRecord], Iterable[str]]


@click.command(short_help="Is everything still there and intact?")
@click.argument("repository", metavar="REPOSITORY[#GROUP/DISK@POINT]")
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    default="structure",
    show_default=True,
    help="structure: points, maps, index. packs: also the hash of every pack. chunks: also the"
    " content of every chunk.",
)
@click.option(
    "--sample",
    type=click.FloatRange(0, 100, min_open=True),
    metavar="PERCENT",
    help="Read that part of the packs: those that were not for the longest time.",
)
@click.option("--time-budget", metavar="DURATION", help="Stop reading packs after that: 30m, 2h.")
@click.option("--max-bytes", metavar="SIZE", help="Stop reading packs after so much: 100G.")
@click.option(
    "--without-key",
    is_flag=True,
    help="Hash the packs of an encrypted repository without its passphrase, nothing else.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@click.option("--quiet", is_flag=True, help="Print only what is damaged.")
def verify(
    repository: str,
    *,
    level: str,
    sample: float | None,
    time_budget: str | None,
    max_bytes: str | None,
    without_key: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Verify REPOSITORY, or what some of its points need.

    Names every damaged object, and the disks, ranges and points it hurts. Nothing is repaired, but
    later backups store anew what damaged packs held. With a budget, the next run goes on where
    this one stopped. Exit code 0: no damage; 3: damage; 1: something could not be read at all.
    """
    budget = Budget(
        sample,
        parse_duration("--time-budget", time_budget) if time_budget else None,
        parse_size("--max-bytes", max_bytes) if max_bytes else None,
    )
    source = parse_source(repository)
    if source.kind is not Kind.REPOSITORY or source.partition is not None:
        raise ConfigError(f"{repository}: verify takes a repository; for instance repo:/path")
    if without_key and (level != "packs" or source.selector):
        raise ConfigError(f"{repository}: --without-key goes with --level packs and no selector")
    if source.scheme not in NATIVE:
        if without_key or sample is not None or time_budget or max_bytes:
            text = "--without-key, --sample, --time-budget and --max-bytes are for repo: only"
            raise ConfigError(f"{repository}: {text}")
        verify_foreign(source, level, as_json=as_json, quiet=quiet)
        return
    if level == "structure" and (sample is not None or time_budget or max_bytes):
        text = "--sample, --time-budget and --max-bytes go with --level packs or chunks"
        raise ConfigError(f"{repository}: {text}")
    vault = open_keyless(source) if without_key else open_vault(source)
    try:
        with progress("verifying", quiet=quiet) as advance:
            done = _verified(vault, source, level, budget, advance, keyless=without_key)
    finally:
        vault.close()
    if as_json:
        click.echo(json.dumps({"repository": repository, **asdict(done)}))
    else:
        _print(done, quiet=quiet)
    conclude(done.findings, done.unread)


def _verified(
    vault: Vault,
    source: Source,
    level: str,
    budget: Budget,
    advance: Advance | None,
    *,
    keyless: bool,
) -> Verified:
    chosen = run(_chosen(source)) if source.selector else None
    keyless = keyless and vault.config.cipher is not None
    return verify_vault(
        vault,
        level,
        chosen=chosen,
        budget=budget,
        keyless=keyless,
        advance=advance or (lambda _, __: None),
    )


async def _chosen(source: Source) -> Chosen:
    """The disks of the points that a selector means; without a point, those of all its points."""
    async with running_workers() as workers:
        repository = await open_repository(source, workers)
        try:
            scope = await scope_of(repository, source.selector)
        finally:
            await repository.close()
    points = {(point.group, point.id) for point in meant(scope, source.selector)}

    def chosen(record: PointRecord) -> Iterable[str]:
        if (record.group, record.id) not in points:
            return []
        return [disk.name for disk in record.disks if scope.disk in {None, disk.name}]

    return chosen


def _print(done: Verified, *, quiet: bool) -> None:
    print_damage(done.findings, done.unread)
    if quiet:
        return
    for note in done.notes:
        click.echo(f"note: {note.key} {note.text}")
    checked = ""
    if done.level != "structure":
        rest = "" if done.completed else "; the next run goes on from there"
        checked = (
            f", {done.checked} of them read ({human(done.read_bytes)}, {done.entries} entries)"
            f"{rest}"
        )
    damage = f"{len(done.findings)} damaged" if done.findings else "no damage found"
    click.echo(
        f"{counted(done.points, 'point')}, {counted(done.disks, 'disk')},"
        f" {counted(done.packs, 'pack')}{checked}: {damage}"
    )
