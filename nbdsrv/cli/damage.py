"""What ``verify`` prints of damage, and how it ends."""

from collections.abc import Sequence

import click

from nbdsrv.repository.damage import Finding

__all__ = ["conclude", "print_damage"]

DAMAGED = 3
"""Exit code where damage was found; 1 is for what could not be verified."""
SHOWN = 10
"""Lines of disks that are hurt by one damage, on a terminal; --json has all."""


def print_damage(findings: Sequence[Finding], unread: Sequence[str]) -> None:
    """What is broken, and what may be."""
    for finding in findings:
        _print_finding(finding)
    for text in unread:
        click.echo(f"could not be read: {text}")


def conclude(findings: Sequence[Finding], unread: Sequence[str]) -> None:
    """Ends the command with what was found; returns if all is well."""
    if findings:
        raise click.exceptions.Exit(DAMAGED)
    if unread:
        raise click.exceptions.Exit(1)


def _print_finding(finding: Finding) -> None:
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
