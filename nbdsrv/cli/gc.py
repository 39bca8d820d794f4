"""``nbdsrv gc``: give back what no restore point needs."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from nbdsrv.cli.durations import parse_duration
from nbdsrv.cli.init import repository_source
from nbdsrv.cli.words import counted, human
from nbdsrv.repository.native.collect import (
    DEFAULT_GRACE_S,
    DEFAULT_REPACK,
    Collected,
    collect,
)
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.opening import open_vault

__all__ = ["collected", "gc"]

DEGRADED = 3


@click.command(short_help="Give back the space nothing needs any more.")
@click.argument("repository")
@click.option(
    "--grace",
    default="24h",
    show_default=True,
    metavar="DURATION",
    help="How long before it is deleted what is not needed stays; 0: delete it in this run.",
)
@click.option(
    "--repack-below",
    type=click.IntRange(0, 100),
    default=DEFAULT_REPACK,
    show_default=True,
    metavar="PERCENT",
    help="Rewrite packs of which less than that is needed.",
)
@click.option("--dry-run", is_flag=True, help="Change nothing; say what would be done.")
@click.option("--json", "as_json", is_flag=True, help="Print what has been done as JSON.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
def gc(
    repository: str,
    *,
    grace: str,
    repack_below: int,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Collect the garbage of REPOSITORY: packs no restore point refers to.

    Backups and readers may be at work meanwhile. One run finds what is not needed any more, and
    one after the time of grace deletes it. Exit code 3: something is damaged or missing.
    """
    grace_s = parse_duration("--grace", grace)
    vault = open_vault(repository_source(repository, "gc"))
    try:
        facts = collected(
            vault,
            grace_s=grace_s,
            repack_below=repack_below,
            dry_run=dry_run,
            quiet=as_json or quiet,
        )
    finally:
        vault.close()
    if as_json:
        click.echo(json.dumps({"repository": repository, "dry_run": dry_run, **facts}))
    if facts["damage"] or facts["missing_count"]:
        raise click.exceptions.Exit(DEGRADED)


def collected(
    vault: Vault,
    *,
    grace_s: float = DEFAULT_GRACE_S,
    repack_below: int = DEFAULT_REPACK,
    dry_run: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Collect, print it unless ``quiet``, and give the facts.

    Raises:
        DiskError: as ``collect``.
    """
    done = collect(
        vault, grace_s=grace_s, repack_below=repack_below, dry_run=dry_run, tell=_tell(quiet=quiet)
    )
    if not quiet:
        _print(done, dry_run=dry_run)
    facts = asdict(done)
    facts["missing"] = [each._asdict() for each in done.missing]
    return facts


def _tell(*, quiet: bool) -> Callable[[str], None]:
    """Steps, for who waits at a terminal."""
    if quiet or not sys.stderr.isatty():
        return lambda _: None
    return lambda step: click.echo(f"{step} ...", err=True)


def _print(done: Collected, *, dry_run: bool) -> None:
    would = "would be " if dry_run else ""
    needs = "needs" if done.points == 1 else "need"
    click.echo(
        f"{counted(done.points, 'point')} {needs} {human(done.live_bytes)} of"
        f" {human(done.stored_bytes)} in {done.packs} packs"
    )
    click.echo(f"{would}deleted: {done.deleted_packs} packs, {human(done.freed_bytes)}")
    if done.condemned_packs:
        moved = f", {done.moved_packs} of them repacked" if done.moved_packs else ""
        click.echo(
            f"{would}condemned: {done.condemned_packs} packs, {human(done.condemned_bytes)}{moved}"
        )
    if done.waiting_packs:
        click.echo(f"condemned and waiting for {done.waiting_for}: {done.waiting_packs} packs")
    if done.spared_packs:
        click.echo(f"spared, for a backup is running: {done.spared_packs} packs")
    for text in done.damage:
        click.echo(text)
    for each in done.missing:
        click.echo(f"{each.point} {each.disk}: {each.key} is missing")
    if done.missing_count:
        click.echo(f"missing: {done.missing_count}; `nbdsrv verify` tells what that hurts")
