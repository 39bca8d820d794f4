"""``nbdsrv restore``: a disk of a restore point, to wherever ``copy`` can write."""

import json
import time
from dataclasses import dataclass

import click

from nbdsrv.cli.target_options import target_options
from nbdsrv.cli.words import human
from nbdsrv.copying.engine import Outcome
from nbdsrv.disk.disk import Disk
from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import Kind, Source, parse_source

__all__ = ["restore"]


@dataclass(frozen=True, slots=True)
class _Job:
    source: Source
    target: Source
    since: str
    connections: int | None
    quiet: bool


@click.command(short_help="A disk of a restore point to where it goes.")
@click.argument("source")
@click.argument("target")
@click.option(
    "--changed-since",
    metavar="POINT",
    help="TARGET holds this point of the same disk: write only what differs from it.",
)
@target_options
def restore(
    source: str,
    target: str,
    changed_since: str | None,
    *,
    to: str | None,
    compress: str | None,
    backing: str,
    connections: int | None,
    as_json: bool,
    quiet: bool,
    force: bool,
) -> None:
    """Restore SOURCE, a disk of a restore point (repo:/path#GROUP/DISK@POINT), to TARGET.

    TARGET is what copy takes: a new image, standard output, a block device or an NBD URI. With
    --changed-since it is a disk that is there already, also a raw or qcow2 image.
    """
    parsed = parse_source(source)
    if parsed.kind is not Kind.REPOSITORY:
        raise ConfigError(f"{source}: not in a repository (repo:/path#...); use copy for a disk")
    if changed_since is None:
        from nbdsrv.cli.copy import copy

        assert copy.callback is not None
        copy.callback(
            source,
            target,
            to=to,
            compress=compress,
            backing=backing,
            connections=connections,
            as_json=as_json,
            quiet=quiet,
            force=force,
        )
        return
    if to or compress or backing or force:
        raise ConfigError(
            "--changed-since writes onto a disk that is there; --to, --compress,"
            " --backing and --force are for new images"
        )
    job = _Job(parsed, parse_source(target), changed_since, connections, quiet)
    if job.target.kind not in {Kind.IMAGE, Kind.NBD}:
        raise ConfigError(f"{target}: --changed-since writes onto an image, a device or an NBD URI")
    _patch(job, as_json=as_json)


def _patch(job: _Job, *, as_json: bool) -> None:
    from nbdsrv.cli.stopping import run

    began = time.monotonic()
    outcome = run(_patched(job), f"{job.target.text} is half restored")
    duration = time.monotonic() - began
    if as_json:
        facts = {
            "source": job.source.text,
            "target": job.target.text,
            "size": outcome.size,
            "data_bytes": outcome.data,
            "zero_bytes": outcome.zero,
            "written_bytes": outcome.written,
            "duration_s": round(duration, 3),
        }
        click.echo(json.dumps(facts))
    elif not job.quiet:
        click.echo(
            f"{job.target.text}: {human(outcome.size)}, {human(outcome.written)} of it written,"
            f" {human(outcome.zero)} zeroed, in {duration:.1f} s"
        )


async def _patched(job: _Job) -> Outcome:
    from nbdsrv.backup.patch import Patch, changed_since
    from nbdsrv.cli.running import opened, running_workers
    from nbdsrv.copying.in_place import DiskWriter
    from nbdsrv.copying.progress import progress
    from nbdsrv.export.opener import open_source
    from nbdsrv.source.nbd import open_nbd

    with progress("restoring", quiet=job.quiet) as advance:
        async with running_workers() as workers, opened(job.source.text, workers) as source:
            context = changed_since(source, job.since)
            if job.target.kind is Kind.NBD and job.connections:
                target: Disk = await open_nbd(
                    job.target.location, workers, writable=True, connections=job.connections
                )
            else:
                target = await open_source(job.target, workers, writable=True)
            try:
                work = Patch(source, context, DiskWriter(target), workers, advance)
                return await work.run()
            finally:
                await target.close()
