"""A finding that was kept, once more, in this process: for a debugger and after a fix."""

import asyncio
import json
import random
import subprocess
import tempfile
from pathlib import Path

import click
import uvloop

from conformance.fuzz.change import change
from conformance.fuzz.examine import FoundError, examine
from nbdsrv.disk.workers import Workers

__all__ = ["replay"]


def replay(kept: Path) -> int:
    """Judge the image in a finding's directory again; an exit code. Exceptions are let through."""
    record = json.loads((kept / "finding.json").read_text())
    with tempfile.TemporaryDirectory(prefix="nbdsrv-replay-") as scratch:
        directory = Path(scratch) / "case"
        directory.mkdir()
        names = [path.name for path in kept.iterdir()]
        for name in names:  # a mutant may be sparse and huge: linked where it is only read
            if record["writes"]:
                subprocess.run(["cp", "--sparse=always", kept / name, directory], check=True)
            else:
                (directory / name).symlink_to((kept / name).resolve())
        source = record["source"].replace("{}", str(directory))
        try:
            outcome = uvloop.run(_examine(source, names, record["number"], writes=record["writes"]))
        except FoundError as error:
            click.echo(f"{error.kind}: {error}")
            return 1
    click.echo(f"{outcome[0]} {outcome[1]}")
    return 0


async def _examine(source: str, names: list[str], number: int, *, writes: bool) -> tuple[str, str]:
    loop = asyncio.get_running_loop()
    workers = Workers()
    loop.add_reader(workers.fileno(), workers.complete)
    try:
        rng = random.Random(number)  # as in the hunt: the same ranges, the same changes
        outcome = await examine(source, names, workers, rng, None)
        if writes and outcome.verdict != "refused":
            done, problem = await change(source, names, workers, rng)
            return "changed", f"{done} times; {problem or 'no error'}"
    finally:
        loop.remove_reader(workers.fileno())
        workers.close()
    return outcome.verdict, outcome.detail
