"""``nbdsrv compare``: do two disks have the same content?"""

import json
import time

import click

from nbdsrv.cli.running import opened, running_workers
from nbdsrv.cli.stopping import run
from nbdsrv.copying.compare import Verdict
from nbdsrv.copying.compare import compare as compare_disks
from nbdsrv.copying.progress import progress

__all__ = ["DIFFERENT", "compare"]

DIFFERENT = 3
"""Exit code of disks that differ; 1 is for those that could not be compared."""


@click.command(short_help="Is the content of two disks the same?")
@click.argument("one", metavar="SOURCE")
@click.argument("other", metavar="SOURCE")
@click.option("--strict", is_flag=True, help="The sizes must be the same too.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@click.option("--quiet", is_flag=True, help="Show no progress and print nothing.")
def compare(one: str, other: str, *, strict: bool, as_json: bool, quiet: bool) -> None:
    """Compare the content of two disks.

    Exit code 0 if it is the same, 3 if it differs. Where one disk is longer than the other, the
    rest of it must be zeroes.
    """
    began = time.monotonic()
    verdict = run(_compare(one, other, strict=strict, quiet=quiet))
    duration = time.monotonic() - began
    if as_json:
        facts = {
            "sources": [one, other],
            "sizes": list(verdict.sizes),
            "equal": verdict.equal,
            "first_difference": verdict.difference,
            "duration_s": round(duration, 3),
        }
        click.echo(json.dumps(facts))
    elif not quiet:
        click.echo(_in_words(verdict))
    if not verdict.equal:
        raise click.exceptions.Exit(DIFFERENT)


def _in_words(verdict: Verdict) -> str:
    if verdict.equal:
        return "the content is the same"
    one, other = verdict.sizes
    sizes = "" if one == other else f" (the sizes are {one} and {other})"
    return f"the first difference is at byte {verdict.difference}{sizes}"


async def _compare(one: str, other: str, *, strict: bool, quiet: bool) -> Verdict:
    with progress("comparing", quiet=quiet) as bar:
        async with (
            running_workers() as workers,
            opened(one, workers) as first,
            opened(other, workers) as second,
        ):
            looking = bar and bar.looking
            return await compare_disks(
                first, second, workers, strict=strict, advance=bar, looking=looking
            )
