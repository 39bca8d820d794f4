"""``nbdsrv overlay commit``: a restore point of what a VM has made of another one."""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import click

from nbdsrv.errors import ConfigError

if TYPE_CHECKING:
    from nbdsrv.backup.report import Report
    from nbdsrv.export.grammar import Source
    from nbdsrv.overlay.description import Description

__all__ = ["commit"]


@click.command()
@click.argument("path", metavar="DIR/NAME")
@click.option(
    "--to",
    "repositories",
    multiple=True,
    required=True,
    metavar="REPOSITORY",
    help="Where to; several are filled by reading once.",
)
@click.option("--group", metavar="NAME", help="The VM.  [default: the base's]")
@click.option("--disk", metavar="NAME", help="The disk.  [default: the base's]")
@click.option(
    "--recheck",
    type=click.FloatRange(0, 100),
    default=1.0,
    show_default=True,
    metavar="PERCENT",
    help="Of what is unchanged, read so much all the same.",
)
@click.option(
    "--level",
    type=click.IntRange(0, 19),
    default=2,
    show_default=True,
    metavar="N",
    help="How hard zstd tries; 0 stores as it is.",
)
@click.option(
    "--label", "labels", multiple=True, metavar="KEY=VALUE", help="Kept with the point; repeatable."
)
@click.option("--json", "as_json", is_flag=True, help="Print what has been done as JSON.")
@click.option("--quiet", is_flag=True, help="Show no progress and print nothing.")
def commit(
    path: str,
    repositories: Sequence[str],
    group: str | None,
    disk: str | None,
    recheck: float,
    level: int,
    labels: Sequence[str],
    *,
    as_json: bool,
    quiet: bool,
) -> int:
    """Make a restore point of what the overlay DIR/NAME shows at this moment.

    It builds upon the point the overlay is over, where the repository has that, and stores what
    was changed. The VM may go on running; the overlay stays as it is and over what it is over.
    Where the base is no restore point, or another repository's, all of the disk is stored.
    """
    from nbdsrv.backup.engine import Order
    from nbdsrv.cli.backup_print import print_outcome
    from nbdsrv.cli.backup_run import Outcome
    from nbdsrv.cli.init import repository_source
    from nbdsrv.cli.stopping import run
    from nbdsrv.overlay.commit import CHANGED, described
    from nbdsrv.overlay.place import find_overlay

    path = find_overlay(path)
    found = described(path)
    disk = disk or _name(found, "disk")
    order = Order(
        group=group or _name(found, "group"),
        changed=CHANGED,
        recheck=recheck,
        level=level,
        labels=dict(_pair(text) for text in labels),
        consistency="crash",
    )
    to = [repository_source(text, "--to", written=True) for text in repositories]
    report: Report = run(_commit(path, disk, order, to, quiet=quiet), "no restore point was made")
    outcome = Outcome(report=report)
    print_outcome(outcome, as_json=as_json, quiet=quiet)
    return outcome.code


def _name(found: "Description", key: str) -> str:
    from nbdsrv.backup.naming import disk_name
    from nbdsrv.overlay.source import base_source

    said = found.base.get(key)
    if isinstance(said, str) and said and "point" in found.base:
        return said
    return disk_name(base_source(found))


def _pair(text: str) -> tuple[str, str]:
    key, mark, value = text.partition("=")
    if not mark or not key or not value:
        raise ConfigError(f"--label {text}: expected K=V")
    return key, value


async def _commit(
    path: str,
    disk: str,
    order: object,
    repositories: "Sequence[Source]",
    *,
    quiet: bool,
) -> "Report":
    from nbdsrv.backup.engine import Backup, Order, SourceDisk
    from nbdsrv.cli.backup_run import opened_destinations
    from nbdsrv.cli.running import running_workers
    from nbdsrv.copying.progress import progress
    from nbdsrv.overlay.commit import described, frozen_disk, parent_of
    from nbdsrv.repository.destination import Storage

    assert isinstance(order, Order)
    async with running_workers() as workers:
        with ExitStack() as stack:
            opened, failed = opened_destinations(repositories, stack, Storage())
            destinations = [destination for destination, _ in opened]
            found = described(path)
            choose = partial(parent_of, found=found, group=order.group, disk=disk)
            source = SourceDisk(disk, partial(frozen_disk, path, workers))
            with progress(order.group, quiet=quiet) as advance:
                work = Backup(destinations, workers, order, advance=advance, choose=choose)
                report = await work.run([source])
    texts = {destination.name: source.text for destination, source in opened}
    report.disks = [dataclasses.replace(d, repository=texts[d.repository]) for d in report.disks]
    report.failed = [dataclasses.replace(f, repository=texts[f.repository]) for f in report.failed]
    report.failed += failed
    return report
