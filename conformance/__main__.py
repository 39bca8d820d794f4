"""``python -m conformance``: run the checks, print the table, exit 1 if any failed.

Under CI=true a peer that is not installed is a failure; elsewhere it is a skip.
"""

import fnmatch
import json
import os
import sys
import time
import traceback
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import click

from conformance.context import Context
from conformance.outcome import CheckFailedError, MissingPeerError, Result, Status
from conformance.process import find_program
from conformance.registry import Check, Part, all_checks
from conformance.table import render, summary

MODULES = (
    "conformance.programs.nbdinfo",
    "conformance.programs.nbdcopy",
    "conformance.programs.nbdsh",
    "conformance.programs.nbdfuse",
    "conformance.programs.overlay",
    "conformance.programs.qemu",
    "conformance.programs.formats",
    "conformance.programs.chains",
    "conformance.programs.containers",
    "conformance.programs.copying",
    "conformance.programs.writable",
    "conformance.programs.fio",
    "conformance.programs.nbd_client",
    "conformance.programs.xen_orchestra",
    "conformance.programs.xo",
    "conformance.programs.xo_written",
    "conformance.programs.encryption",
    "conformance.programs.activation",
    "conformance.programs.service",
    "conformance.programs.endurance",
    "conformance.programs.systemd_units",
    "conformance.programs.repository",
    "conformance.programs.repository_trouble",
    "conformance.programs.casync",
    "conformance.programs.pbs",
    "conformance.programs.restic",
    "conformance.programs.borg",
    "conformance.programs.migration",
    "conformance.programs.object_store",
    "conformance.programs.at_once",
    "conformance.programs.kills",
    "conformance.programs.virtnbdbackup",
    "conformance.programs.benji",
    "conformance.programs.xapi",
    "conformance.programs.libvirt",
    "conformance.programs.live_qemu",
    "conformance.programs.live_proxy",
    "conformance.kernel.attach",
    "conformance.programs.boot",
    "conformance.programs.boot_speed",
)
"""Where checks are registered, in the order of the table's rows."""


def run_check(each: Check, *, missing_is_failure: bool) -> Result:
    """Run one check in a context of its own; never raises for what the check did."""
    started = time.monotonic()
    status, detail = Status.OK, ""
    try:
        for program in each.needs:
            find_program(program)
        with Context() as context:
            each.run(context)
    except MissingPeerError as error:
        status = Status.FAIL if missing_is_failure else Status.SKIP
        detail = str(error)
    except CheckFailedError as error:
        status, detail = Status.FAIL, "; ".join([str(error), *getattr(error, "__notes__", [])])
    except Exception as error:  # noqa: BLE001 - a peer's output may break a check in any way
        where = traceback.extract_tb(error.__traceback__)[-1]
        status = Status.FAIL
        detail = f"{type(error).__name__}: {error} (at {Path(where.filename).name}:{where.lineno})"
    return Result(each.program, each.feature, status, detail, time.monotonic() - started)


def _chosen(part: str, pattern: str | None) -> list[Check]:
    checks = [each for each in all_checks() if part in ("all", each.part)]
    if pattern is None:
        return checks
    wanted = f"*{pattern.lower()}*"
    return [
        each for each in checks if fnmatch.fnmatch(f"{each.program} {each.feature}".lower(), wanted)
    ]


@click.command()
@click.option(
    "--part",
    type=click.Choice([*(str(part) for part in Part), "all"]),
    default=str(Part.QUICK),
    show_default=True,
    help="quick: programs on this machine; formats: every image; kernel: Linux in a guest; "
    "repository: hundreds of kills, more object stores; live: domains of a private libvirtd; "
    "service: ten minutes of 200 clients; boot: instant restores of a Linux.",
)
@click.option("--only", metavar="PATTERN", help='Run only checks whose "PROGRAM FEATURE" matches.')
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Save the results too.")
def main(part: str, only: str | None, json_file: Path | None) -> None:
    """Drive real NBD programs against nbdsrv and print program x feature."""
    for name in MODULES:
        import_module(name)
    checks = _chosen(part, only)
    if not checks:
        raise click.UsageError(f"no check matches {only!r} in part {part!r}")
    strict = os.environ.get("CI", "").lower() == "true"
    results: list[Result] = []
    for each in checks:
        result = run_check(each, missing_is_failure=strict)
        results.append(result)
        if sys.stderr.isatty():
            click.echo(f"{result.status:4} {each.program}: {each.feature}", err=True)
    click.echo(render(results))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    click.echo(summary(results))
    sys.exit(any(result.status is Status.FAIL for result in results))


if __name__ == "__main__":
    main()
