"""Instant restore for real: a Linux boots off a restore point, is cut off, and has lost nothing.

::

    restore point ── nbdsrv serve --overlay ── QEMU ── SYSLINUX, kernel, ext4, a shell
                          │ kill -9                │ kill -9
                          └── again                └── again ── its files, fsck

What the guest has synced is there, whoever was killed and whenever; the repository holds what it
held, by SHA-256 of every object.
"""

import json
import time
from pathlib import Path

from conformance.boot.disk import NEEDS
from conformance.boot.machine import BootedMachine, drive_of
from conformance.boot.point import (
    DISK,
    EXPORT,
    GROUP,
    RestorePoint,
    Witness,
    check_file_system,
    nbdsrv,
)
from conformance.context import Context
from conformance.image import file_digest
from conformance.outcome import CheckFailedError
from conformance.registry import Part, check, expect
from conformance.swift import Swift

HYDRATE_S = 90.0


@check("boot", "both killed", needs=NEEDS, part=Part.BOOT)
def both_killed(context: Context) -> None:
    """The server is killed under the running guest, which waits; then both; the files are there."""
    point = RestorePoint(context, f"repo:{context.directory}/repo")
    before = _digests(context.directory / "repo")
    served = point.serve()
    machine = point.boot(served)
    witness = Witness()
    witness.write(machine)
    # Killed while the guest writes: QEMU connects again and repeats what was not answered.
    writing = "for n in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/root/load.$n bs=64k count=32"
    writing += " conv=fsync 2>/dev/null || echo failed; done"
    machine.begin(writing)
    time.sleep(0.5)
    served.kill()
    time.sleep(0.5)
    served.start()
    expect("", machine.end(writing), "what the guest's dd said while the server was away")
    witness.write(machine)
    witness.check(machine)
    machine.begin("dd if=/dev/urandom of=/root/lost bs=4k count=4000 2>/dev/null")
    time.sleep(0.3)
    served.kill()
    machine.kill()
    served.start()
    check_file_system(context, served.uri(EXPORT), point.environment)
    machine = point.boot(served)
    witness.check(machine)
    witness.write(machine)
    machine.kill()
    served.stop()
    _expect_untouched(before, context.directory / "repo")


@check("boot", "from Xen Orchestra's VHD directories", needs=NEEDS, part=Part.BOOT)
def from_xo(context: Context) -> None:
    """The same over a remote of Xen Orchestra's, written by nbdsrv."""
    remote = context.directory / "remote"
    remote.mkdir()
    point = RestorePoint(context, f"xo:{remote}")
    before = _digests(remote)
    export = _only_export(point, context)
    _killed_and_booted(context, point, export)
    _expect_untouched(before, remote)


@check("boot", "from S3", needs=NEEDS, part=Part.BOOT)
def from_s3(context: Context) -> None:
    """The same over a native repository in OpenStack Swift."""
    service = Swift(context)
    service.create_bucket("nbdsrv-boot")
    point = RestorePoint(context, "repo+s3://nbdsrv-boot/backup", service.environment())
    _killed_and_booted(context, point, EXPORT)


def _killed_and_booted(context: Context, point: RestorePoint, export: str) -> None:
    served = point.serve()
    machine = point.boot(served, export)
    witness = Witness()
    witness.write(machine, 2048)
    served.kill()
    machine.kill()
    served.start()
    check_file_system(context, served.uri(export), point.environment)
    machine = point.boot(served, export)
    witness.check(machine)
    machine.kill()
    served.stop()


def _writing(times: int) -> str:
    """What a guest is busy with: 256 KiB, made durable, so many times."""
    once = "dd if=/dev/urandom of=/root/load bs=4k count=64 2>/dev/null; sync"
    return f"for n in $(seq {times}); do {once}; done"


@check("boot", "commit while it writes", needs=NEEDS, part=Part.BOOT)
def committed(context: Context) -> None:
    """`overlay commit` under a guest that writes: the new point boots, with what was synced."""
    point = RestorePoint(context, f"repo:{context.directory}/repo")
    served = point.serve()
    machine = point.boot(served)
    witness = Witness()
    witness.write(machine)
    writing = _writing(60)
    machine.begin(writing)
    words = (served.overlay(EXPORT), "--to", point.target, "--json", "--quiet")
    (row,) = json.loads(point.run("overlay", "commit", *words).stdout)
    machine.end(writing)
    expect("incremental", row["mode"], "mode")
    machine.kill()
    export = f"{GROUP}/{DISK}@{row['point']}"
    check_file_system(context, f"{point.target}#{export}", point.environment)
    machine = point.boot(served, export)
    witness.check(machine)
    machine.kill()
    served.stop()


