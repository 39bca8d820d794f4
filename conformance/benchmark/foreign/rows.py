"""The rows of the foreign part, and how one is added.

::

    @row("xo, first byte of a 1 TiB disk, 100 points", "ms", bar=300)
    def first_byte(cache: str) -> dict[str, float]:
        return {"nbdsrv": 51.0}                     column to value, one round

Put it into a module of this folder and name that in ``MODULES``. ``cache`` is a folder that is kept
between runs: make what is measured there once. A row that cannot be measured here raises
BenchmarkError; the others go on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

__all__ = ["OURS", "Row", "all_rows", "row"]

MODULES = (
    "conformance.benchmark.foreign.native",
    "conformance.benchmark.foreign.xo",
    "conformance.benchmark.foreign.chunks",
)
"""Where rows are, in the table's order."""
OURS = "nbdsrv"
"""The column of our server; others are what it is compared with."""

Measure = Callable[[str], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        name: what is measured, for people.
        unit: of the values.
        bar: our value must be below it if it is a time (``ms``), above it otherwise; None for
            none.
        measure: one round.
    """

    name: str
    unit: str
    bar: float | None
    measure: Measure


_ROWS: list[Row] = []


def row(name: str, unit: str, bar: float | None = None) -> Callable[[Measure], Measure]:
    """Register a function as one row."""

    def register(measure: Measure) -> Measure:
        _ROWS.append(Row(name, unit, bar, measure))
        return measure

    return register


def all_rows() -> list[Row]:
    """All of them."""
    for name in MODULES:
        import_module(name)
    return list(_ROWS)
