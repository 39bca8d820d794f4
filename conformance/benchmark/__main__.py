"""``python -m conformance.benchmark``: run, print, store, rewrite the README's table.

Exit codes: 0 everything ran; 1 something could not be measured, or with ``--strict`` a bar was
missed; 2 wrong usage.
"""

import contextlib
import os
import re
import signal
import sys
from dataclasses import dataclass
from types import FrameType

import click

from conformance.benchmark import image
from conformance.benchmark.cells import Cell, Part, Peer, select
from conformance.benchmark.cold import run_cold
from conformance.benchmark.convert import run_conversions
from conformance.benchmark.environment import describe
from conformance.benchmark.foreign.run import run_foreign
from conformance.benchmark.formats import make_images, mixed
from conformance.benchmark.idle import run_idle
from conformance.benchmark.live import run_live
from conformance.benchmark.overlay import run_overlay
from conformance.benchmark.proxy import run_proxy
from conformance.benchmark.reading import run_clients
from conformance.benchmark.report import BenchmarkError, Report, load, store
from conformance.benchmark.repository import cells as repository
from conformance.benchmark.repository.cells import Program
from conformance.benchmark.repository.rounds import run_repository
from conformance.benchmark.repository.table import comparisons
from conformance.benchmark.rounds import Plan, Progress, run_rounds
from conformance.benchmark.servers import installed
from conformance.benchmark.table import markdown, rewrite, rows, text

SIZE = re.compile(r"([1-9][0-9]{0,6})([MG])")
UNITS = {"M": 1 << 20, "G": 1 << 30}
SMALLEST = 64 << 20
"""Below, 2 MiB requests of several rounds all hit the processor's caches."""
QUICK_SIZE = 256 << 20
REPOSITORY_SIZE = 4 << 30
"""Of the disk the repository part backs up: a small VM's."""
QUICK_ROUNDS, QUICK_SECONDS = 2, 1.0
ROUNDS, SECONDS = 5, 2.0
LONGEST_S = 600.0
EXTRA_ROUNDS = 3
"""Rounds of the cold, idle and repository parts at most: their differences are large."""


@dataclass(frozen=True, slots=True)
class Options:
    parts: set[Part]
    peers: list[Peer]
    cells: list[Cell]
    programs: list[Program]
    repository_cells: list[repository.Cell]
    cache: str
    size: int
    repository_size: int
    image: str | None
    rounds: int
    seconds: float
    connections: int


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """The bytes of a size such as 256M or 1G."""
    if value is None:
        return None
    match = SIZE.fullmatch(value.upper())
    if match is None or int(match[1]) * UNITS[match[2]] < SMALLEST:
        raise click.BadParameter("say a size such as 256M or 1G, 64M at least", context, parameter)
    return int(match[1]) * UNITS[match[2]]


@click.command()
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice([p.value for p in Part]),
    help="Default: all.",
)
@click.option("--cells", "pattern", default="", help="Only cells whose name contains this glob.")
@click.option(
    "--server",
    "peers",
    multiple=True,
    type=click.Choice([p.value for p in Peer]),
    help="Default: all.",
)
@click.option(
    "--program",
    "programs",
    multiple=True,
    type=click.Choice([p.value for p in Program]),
    help="Of the repository part. Default: all.",
)
@click.option("--rounds", type=click.IntRange(1, 100), help=f"Default: {ROUNDS}.")
@click.option("--seconds", type=click.FloatRange(0.2, LONGEST_S), help=f"Default: {SECONDS:g}.")
@click.option("--size", callback=_size, metavar="SIZE", help="Default: 1G; repositories 4G.")
@click.option("--image", "existing", type=click.Path(exists=True, dir_okay=False))
@click.option("--cache", type=click.Path(file_okay=False), help="Where images are made and kept.")
@click.option("--connections", type=click.IntRange(1, 10000), default=1000, show_default=True)
@click.option("--quick", is_flag=True, help="256M, 2 rounds, 1 s: to try it, not to quote it.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Store all samples.")
@click.option("--readme", type=click.Path(exists=True, dir_okay=False), help="Rewrite its table.")
@click.option("--from", "stored", type=click.Path(exists=True), help="Print a stored run again.")
@click.option("--strict", is_flag=True, help="Exit with 1 when a bar is missed.")
def main(
    parts: tuple[str, ...],
    pattern: str,
    peers: tuple[str, ...],
    programs: tuple[str, ...],
    rounds: int | None,
    seconds: float | None,
    size: int | None,
    existing: str | None,
    cache: str | None,
    connections: int,
    *,
    quick: bool,
    json_path: str | None,
    readme: str | None,
    stored: str | None,
    strict: bool,
) -> None:
    """Measure nbdsrv beside its peers on the same image, interleaved."""
    chosen = {Part(part) for part in parts} or set(Part)
    cells = select(chosen, pattern)
    of_repositories = repository.select(pattern) if Part.REPOSITORY in chosen else []
    apart = {Part.COLD, Part.IDLE, Part.FOREIGN, Part.OVERLAY, Part.PROXY}
    if not cells and not of_repositories and not chosen & apart:
        raise click.UsageError(f"no cell of these parts matches {pattern!r}")
    options = Options(
        parts=chosen,
        peers=[peer for peer in Peer if peer in peers or not peers],
        cells=cells,
        programs=[program for program in Program if program in programs or not programs],
        repository_cells=of_repositories,
        cache=os.path.abspath(cache or _default_cache()),
        size=size or (QUICK_SIZE if quick else UNITS["G"]),
        repository_size=size or (QUICK_SIZE if quick else REPOSITORY_SIZE),
        image=os.path.abspath(existing) if existing else None,
        rounds=rounds or (QUICK_ROUNDS if quick else ROUNDS),
        seconds=seconds or (QUICK_SECONDS if quick else SECONDS),
        connections=connections,
    )
    try:
        report = load(stored) if stored else _run(options, _progress())
        _publish(report, json_path, readme)
    except (BenchmarkError, OSError) as error:
        raise click.ClickException(str(error)) from error
    missed = strict and (
        any(row.verdict == "NO" for row in rows(report))
        or not all(each.met for each in comparisons(report))
    )
    sys.exit(1 if report.failures or missed else 0)


