"""A VM of XCP-ng backed up by ``nbdsrv backup``, against the simulator in ``conformance.xapi``.

No host of XCP-ng is at hand: what these checks show is that we keep to what its sources say. The
guest writes all the time; every point is compared with the snapshot as the simulator remembers it.
"""

import json
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

from conformance import process
from conformance.context import Context
from conformance.image import MIB
from conformance.outcome import CheckFailedError
from conformance.registry import Part, check, expect, expect_in
from conformance.repository import command
from conformance.server import server_environment
from conformance.xapi.simulator import Simulator

SIZE = 12 * MIB + 3 * 65_536 + 512
"""No multiple of 2 MiB."""
KILLS = 60


class _Pool:
    """A pool with one VM, a repository, and our commands."""

    def __init__(self, context: Context, *, disks: int = 1, repositories: int = 1) -> None:
        self.context = context
        self.simulator = Simulator(context.directory / "x", hosts=2)
        context.at_end(self.simulator.__exit__, None, None, None)
        made = [{"name": f"disk{n}", "size": SIZE, "cbt": True} for n in range(disks)]
        self.disks: list[str] = self.simulator.do("vm", name="web", disks=made)["vdis"]
        for number, disk in enumerate(self.disks):
            self.simulator.write(disk, 0, random.Random(number).randbytes(SIZE // 3))
            self.simulator.do("guest", vdi=disk, seed=number)
        self.source = f"xapi://root@{self.simulator.address}#web"
        self.repositories = [f"repo:{context.directory}/r{n}" for n in range(repositories)]
        for repository in self.repositories:
            self.run("init", repository, "--quiet")

    @property
    def environment(self) -> dict[str, str]:
        """Of our commands."""
        return {**server_environment(), **self.simulator.environment}

    def run(self, *words: str | Path, code: int | None = 0) -> process.Finished:
        """One of our commands."""
        done = self.context.run(*command(*words), environment=self.environment, code=code)
        if "Traceback" in done.stderr:
            raise CheckFailedError(done.describe())
        return done

    def backup(self, *more: str, code: int | None = 0) -> list[dict[str, Any]]:
        """Back up the VM into all repositories; what is told of each disk in each."""
        to = [word for repository in self.repositories for word in ("--to", repository)]
        done = self.run("backup", self.source, *to, "--json", *more, code=code)
        return list(json.loads(done.stdout)) if done.code == 0 else []

    def killed_backup(self, after_s: float) -> None:
        """The same, ended by SIGKILL after so many seconds, if not by itself before."""
        started = subprocess.Popen(
            command("backup", self.source, "--to", self.repositories[0], "--quiet"),
            cwd=self.context.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **self.environment},
            start_new_session=True,
        )
        try:
            started.wait(after_s)
        except subprocess.TimeoutExpired:
            process.kill_group(started)

    def expect_exact(self, row: dict[str, Any], snapshot: str) -> None:
        """A disk of a point is what it was when the snapshot was taken."""
        where = f"{row['repository']}#{row['group']}/{row['disk']}@{row['point']}"
        copy = self.context.directory / "copy.raw"
        self.run("copy", where, f"raw:{copy}", "--force", "--quiet")
        expect(True, self.simulator.archived(snapshot) == copy.read_bytes(), f"content of {where}")

    def bases(self, name: str) -> list[str]:
        """Snapshots of a disk that are only metadata now, the oldest first."""
        return [
            vdi["uuid"]
            for vdi in self.simulator.do("vdis")
            if vdi["type"] == "cbt_metadata" and vdi["name_label"] == name
        ]


@check("xapi (simulated)", "full and incrementals")
def incrementals(context: Context) -> None:
    """Two disks into two repositories by one read; the guest writes all the time."""
    pool = _Pool(context, disks=2, repositories=2)
    for turn in range(3):
        for row in pool.backup():
            expect("incremental" if turn else "full", row["mode"], row["reason"])
            number = int(row["disk"] == "xvdb")
            if turn == 2 or (number == 0 and row["repository"] == pool.repositories[0]):
                pool.expect_exact(row, pool.bases(f"disk{number}")[-1])
    state = pool.simulator.do("state")
    expect([], state["snapshots"], "snapshots that are left")
    expect(0, state["sessions"], "sessions that are left")
    expect(6, len(state["served"]), "snapshots that were read over NBD")


@check("xapi (simulated)", "reasons for a full", part=Part.REPOSITORY)
def reasons(context: Context) -> None:
    """Tracking that was turned off is told, and turned on; a dry run tells it as well."""
    pool = _Pool(context)
    pool.backup()
    pool.simulator.do("cbt", vdi=pool.disks[0], on=False)
    (row,) = pool.backup()
    expect("scan", row["mode"], "mode")
    expect_in("changed block tracking was off; it is on from now", row["reason"], "reason")
    pool.simulator.do("destroy", vdi=pool.bases("disk0")[-1])
    dry = pool.run("backup", pool.source, "--to", pool.repositories[0], "--dry-run")
    expect_in("base", dry.stdout, "a dry run")
    (row,) = pool.backup()
    expect("scan", row["mode"], "mode")
    (row,) = pool.backup()
    expect("incremental", row["mode"], row["reason"])
    pool.expect_exact(row, pool.bases("disk0")[-1])


@check("xapi (simulated)", "export stream")
def stream(context: Context) -> None:
    """Without NBD the disk comes as a VHD, from the host that sees its storage."""
    pool = _Pool(context)
    pool.simulator.do("trouble", nbd=False, redirect=[pool.simulator.addresses[0]])
    for _ in range(2):
        (row,) = pool.backup()
        pool.expect_exact(row, pool.bases("disk0")[-1])
    expect("incremental", row["mode"], row["reason"])


@check("xapi (simulated)", "restore")
def restore(context: Context) -> None:
    """A point becomes a new VDI by one PUT."""
    pool = _Pool(context)
    (row,) = pool.backup()
    target = f"{pool.source.partition('#')[0]}#Local storage/restored"
    where = f"{row['repository']}#{row['group']}/{row['disk']}@{row['point']}"
    pool.run("restore", where, target, "--quiet")
    made = [vdi["uuid"] for vdi in pool.simulator.do("vdis") if vdi["name_label"] == "restored"]
    expect(1, len(made), "new disks")
    same = pool.simulator.content(made[0]) == pool.simulator.archived(pool.bases("disk0")[-1])
    expect(True, same, "content of the new disk")


@check("xapi (simulated)", "kills", part=Part.REPOSITORY)
def kills(context: Context) -> None:
    """SIGKILL at random moments; the next backup is exact, and nothing is left in the pool."""
    pool = _Pool(context)
    chance = random.Random(5)
    started = time.monotonic()
    pool.backup()
    whole_s = time.monotonic() - started
    for turn in range(KILLS):
        pool.killed_backup(chance.uniform(0.2, whole_s * 1.1))
        if turn % 4 == 3:
            (row,) = pool.backup()
            pool.expect_exact(row, pool.bases("disk0")[-1])
            expect([], pool.simulator.do("state")["snapshots"], "snapshots that are left")
    modes = [pool.backup()[0]["mode"] for _ in range(2)]
    expect("incremental", modes[-1], "mode in the end")
