"""Medians, ratios and bars: as text for a terminal, as Markdown for the README.

A column is the median over the rounds. A ratio is the quotient of two medians, so a reader can
check it from the columns; beside it stands the lowest and highest quotient of a single round,
which says how far to trust it. A cell meets its bars when the ratio of medians reaches each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from conformance.benchmark.cells import CELLS, Cell, Peer
from conformance.benchmark.foreign.table import foreign_table
from conformance.benchmark.live import live_tables
from conformance.benchmark.overlay import overlay_table
from conformance.benchmark.proxy import proxy_tables
from conformance.benchmark.report import BenchmarkError, Report
from conformance.benchmark.repository import table as repositories

__all__ = ["Ratio", "Row", "markdown", "rewrite", "rows", "text"]

IDLE_CORES = 0.02
"""Processor use of waiting servers that is worth a note."""

AT_CEILING = 0.9
"""Ours over the ceiling's rate from which it is the client that sets the pace."""

BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over a peer's: of the medians, and the extremes of the single rounds."""

    peer: Peer
    value: float
    lowest: float
    highest: float
    bar: float | None

    @property
    def met(self) -> bool:
        return self.bar is None or self.value >= self.bar


@dataclass(frozen=True, slots=True)
class Row:
    cell: Cell
    medians: dict[Peer, float]
    ratios: dict[Peer, Ratio]

    @property
    def verdict(self) -> str:
        """``yes`` or ``NO``; ``-`` where nothing was to be met or measured.

        ``client`` where a bar was missed that the ceiling misses too, with us at the ceiling: the
        client cannot take more, from nobody.
        """
        barred = [ratio for ratio in self.ratios.values() if ratio.bar is not None]
        if not barred:
            return "-"
        missed = [ratio for ratio in barred if not ratio.met]
        if not missed:
            return "yes"
        return "client" if all(self._beyond_client(ratio) for ratio in missed) else "NO"

    def _beyond_client(self, ratio: Ratio) -> bool:
        ceiling = self.medians.get(Peer.CEILING)
        if ceiling is None or ratio.bar is None:
            return False
        best = max(ceiling, self.medians[Peer.OURS])
        ours = self.medians[Peer.OURS]
        return ours >= AT_CEILING * ceiling and best / self.medians[ratio.peer] < ratio.bar


def rows(report: Report) -> list[Row]:
    """One row per measured cell, in the order of ``CELLS``."""
    made = []
    for cell in CELLS:
        rates: dict[Peer, dict[int, float]] = {}
        for sample in report.samples:
            if sample.cell == cell.name:
                rates.setdefault(Peer(sample.server), {})[sample.round] = sample.rate
        if rates:
            medians = {peer: median(by.values()) for peer, by in rates.items()}
            made.append(Row(cell, medians, _ratios(cell, rates, medians)))
    return made


def _ratios(
    cell: Cell, rates: dict[Peer, dict[int, float]], medians: dict[Peer, float]
) -> dict[Peer, Ratio]:
    ours = rates.get(Peer.OURS, {})
    found: dict[Peer, Ratio] = {}
    for peer, theirs in rates.items():
        single = [ours[r] / theirs[r] for r in ours if r in theirs]
        if peer is not Peer.OURS and single:  # of the ceiling: the part of it that we reach
            value = medians[Peer.OURS] / medians[peer]
            found[peer] = Ratio(peer, value, min(single), max(single), cell.bar(peer))
    return found


def text(report: Report) -> str:
    """Everything the report holds, for a terminal."""
    parts = []
    if report.samples:
        parts.append(_aligned(*_table(report, spread=True)))
    for title, header, lines in _extras(report, spread=True):
        parts.append(f"{title}\n" + _aligned(header, lines))
    parts += [f"note: {note}" for note in [*report.notes, *_busy_idlers(report)]]
    if report.failures:
        parts.append(_grouped(report.failures))
    missed = [row for row in rows(report) if row.verdict == "NO"]
    barred = [row for row in rows(report) if row.verdict != "-"]
    if barred:
        limited = sum(row.verdict == "client" for row in barred)
        met = len(barred) - len(missed) - limited
        parts.append(
            f"{met} of {len(barred)} cells meet their bars; in {limited} more the client takes no"
            " more from the ceiling either"
        )
    return "\n\n".join(parts)


def markdown(report: Report) -> str:
    """The README's section, without its markers."""
    parts = []
    if report.samples:
        parts.append(_piped(*_table(report, spread=False)))
    for title, header, lines in _extras(report, spread=False):
        parts.append(f"{title}\n\n" + _piped(header, lines))
    machine = "; ".join(f"{key}: {value}" for key, value in report.environment.items())
    parts.append(
        "Medians of interleaved rounds; 4 KiB cells in IOPS, all others in MB/s (10^6 bytes)."
        f" {machine}."
    )
    return "\n\n".join(parts)


