"""``nbdsrv backup``: disks into repositories, as one restore point."""

import dataclasses
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import click

from nbdsrv.cli.init import repository_source
from nbdsrv.cli.quantities import parse_rate
from nbdsrv.cli.words import human
from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import Kind, Source, parse_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdsrv.backup.engine import Order
    from nbdsrv.backup.report import DiskReport, Report
    from nbdsrv.disk.disk import Disk
    from nbdsrv.disk.workers import Workers
    from nbdsrv.repository.native.vault import Vault

__all__ = ["backup"]

DEGRADED = 3
MAX_LEVEL = 19


@dataclass(frozen=True, slots=True)
class _Job:
    """What the command line asked for."""

    disks: dict[str, Source]
    repositories: list[Source]
    order: "Order"
    rate: int | None
    quiet: bool


@click.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option(
    "--disk", "named", multiple=True, metavar="NAME=SOURCE", help="A disk under a name of its own."
)
@click.option(
    "--to",
    "repositories",
    multiple=True,
    required=True,
    metavar="REPOSITORY",
    help="Where to; several are filled by reading once.",
)
@click.option("--group", metavar="NAME", help="The VM.  [default: the first disk's name]")
@click.option(
    "--since",
    default="auto",
    show_default=True,
    metavar="auto|full|POINT",
    help="The point to build upon: the latest one, none, or this one.",
)
@click.option(
    "--changed",
    default="",
    metavar="CONTEXT",
    help="A meta context of the source that tells what has changed since that point.",
)
@click.option(
    "--recheck",
    type=click.FloatRange(0, 100),
    default=1.0,
    show_default=True,
    metavar="PERCENT",
    help="Of what is said to be unchanged, read so much all the same.",
)
@click.option(
    "--level",
    type=click.IntRange(0, MAX_LEVEL),
    default=2,
    show_default=True,
    help="Of zstd; 0 stores as it is.",
)
@click.option("--rate", metavar="SIZE/s", help="Read no faster, for instance 100M/s.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Of the point.")
@click.option("--json", "as_json", is_flag=True, help="Print what has been done as JSON.")
@click.option("--quiet", is_flag=True, help="Show no progress and print nothing.")
def backup(
    sources: Sequence[str],
    named: Sequence[str],
    repositories: Sequence[str],
    group: str | None,
    since: str,
    changed: str,
    recheck: float,
    level: int,
    rate: str | None,
    labels: Sequence[str],
    *,
    as_json: bool,
    quiet: bool,
) -> int:
    """Back up SOURCEs, the disks of one VM, as one restore point.

    A disk is called by its file's name unless --disk says otherwise. Exit code 3: a repository of
    several has failed, or a changed block was found where none was said to be.
    """
    import uvloop

    from nbdsrv.backup.engine import Order

    disks = _disks(sources, named)
    order = Order(
        group=group or next(iter(disks)),
        since=since,
        changed=changed,
        recheck=recheck,
        level=level,
        labels=dict(_pair("--label", text) for text in labels),
    )
    if since == "full" and changed:
        raise ConfigError("--changed tells what to add to a point; --since full builds upon none")
    job = _Job(
        disks,
        [repository_source(text, "--to") for text in repositories],
        order,
        parse_rate("--rate", rate) if rate else None,
        quiet,
    )
    report = uvloop.run(_interruptible(job))
    _print(report, as_json=as_json, quiet=quiet)
    mismatched = [disk for disk in report.disks if disk.recheck_mismatches]
    for disk in mismatched:
        click.echo(f"nbdsrv: {disk.repository}: {disk.disk}: {disk.reason}", err=True)
    for failed in report.failed:
        click.echo(f"nbdsrv: {failed.error}", err=True)
    return DEGRADED if mismatched or report.failed else 0