@check("boot", "migrate while it writes", needs=NEEDS, part=Part.BOOT)
def migrated(context: Context) -> None:
    """`nbdsrv migrate` to a local qcow2; then the server goes, and the guest does not notice."""
    point = RestorePoint(context, f"repo:{context.directory}/repo")
    served = point.serve()
    machine = point.boot(served)
    witness = Witness()
    witness.write(machine)
    writing = _writing(40)
    machine.begin(writing)
    target = context.directory / "web.qcow2"
    words = (f"qemu:{machine.monitor}#vda", target, "--json", "--quiet")
    report = json.loads(nbdsrv(context, "migrate", *words).stdout)
    expect([], report["nodes_kept"], "nodes of the old disk that are left")
    machine.end(writing)
    served.stop()
    witness.write(machine)
    witness.check(machine)
    machine.kill()
    context.run("qemu-img", "check", target)
    check_file_system(context, str(target), {})
    machine = BootedMachine(context, drive_of(target, format_="qcow2"))
    machine.await_boot()
    witness.check(machine)


@check("boot", "hydrated, and traced", needs=NEEDS, part=Part.BOOT)
def hydrated(context: Context) -> None:
    """`--hydrate` under a guest, then no pack is left; the second boot is prefetched."""
    point = RestorePoint(context, f"repo:{context.directory}/repo")
    admin = context.directory / "admin"
    served = point.serve("--hydrate", "--admin-socket", str(admin))
    machine = point.boot(served)
    witness = Witness()
    witness.write(machine)
    _await_overlay(context, admin, "hydration", "complete")
    packs = context.directory / "repo" / "packs"
    packs.rename(packs.with_name("hidden"))
    machine.shell("sync; echo 3 >/proc/sys/vm/drop_caches; cat /srv/* | md5sum >/tmp/again")
    witness.check(machine)
    machine.kill()
    served.stop()
    packs.with_name("hidden").rename(packs)
    traces = sorted((context.directory / "repo" / "traces").rglob("*.tr"))
    expect(1, len(traces), "boot traces in the repository")
    point.run("verify", point.target, "--quiet")
    point.run("overlay", "drop", served.overlay(EXPORT), "--quiet")
    served = point.serve("--admin-socket", str(admin))
    machine = point.boot(served)
    _await_overlay(context, admin, "prefetched_bytes", None)
    machine.kill()
    served.stop()


def _await_overlay(context: Context, admin: Path, key: str, state: str | None) -> None:
    """Until `status` says of the one overlay that this is done."""
    deadline = time.monotonic() + HYDRATE_S
    while True:
        text = nbdsrv(context, "status", "--json", "--socket", admin).stdout
        overlays = json.loads(text)["overlays"]
        if len(overlays) == 1:
            told = overlays[0][key]
            if told if state is None else told["state"] == state:
                return
        if time.monotonic() > deadline:
            raise CheckFailedError(f"{key} is not done after {HYDRATE_S:g} s: {overlays}")
        time.sleep(0.2)


def _only_export(point: RestorePoint, context: Context) -> str:
    """The name that a foreign repository's newest point is served under."""
    rows = json.loads(point.run("ls", "--json", point.target).stdout)
    if len(rows) != 1:
        raise CheckFailedError(f"{len(rows)} points in {point.target}, not one")
    del context
    return f"{rows[0]['group']}/{rows[0]['disks'][0]['name']}@latest"


def _expect_untouched(before: dict[str, str], directory: Path) -> None:
    after = _digests(directory)
    names = before.keys() | after.keys()
    changed = sorted(name for name in names if before.get(name) != after.get(name))
    expect([], changed, f"what has changed in {directory.name}")


def _digests(directory: Path) -> dict[str, str]:
    """What must not change: all but leases, pins, traces, and what a kill leaves half written."""
    return {
        str(path.relative_to(directory)): file_digest(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not {"leases", "traces", "pins", ".tmp"} & set(path.parts)
    }
