"""Running the rows, round by round."""

import os
from collections.abc import Callable

from conformance.benchmark.foreign.rows import all_rows
from conformance.benchmark.report import BenchmarkError, ForeignSample, Report
from conformance.outcome import CheckFailedError, MissingPeerError

__all__ = ["run_foreign"]


def run_foreign(
    cache: str, report: Report, progress: Callable[[str], None], *, rounds: int
) -> None:
    """Measure every row ``rounds`` times; one that cannot be is a failure of the report."""
    os.makedirs(cache, exist_ok=True)
    failed: set[str] = set()
    for number in range(rounds):
        for each in all_rows():
            if each.name in failed:
                continue
            progress(f"round {number + 1}: {each.name}")
            try:
                values = each.measure(cache)
            except (BenchmarkError, CheckFailedError, MissingPeerError, OSError) as error:
                failed.add(each.name)
                report.failures.append(f"{each.name}: {error}")
                continue
            report.foreign += [
                ForeignSample(each.name, column, number, value) for column, value in values.items()
            ]
