"""The repository cells as two tables: medians, and ratios of ours to each peer's.

As in the other table a ratio is the quotient of two medians, and beside it stand the lowest and
highest quotient of a single round.
"""

from dataclasses import dataclass
from statistics import median

from conformance.benchmark.report import Report
from conformance.benchmark.repository.cells import CELLS, Cell, Program

__all__ = ["Comparison", "comparisons", "tables"]

Table = tuple[str, list[str], list[list[str]]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours over one peer's in one cell, the more the better."""

    cell: Cell
    ours: Program
    peer: Program
    value: float
    lowest: float
    highest: float
    bar: float

    @property
    def met(self) -> bool:
        return self.value >= self.bar

    def shown(self, *, spread: bool) -> str:
        """The ratio, its spread, and a bar that is not 1; ``!`` marks a bar missed."""
        words = f"{self.value:.2f}"
        if spread:
            words += f" ({self.lowest:.2f}-{self.highest:.2f})"
        if self.bar != 1:
            words += f", bar {self.bar:g}"
        return words if self.met else f"! {words}"


def comparisons(report: Report) -> list[Comparison]:
    """All pairs that have a bar, in the order of the cells."""
    found = []
    for cell in CELLS:
        values = _values(report, cell)
        for ours in (Program.OURS, Program.ENCRYPTED):
            for peer in Program:
                bar = cell.bar(ours, peer)
                both = values.get(ours, {}).keys() & values.get(peer, {}).keys()
                if bar is None or not both:
                    continue
                single = [_ratio(cell, values[ours][r], values[peer][r]) for r in both]
                middle = _ratio(cell, *(median(values[p].values()) for p in (ours, peer)))
                found.append(Comparison(cell, ours, peer, middle, min(single), max(single), bar))
    return found


def tables(report: Report, *, spread: bool) -> list[Table]:
    """Both tables: title, header, lines. None where nothing was measured."""
    programs = [p for p in Program if any(s.program == p for s in report.repository)]
    if not programs:
        return []
    medians = ("Repositories: medians", ["", "unit", *programs], _medians(report, programs))
    pairs = comparisons(report)
    if not pairs:
        return [medians]
    columns = list(dict.fromkeys((pair.ours, pair.peer) for pair in pairs))
    title = "Repositories: ratios, the higher the better for us; `!` where a bar is missed"
    header = ["", *(f"{ours} / {peer}" for ours, peer in columns)]
    lines = []
    for cell in CELLS:
        by = {(p.ours, p.peer): p.shown(spread=spread) for p in pairs if p.cell is cell}
        if by:
            lines.append([cell.title, *(by.get(column, "-") for column in columns)])
    return [medians, (title, header, lines)]


def _medians(report: Report, programs: list[Program]) -> list[list[str]]:
    lines = []
    for cell in CELLS:
        values = _values(report, cell)
        if values:
            numbers = [_number(values.get(program, {})) for program in programs]
            lines.append([cell.title, cell.unit, *numbers])
    return lines


def _number(values: dict[int, float]) -> str:
    return f"{median(values.values()):,.0f}" if values else "-"


def _ratio(cell: Cell, ours: float, theirs: float) -> float:
    return theirs / ours if cell.smaller_is_better else ours / theirs


def _values(report: Report, cell: Cell) -> dict[Program, dict[int, float]]:
    """What each program reached, by round."""
    found: dict[Program, dict[int, float]] = {}
    for sample in report.repository:
        if sample.cell == cell.name:
            found.setdefault(Program(sample.program), {})[sample.round] = sample.value
    return found
