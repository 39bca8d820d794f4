"""The table: a row per program, a cell per feature, and below it why cells are not ok.

::

    program    features
    ---------  ------------------------------------------------------------
    nbdinfo    ok   json            ok   list            FAIL map
               skip odd size
"""

from collections import Counter
from collections.abc import Sequence

from conformance.outcome import Result, Status

__all__ = ["render", "summary"]

_WIDTH = 100


def render(results: Sequence[Result]) -> str:
    """The whole table as text, without a line end."""
    programs = list(dict.fromkeys(result.program for result in results))
    left = max(len("program"), *map(len, programs))
    cells = {name: [_cell(each) for each in results if each.program == name] for name in programs}
    cell_width = max(len(cell) for row in cells.values() for cell in row) + 2
    per_line = max(1, (_WIDTH - left - 2) // cell_width)
    lines = [f"{'program':{left}}  features", f"{'-' * left}  {'-' * (_WIDTH - left - 2)}"]
    for name, row in cells.items():
        for start in range(0, len(row), per_line):
            label = name if start == 0 else ""
            joined = "".join(f"{cell:{cell_width}}" for cell in row[start : start + per_line])
            lines.append(f"{label:{left}}  {joined}".rstrip())
    return "\n".join([*lines, *_details(results)])


def summary(results: Sequence[Result]) -> str:
    """The last line: how many of each."""
    count = Counter(result.status for result in results)
    return f"{count[Status.OK]} passed, {count[Status.FAIL]} failed, {count[Status.SKIP]} skipped"


def _cell(result: Result) -> str:
    return f"{result.status:4} {result.feature}"


def _details(results: Sequence[Result]) -> list[str]:
    lines: list[str] = []
    for status in (Status.FAIL, Status.SKIP):
        those = [result for result in results if result.status is status]
        if those:
            lines += ["", f"{status}:"]
            lines += [f"  {each.program}: {each.feature}: {each.detail}" for each in those]
    return lines
