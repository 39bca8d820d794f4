"""``python -m conformance.fuzz [FORMAT...]``: hostile images for every reader.

Exit codes: 0 nothing found; 1 something was, or a format could not be tried under CI=true; 2 usage.
"""

import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import click

from conformance.fuzz.hunt import Hunt, Tally
from conformance.fuzz.replay import replay
from conformance.fuzz.report import render
from conformance.fuzz.specimens import FORMATS, specimens
from conformance.outcome import CheckFailedError, MissingPeerError
from nbdsrv.formats import opening

QUICK_S = 1.5
"""Seconds for each format by default: all of them within the time a developer waits."""


@click.command()
@click.argument("formats", nargs=-1, metavar="[FORMAT]...")
@click.option(
    "--seconds", type=click.FloatRange(0.1), help=f"Of mutants, per format. Default: {QUICK_S:g}."
)
@click.option("--cases", type=click.IntRange(0), help="Per format, instead of a time.")
@click.option("--seed", type=int, help="Default: another one each time; it is printed.")
@click.option("--first", type=click.IntRange(0), default=0, help="Number of the first case.")
@click.option("--peer", is_flag=True, help="Ask qemu-img about each image that is accepted.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="For findings.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Save the result too.")
@click.option("--replay", "kept", type=click.Path(exists=True, path_type=Path), help="A finding.")
def main(
    formats: tuple[str, ...],
    seconds: float | None,
    cases: int | None,
    seed: int | None,
    first: int,
    *,
    peer: bool,
    keep: Path | None,
    json_file: Path | None,
    kept: Path | None,
) -> None:
    """Give every reader mutants of valid images, and report what it does not survive."""
    if kept is not None:
        sys.exit(replay(kept))
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise click.UsageError(f"no format {unknown[0]!r}; there are {', '.join(FORMATS)}")
    chosen = seed if seed is not None else random.SystemRandom().randrange(10**6)
    click.echo(f"seed {chosen}")
    place = keep or Path(tempfile.gettempdir()) / "nbdsrv-fuzz-findings"
    wanted = _limit(seconds, cases)
    tallies: list[Tally] = []
    absent: list[tuple[str, str]] = []
    for name in formats or FORMATS:
        missing = _missing(name)
        if missing:
            absent.append((name, missing))
            continue
        try:
            with tempfile.TemporaryDirectory(prefix="nbdsrv-specimens-") as directory:
                made = specimens(name, Path(directory))
        except (MissingPeerError, CheckFailedError) as error:
            absent.append((name, str(error)))
            continue
        tallies.append(Hunt(made, chosen, place, peer=peer).run(wanted, first))
        if sys.stderr.isatty():
            click.echo(f"{name}: {tallies[-1].cases} cases", err=True)
    click.echo(render(tallies, absent))
    if json_file is not None:
        json_file.write_text(json.dumps(_record(chosen, tallies, absent), indent=1) + "\n")
    strict = os.environ.get("CI", "").lower() == "true"
    sys.exit(any(tally.findings for tally in tallies) or bool(absent and strict))


def _limit(seconds: float | None, cases: int | None) -> Callable[[int, float], bool]:
    if cases is not None:
        return lambda done, _: done < cases
    longest = seconds or QUICK_S
    return lambda _, spent: spent < longest


def _missing(name: str) -> str:
    """Why there is no reader to try, or ""."""
    form = name.removesuffix("-write")
    where = "nbdsrv.formats.partition:" if form == "partition" else opening._FORMATS[form]  # noqa: SLF001
    try:
        import_module(where.partition(":")[0])
    except Exception as error:  # noqa: BLE001 - whatever it is, there is no reader then
        return f"no reader: {error}"
    return ""


def _record(seed: int, tallies: list[Tally], absent: list[tuple[str, str]]) -> dict[str, object]:
    rows = [
        {
            "format": tally.format,
            "cases": tally.cases,
            "accepted": tally.accepted,
            "broken": tally.broken,
            "refused": tally.refused,
            "peak_bytes": tally.peak,
            "seconds": round(tally.seconds, 1),
            "findings": [
                {"number": f.number, "kind": f.kind, "detail": f.detail, "kept": f.kept}
                for f in tally.findings
            ],
        }
        for tally in tallies
    ]
    return {"seed": seed, "formats": rows, "absent": dict(absent)}


if __name__ == "__main__":
    main(prog_name="python -m conformance.fuzz")