def _publish(report: Report, json_path: str | None, readme: str | None) -> None:
    if json_path:
        store(report, json_path)
    click.echo(text(report))
    if readme and report.failures:
        raise BenchmarkError(f"{readme} is left as it was: the run is not complete")
    if readme:
        rewrite(readme, markdown(report))


def _leave(number: int, _: FrameType | None) -> None:
    """SIGTERM ends the servers, mounts and copies too, as Ctrl-C does."""
    raise SystemExit(128 + number)


def _run(options: Options, progress: Progress) -> Report:
    if options.parts == {Part.FOREIGN}:
        report = Report(describe("", 0, options.rounds, options.seconds))
        _run_foreign(options, report, progress)
        return report
    if options.parts == {Part.REPOSITORY}:
        path, size = mixed(options.cache, options.repository_size), options.repository_size
        report = Report(describe(path, size, options.rounds, options.seconds))
        _run_repository(options, report, progress)
        return report
    missing = [peer for peer in options.peers if not installed(peer)]
    peers = [peer for peer in options.peers if peer not in missing]
    path = options.image or image.make(options.cache, "random", options.size, seed=1)
    size = os.path.getsize(path)
    report = Report(describe(path, size, options.rounds, options.seconds))
    report.failures += [f"{peer}: not installed" for peer in missing]
    extra_rounds = min(options.rounds, EXTRA_ROUNDS)
    _run_table(options, peers, path, size, report, progress)
    if Part.COLD in options.parts:
        far = image.make(options.cache, "other", size, seed=2)
        run_cold(
            [peer for peer in peers if peer.takes_part(Part.COLD)],
            path,
            far,
            options.cache,
            report,
            progress,
            rounds=extra_rounds,
            seconds=options.seconds,
        )
    if Part.IDLE in options.parts:
        run_idle(
            [peer for peer in peers if peer.takes_part(Part.IDLE)],
            path,
            report,
            progress,
            size=size,
            rounds=extra_rounds,
            seconds=options.seconds,
            connections=options.connections,
        )
    _run_repository(options, report, progress)
    if Part.FOREIGN in options.parts:
        _run_foreign(options, report, progress)
    if Part.OVERLAY in options.parts:
        rounds = min(options.rounds, EXTRA_ROUNDS)
        work = (path, options.cache, report, progress)
        run_overlay(*work, rounds=rounds, seconds=options.seconds)
    if Part.PROXY in options.parts:
        images = (path, mixed(options.cache, size))
        run_proxy(*images, report, progress, rounds=options.rounds, seconds=options.seconds)
        run_live(images[1], report, progress, rounds=min(options.rounds, EXTRA_ROUNDS))
    return report


def _run_foreign(options: Options, report: Report, progress: Progress) -> None:
    cache = os.path.join(options.cache, "foreign")
    run_foreign(cache, report, progress, rounds=min(options.rounds, EXTRA_ROUNDS))


def _run_repository(options: Options, report: Report, progress: Progress) -> None:
    if options.repository_cells:
        run_repository(
            options.repository_cells,
            options.programs,
            options.cache,
            options.repository_size,
            report,
            progress,
            rounds=min(options.rounds, EXTRA_ROUNDS),
            seconds=options.seconds,
        )


def _run_table(
    options: Options,
    peers: list[Peer],
    path: str,
    size: int,
    report: Report,
    progress: Progress,
) -> None:
    conversions = [cell for cell in options.cells if cell.part is Part.CONVERT]
    readings = [cell for cell in options.cells if cell.part is Part.CLIENT]
    cells = [cell for cell in options.cells if cell not in conversions + readings]
    servers = [peer for peer in peers if peer is not Peer.NBDCOPY]
    with contextlib.ExitStack() as stack:
        copy = None
        if any(cell.writes for cell in cells):
            copy = image.copy_of(path, options.cache)
            stack.callback(os.unlink, copy)
        images = make_images({cell.image for cell in cells} - {""}, path, options.cache)
        plan = Plan(servers, cells, path, copy, size, options.rounds, options.seconds, images)
        run_rounds(plan, report, progress)
    if conversions:
        run_conversions(conversions, peers, options.cache, size, options.rounds, report, progress)
    if readings:
        rounds, seconds = options.rounds, options.seconds
        run_clients(readings, peers, path, size, rounds, seconds, report, progress)


def _default_cache() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "nbdsrv", "benchmark")


def _progress() -> Progress:
    """Lines on stderr, where somebody watches them."""
    if not sys.stderr.isatty():
        return lambda _: None
    return lambda line: click.echo(line, err=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    main(prog_name="python -m conformance.benchmark")
