"""What ``nbdsrv backup`` has done, in words or as JSON."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from nbdsrv.cli.words import human, printable

if TYPE_CHECKING:
    from nbdsrv.backup.preview import Preview
    from nbdsrv.backup.report import DiskReport
    from nbdsrv.cli.backup_run import Outcome

__all__ = ["print_outcome"]


def print_outcome(outcome: "Outcome", *, as_json: bool, quiet: bool) -> None:
    """What was done on standard output, what was not on standard error."""
    if as_json:
        click.echo(json.dumps(_rows(outcome)))
    elif not quiet:
        for preview in outcome.previews:
            click.echo(_preview_in_words(preview))
        for disk in outcome.report.disks:
            click.echo(_in_words(disk))
    if not quiet:
        for line in outcome.cleaned:
            _complain(line)
    for disk in outcome.report.disks:
        if disk.recheck_mismatches:
            _complain(f"{disk.repository}: {disk.disk}: {disk.reason}")
    for failed in outcome.report.failed:
        _complain(str(failed.error))
    for vm, error in outcome.failed:
        _complain(f"{vm}: {error}")
    for line in outcome.warnings:
        _complain(line)


def _complain(text: str) -> None:
    click.echo(f"nbdsrv: {text}", err=True)


def _rows(outcome: "Outcome") -> list[dict[str, Any]]:
    rows = [dataclasses.asdict(preview) for preview in outcome.previews]
    rows += [dataclasses.asdict(disk) for disk in outcome.report.disks]
    rows += [
        {"repository": failed.repository, "error": str(failed.error)}
        for failed in outcome.report.failed
    ]
    rows += [{"source": vm, "error": str(error)} for vm, error in outcome.failed]
    rows += [{"warning": line} for line in outcome.warnings]
    return rows


def _in_words(disk: "DiskReport") -> str:
    return (
        f"{_place(disk)}@{disk.point}: {disk.mode} ({disk.reason}):"
        f" {human(disk.size)}, {human(disk.read_bytes + disk.rechecked_bytes)} read,"
        f" {human(disk.new_bytes)} stored, in {disk.duration_s:.1f} s"
    )


def _preview_in_words(preview: "Preview") -> str:
    text = f"{_place(preview)}: {preview.mode} ({preview.reason}): {human(preview.size)}"
    if preview.changed_bytes is not None:
        text += f", {human(preview.changed_bytes)} changed"
    return text


def _place(disk: "DiskReport | Preview") -> str:
    return printable(f"{disk.repository}#{disk.group}/{disk.disk}")
