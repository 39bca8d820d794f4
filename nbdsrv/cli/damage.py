"""What ``verify`` prints of damage."""

import click

from nbdsrv.repository.damage import Finding

__all__ = ["print_finding"]

SHOWN = 10
"""Lines of disks that are hurt by one damage, on a terminal; --json has all."""


def print_finding(finding: Finding) -> None:
    """What is broken, whom it hurts, and what to do; for people."""
    where = f" at {finding.offset}" if finding.offset is not None else ""
    click.echo(f"damaged: {finding.key}{where}: {finding.text}")
    for hurt in finding.hurts[:SHOWN]:
        ranges = ", ".join(f"{length} at {offset}" for offset, length in hurt.ranges[:3])
        more = f" and {len(hurt.ranges) - 3} more ranges" if len(hurt.ranges) > 3 else ""
        what = f" {hurt.disk}: {ranges}{more}" if hurt.disk else ": all of it"
        click.echo(f"  hurts {hurt.point}{what}")
    if len(finding.hurts) > SHOWN:
        click.echo(f"  hurts {len(finding.hurts) - SHOWN} more disks; --json names them")
    if finding.copies:
        click.echo(f"  intact copies: {', '.join(finding.copies[:3])}")
    if finding.advice:
        click.echo(f"  {finding.advice}")
