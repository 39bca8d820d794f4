"""Other tools' points copied into our repository, by ``nbdsrv copy``."""

import json
from pathlib import Path
from typing import Any

from conformance.context import Context
from conformance.image import file_digest
from conformance.programs.borg import Borg
from conformance.programs.restic import SECRET, Restic
from conformance.registry import Part, check, expect
from conformance.repository import Repository, one_row


@check("migration", "from restic", needs=("restic", "nbdcopy"), part=Part.REPOSITORY)
def from_restic(context: Context) -> None:
    """Three snapshots: times and names kept, read in part, served as they were; then one more."""
    restic = Restic(context)
    restic.backup()
    for _ in range(2):
        restic.change()
        restic.backup()
    source = f"restic:{restic.path}"
    repo = Repository(context, f"repo:{context.directory / 'repo'}", SECRET)
    repo.init()
    points = _copied(repo, source)
    disk = restic.name("x").partition("/")[2].rpartition("@")[0]
    modes = [each["modes"][disk] for each in points]
    expect(["full", "incremental", "incremental"], modes, "how they were read")
    _prove(context, repo, points, restic.states)
    restic.change()
    restic.backup()
    again = _copied(repo, source)
    expect([False, False, False, True], [each["copied"] for each in again], "what was copied")
    _prove(context, repo, again, restic.states)
    times = [row["time"] for row in json.loads(repo.run("ls", source, "--json").stdout)]
    ours = [row["time"] for row in json.loads(repo.run("ls", repo.target, "--json").stdout)]
    expect(times, ours, "times of the points")
    repo.run("verify", repo.target, "--level", "chunks")


@check("migration", "from borg", needs=("borg", "nbdcopy"))
def from_borg(context: Context) -> None:
    """Two archives, the second read in part; a backup of the same disk then stores nothing."""
    borg = Borg(context, "repokey")
    for number in range(2):
        if number:
            borg.change()
        borg.create("--chunker-params", "fixed,1048576")
    repo = Repository(context, f"repo:{context.directory / 'repo'}", borg.ours)
    repo.init()
    points = _copied(repo, f"borg:{borg.path}")
    disk = borg.name("x").partition("/")[2].rpartition("@")[0]
    expect(["full", "incremental"], [each["modes"][disk] for each in points], "how they were read")
    _prove(context, repo, points, borg.states)
    stored = repo.stored_bytes()
    backup = repo.run("backup", borg.disk, "--to", repo.target, "--group", "live", "--json")
    row = one_row(backup.stdout)
    expect(0, row["new_bytes"], "bytes that a backup of the same disk stores")
    expect(True, repo.stored_bytes() - stored < 100_000, "the repository has hardly grown")


def _copied(repo: Repository, source: str) -> list[dict[str, Any]]:
    said = json.loads(repo.run("copy", source, repo.target, "--json", "--quiet").stdout)
    expect([], said["damaged"], "what was not copied")
    points: list[dict[str, Any]] = said["points"]
    return points


def _prove(
    context: Context, repo: Repository, points: list[dict[str, Any]], states: dict[str, Path]
) -> None:
    """Each of our points has the content of the foreign one."""
    server = context.serve(source=repo.target, environment=repo.environment)
    by_origin = {name.rpartition("@")[2]: (name, state) for name, state in states.items()}
    for point in points:
        name, state = by_origin[point["origin"]]
        target = context.directory / "download.img"
        context.run("nbdcopy", server.uri(f"{name.rpartition('@')[0]}@{point['id']}"), target)
        expect(file_digest(state), file_digest(target), f"SHA-256 of {name}")
        target.unlink()
    server.stop()