def rewrite(path: str, section: str) -> None:
    """Replace what stands between the markers in a file.

    Raises BenchmarkError when they are not there, once each and in order.
    """
    try:
        with open(path, encoding="utf-8") as file:
            whole = file.read()
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror}") from error
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        raise BenchmarkError(f"{path}: needs one {BEGIN} and, after it, one {END}")
    before, rest = whole.split(BEGIN)
    _, after = rest.split(END)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{before}{BEGIN}\n{section}\n{END}{after}")


def _table(report: Report, *, spread: bool) -> tuple[list[str], list[list[str]]]:
    peers = [peer for peer in Peer if any(s.server == peer for s in report.samples)]
    others = [peer for peer in peers if peer is not Peer.OURS and Peer.OURS in peers]
    header = ["cell", *peers, *(f"ours / {peer}" for peer in others), "bar met"]
    lines = []
    for row in rows(report):
        title = row.cell.name if spread else row.cell.title
        line = [title, *(_rate(row, peer) for peer in peers)]
        line += [_ratio(row.ratios.get(peer), spread=spread) for peer in others]
        lines.append([*line, row.verdict])
    return header, lines


def _rate(row: Row, peer: Peer) -> str:
    if peer in row.medians:
        return f"{row.medians[peer]:,.0f}"
    return "failed" if row.cell.takes(peer) else "-"


def _ratio(ratio: Ratio | None, *, spread: bool) -> str:
    if ratio is None:
        return "-"
    shown = f"{ratio.value:.2f}"
    if spread:
        shown += f" ({ratio.lowest:.2f}-{ratio.highest:.2f})"
    return shown if ratio.bar is None else f"{shown}, bar {ratio.bar:g}"


def _grouped(failures: list[str]) -> str:
    """One line per reason, with the first place and the number of places it was met in."""
    places: dict[str, list[str]] = {}
    for failure in failures:
        where, _, why = failure.partition(": ")
        places.setdefault(why, []).append(where)
    return "\n".join(
        f"FAILED {len(met)} x, first at {met[0]}: {why}" for why, met in places.items()
    )


def _busy_idlers(report: Report) -> list[str]:
    """A server that works while another is measured would spoil the whole comparison."""
    worst = max(report.samples, key=lambda sample: sample.idle_cores, default=None)
    if worst is None or worst.idle_cores < IDLE_CORES:
        return []
    when = f"in {worst.cell}, round {worst.round}, while {worst.server} was measured"
    return [f"{when} the waiting servers used {worst.idle_cores:.2f} of a processor"]


def _extras(report: Report, *, spread: bool) -> list[tuple[str, list[str], list[list[str]]]]:
    found = repositories.tables(report, spread=spread)
    if report.foreign:
        found.append(foreign_table(report))
    if report.overlay:
        found.append(overlay_table(report))
    found += proxy_tables(report)
    found += live_tables(report)
    if report.cold:
        title = "A client's 4 KiB reads (depth 1, cached) while another client of the same server"
        found.append((title, *_cold(report)))
    if report.idle:
        title = "Memory, and a client's 4 KiB reads (depth 1), beside many connections"
        found.append((title, *_idle(report)))
    return found


def _cold(report: Report) -> tuple[list[str], list[list[str]]]:
    header = ["other client", "server", "IOPS", "p50 us", "p99 us", "p99.9 us", "worst us"]
    header += ["other MB/s", "from disk MB/s"]
    lines = []
    for phase, server in dict.fromkeys((s.phase, s.server) for s in report.cold):
        some = [s for s in report.cold if (s.phase, s.server) == (phase, server)]
        middle = [
            *(median(s.iops for s in some), median(s.p50_us for s in some)),
            *(median(s.p99_us for s in some), median(s.p999_us for s in some)),
            *(max(s.max_us for s in some), median(s.neighbour_rate for s in some)),
            median(s.disk_rate for s in some),
        ]
        lines.append([phase, server, *(f"{value:,.0f}" for value in middle)])
    return header, lines


def _idle(report: Report) -> tuple[list[str], list[list[str]]]:
    header = ["state", "server", "connections", "RSS MiB", "peak MiB", "fds", "threads", "IOPS"]
    header.append("requests taken")
    lines = []
    for s in report.idle:
        sizes = [f"{s.resident / 2**20:.1f}", f"{s.peak / 2**20:.1f}"]
        counts = [str(s.descriptors), str(s.threads), f"{s.iops:,.0f}", str(s.accepted or "-")]
        lines.append([s.state, s.server, str(s.connections), *sizes, *counts])
    return header, lines


def _aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [header, *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def _piped(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])
