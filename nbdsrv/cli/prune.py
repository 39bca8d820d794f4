"""``nbdsrv prune``: which restore points stay."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from nbdsrv.cli.durations import parse_duration
from nbdsrv.cli.words import counted, printable
from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import NATIVE, Kind, parse_source
from nbdsrv.repository.native.prune import Fate, Pruned
from nbdsrv.repository.native.prune import prune as prune_points
from nbdsrv.repository.opening import open_vault
from nbdsrv.repository.retention import Rules

__all__ = ["prune"]

DEGRADED = 3
_COUNT = click.IntRange(1, 1_000_000)


@click.command(short_help="Delete restore points that no rule keeps.")
@click.argument("repository", metavar="REPOSITORY[#GROUP]")
@click.option("--keep-last", "last", type=_COUNT, metavar="N", help="The newest N points.")
@click.option("--keep-hourly", "hourly", type=_COUNT, metavar="N", help="One of each hour.")
@click.option("--keep-daily", "daily", type=_COUNT, metavar="N", help="One of each day.")
@click.option("--keep-weekly", "weekly", type=_COUNT, metavar="N", help="One of each week.")
@click.option("--keep-monthly", "monthly", type=_COUNT, metavar="N", help="One of each month.")
@click.option("--keep-yearly", "yearly", type=_COUNT, metavar="N", help="One of each year.")
@click.option("--keep-within", "within", metavar="DURATION", help="So long before the newest: 30d.")
@click.option(
    "--keep-label", "labels", multiple=True, metavar="K[=V]", help="With that label; repeatable."
)
@click.option("--allow-empty", is_flag=True, help="The newest point of a group may go too.")
@click.option("--utc", is_flag=True, help="Days are those of UTC, not of this host's time zone.")
@click.option("--damaged", is_flag=True, help="Delete points that cannot be read.")
@click.option("--force", is_flag=True, help="Delete what somebody is reading or has pinned.")
@click.option("--gc", "collect", is_flag=True, help="Collect garbage afterwards, as `gc` does.")
@click.option("--dry-run", is_flag=True, help="Delete nothing; say what would be.")
@click.option("--json", "as_json", is_flag=True, help="Print what has been done as JSON.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
def prune(
    repository: str,
    *,
    last: int | None,
    hourly: int | None,
    daily: int | None,
    weekly: int | None,
    monthly: int | None,
    yearly: int | None,
    within: str | None,
    labels: tuple[str, ...],
    allow_empty: bool,
    utc: bool,
    damaged: bool,
    force: bool,
    collect: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Delete the restore points of REPOSITORY that no rule keeps, each group by itself.

    Every rule counts for itself, and a point that one of them keeps is kept. An hour, day, week
    (from Monday), month or year without a point is not counted; of the others the newest point is
    kept. The newest point of a group is always kept. What is locked or being read is spared, and
    so is what an overlay stands on, also while nobody serves it.

    The space is freed by `nbdsrv gc`. Exit code 3: there are points that cannot be read.
    """
    rules = Rules(
        last=last,
        hourly=hourly,
        daily=daily,
        weekly=weekly,
        monthly=monthly,
        yearly=yearly,
        within=_span(within),
        labels=tuple(_label(label) for label in labels),
        allow_empty=allow_empty,
    )
    if not rules and not damaged:
        raise ConfigError(f"{repository}: no rule says what to keep; give --keep-daily 7, say")
    source = parse_source(repository)
    native = source.kind is Kind.REPOSITORY and source.scheme in NATIVE
    if not native or source.partition is not None:
        raise ConfigError(f"{repository}: prune takes a repository: repo:/path or repo:/path#GROUP")
    vault = open_vault(source)
    try:
        group = source.selector or None
        groups = vault.groups()
        if group is not None and group not in groups:
            known = ", ".join(groups[:10]) or "there are none"
            raise ConfigError(f"{repository}: no such group; its groups: {known}")
        done = prune_points(
            vault,
            group,
            rules or None,
            zone=UTC if utc else None,
            damaged=damaged,
            force=force,
            dry_run=dry_run,
        )
        if not as_json and not quiet:
            _print(done, dry_run=dry_run, utc=utc)
        facts = _facts(repository, done, dry_run=dry_run, utc=utc)
        if collect:
            from nbdsrv.cli.gc import collected

            facts["gc"] = collected(vault, dry_run=dry_run, quiet=as_json or quiet)
    finally:
        vault.close()
    if as_json:
        click.echo(json.dumps(facts))
    if any(not each.deleted for each in done.damaged):
        raise click.exceptions.Exit(DEGRADED)


def _span(text: str | None) -> timedelta | None:
    return None if text is None else timedelta(seconds=parse_duration("--keep-within", text))


def _label(text: str) -> tuple[str, str | None]:
    name, equals, value = text.partition("=")
    if not name:
        raise ConfigError(f"--keep-label {text}: give NAME or NAME=VALUE")
    return name, value if equals else None


def _print(done: Pruned, *, dry_run: bool, utc: bool) -> None:
    for group, fates in done.fates.items():
        click.echo(printable(group))
        for fate in fates:
            click.echo(f"  {_time(fate, utc=utc)}  {fate.point.id}  {_fate(fate, dry_run=dry_run)}")
    for each in done.damaged:
        rest = _gone(dry_run=dry_run) if each.deleted else "stays; --damaged deletes it"
        click.echo(f"{each.text}: {rest}")
    count = len(done.deleted) + sum(each.deleted for each in done.damaged)
    zone = "UTC" if utc else datetime.now().astimezone().tzname()
    click.echo(f"{counted(count, 'point')} {_gone(dry_run=dry_run)}; days are those of {zone}")


def _time(fate: Fate, *, utc: bool) -> str:
    moment = datetime.fromtimestamp(fate.point.created, UTC)
    return (moment if utc else moment.astimezone()).strftime("%Y-%m-%d %H:%M:%S")


def _fate(fate: Fate, *, dry_run: bool) -> str:
    if fate.deleted:
        return _gone(dry_run=dry_run)
    return f"kept: {', '.join(fate.reasons) or fate.spared}"


def _gone(*, dry_run: bool) -> str:
    return "would be deleted" if dry_run else "deleted"


def _facts(repository: str, done: Pruned, *, dry_run: bool, utc: bool) -> dict[str, Any]:
    return {
        "repository": repository,
        "dry_run": dry_run,
        "zone": "UTC" if utc else "local",
        "deleted": len(done.deleted) + sum(each.deleted for each in done.damaged),
        "groups": [
            {
                "group": group,
                "points": [
                    {
                        "point": fate.point.id,
                        "created": fate.point.created,
                        "deleted": fate.deleted,
                        "reasons": list(fate.reasons),
                        "spared": fate.spared or None,
                    }
                    for fate in fates
                ],
            }
            for group, fates in done.fates.items()
        ],
        "damaged": [
            {"key": each.key, "reason": each.text, "deleted": each.deleted} for each in done.damaged
        ],
    }