def _disks(sources: Sequence[str], named: Sequence[str]) -> dict[str, Source]:
    from nbdsrv.backup.naming import disk_name

    pairs = [(disk_name(source), source) for source in map(parse_source, sources)]
    for text in named:
        name, source = _pair("--disk", text)
        pairs.append((name, parse_source(source)))
    if not pairs:
        raise ConfigError("nothing to back up; give a SOURCE, for instance disk.qcow2")
    disks = dict(pairs)
    if len(disks) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two disks are named {twice!r}; use --disk NAME=SOURCE")
    return disks


def _pair(option: str, text: str) -> tuple[str, str]:
    key, mark, value = text.partition("=")
    if not mark or not key or not value:
        raise ConfigError(
            f"{option} {text}: expected {'NAME=SOURCE' if 'disk' in option else 'K=V'}"
        )
    return key, value


def _print(report: "Report", *, as_json: bool, quiet: bool) -> None:
    if as_json:
        rows = [dataclasses.asdict(disk) for disk in report.disks]
        rows += [
            {"repository": failed.repository, "error": str(failed.error)}
            for failed in report.failed
        ]
        click.echo(json.dumps(rows))
    elif not quiet:
        for disk in report.disks:
            click.echo(_in_words(disk))


def _in_words(disk: "DiskReport") -> str:
    return (
        f"{disk.repository}#{disk.group}/{disk.disk}@{disk.point}: {disk.mode} ({disk.reason}):"
        f" {human(disk.size)}, {human(disk.read_bytes + disk.rechecked_bytes)} read,"
        f" {human(disk.new_bytes)} stored, in {disk.duration_s:.1f} s"
    )


# --- running --------------------------------------------------------------------------------------


async def _interruptible(job: _Job) -> "Report":
    from nbdsrv.cli.stopping import stoppable

    return await stoppable(_back_up(job), "no restore point was made")


async def _back_up(job: _Job) -> "Report":
    from nbdsrv.backup.engine import Backup, SourceDisk
    from nbdsrv.cli.running import running_workers
    from nbdsrv.copying.progress import progress
    from nbdsrv.disk.throttle import Rate

    with progress(job.order.group, quiet=job.quiet) as advance:
        async with running_workers() as workers, AsyncExitStack() as stack:
            vaults = [stack.enter_context(_vault(source)) for source in job.repositories]
            _refuse_twice(vaults)
            disks = [
                SourceDisk(name, partial(_opened, source, workers), source)
                for name, source in job.disks.items()
            ]
            rate = Rate(job.rate) if job.rate else None
            work = Backup(vaults, workers, job.order, rate=rate, advance=advance)
            report = await work.run(disks)
    # As the user named them: what is printed can be used again.
    texts = {vault.name: each.text for vault, each in zip(vaults, job.repositories, strict=True)}
    report.disks = [dataclasses.replace(d, repository=texts[d.repository]) for d in report.disks]
    report.failed = [dataclasses.replace(f, repository=texts[f.repository]) for f in report.failed]
    return report


@contextmanager
def _vault(source: Source) -> "Iterator[Vault]":
    """Blocking: nothing else runs yet."""
    from nbdsrv.repository.opening import open_vault

    vault = open_vault(source)
    try:
        yield vault
    finally:
        vault.close()


def _refuse_twice(vaults: "Sequence[Vault]") -> None:
    seen: set[bytes] = set()
    for vault in vaults:
        if vault.repository in seen:
            raise ConfigError(f"{vault.name}: --to names this repository twice")
        seen.add(vault.repository)


@asynccontextmanager
async def _opened(
    source: Source, workers: "Workers", contexts: Sequence[str]
) -> "AsyncIterator[Disk]":
    """A source; an NBD server is asked for these meta contexts too."""
    if source.kind is Kind.NBD and source.partition is None:
        from nbdsrv.source.nbd import open_nbd
        from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH

        wanted = (ALLOCATION, ALLOCATION_DEPTH, *contexts)
        disk: Disk = await open_nbd(source.location, workers, contexts=wanted)
    else:
        from nbdsrv.export.opener import open_source

        disk = await open_source(source, workers)
    try:
        yield disk
    finally:
        await disk.close()
