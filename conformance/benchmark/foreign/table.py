"""The foreign part as a table: medians by column, lowest and highest, and the bar."""

from statistics import median

from conformance.benchmark.foreign.rows import OURS, Row, all_rows
from conformance.benchmark.report import Report

__all__ = ["foreign_table"]


def foreign_table(report: Report) -> tuple[str, list[str], list[list[str]]]:
    """Title, header, lines."""
    columns = list(dict.fromkeys(sample.column for sample in report.foreign))
    header = ["", "unit", *columns, "bar"]
    lines = []
    for row in all_rows():
        values: dict[str, list[float]] = {}
        for sample in report.foreign:
            if sample.row == row.name:
                values.setdefault(sample.column, []).append(sample.value)
        if values:
            shown = [_shown(values.get(column, [])) for column in columns]
            lines.append([row.name, row.unit, *shown, _bar(row, values.get(OURS, []))])
    return "Other tools' repositories: medians (lowest to highest)", header, lines


def _shown(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def _bar(row: Row, ours: list[float]) -> str:
    if row.bar is None or not ours:
        return "-"
    middle = median(ours)
    met = middle < row.bar if row.unit == "ms" else middle > row.bar
    return f"{row.bar:g}" if met else f"! {row.bar:g}"
