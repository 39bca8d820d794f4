"""The table of a run, and its findings."""

from collections.abc import Sequence

from conformance.fuzz.hunt import Finding, Tally

__all__ = ["render"]

_HEADER = ("format", "cases", "accepted", "broken", "refused", "peak MiB", "s", "findings")
SHOWN = 12
"""Kinds of findings of a format that are printed, one of each."""


def render(tallies: Sequence[Tally], absent: Sequence[tuple[str, str]]) -> str:
    """Text without a line end; ``absent`` are formats that could not be tried, and why."""
    lines = [_HEADER, *map(_line, tallies)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text += [f"{name}: {why}" for name, why in absent]
    for tally in tallies:
        text += _findings(tally)
        if tally.lenient:
            text += ["", f"{tally.format}: accepted, but not by qemu-img, which says:"]
            text += [f"  {n} x {said}" for said, n in tally.lenient.most_common(SHOWN)]
    return "\n".join(text)


def _line(tally: Tally) -> tuple[str, ...]:
    return (
        tally.format,
        *(str(n) for n in (tally.cases, tally.accepted, tally.broken, tally.refused)),
        *(str(tally.peak >> 20), f"{tally.seconds:.0f}", str(len(tally.findings))),
    )


def _findings(tally: Tally) -> list[str]:
    if not tally.findings:
        return []
    alike: dict[str, list[Finding]] = {}
    for found in tally.findings:
        alike.setdefault(found.likeness, []).append(found)
    lines = ["", f"{tally.format}: {len(alike)} kinds of findings"]
    for group in sorted(alike.values(), key=len, reverse=True)[:SHOWN]:
        one = min(group, key=lambda found: len(found.done))
        where = f"case {one.number} ({one.specimen})"
        lines.append(f"  {len(group)} x {one.kind}, {where}: {one.detail}")
        kept = f"; kept in {one.kept}" if one.kept else ""
        lines.append(f"    {', '.join(one.done) or 'not mutated'}{kept}")
    return lines
