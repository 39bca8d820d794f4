"""Real libvirt: domains that are written to all the time, backed up by ``libvirt:`` and by others.

::

    model of the writes ── at the moment of the freeze ──> SHA-256 ══ what our reader has made
                        ── through the device ──> QEMU        (bytes read: about those changed)

The guest has no system of its own; its writes go through the virtio device by QEMU's monitor,
before the freeze and while it lasts. The reader is a process of its own, so that it can be killed.
"""

import contextlib
import json
import os
import random
import socket
import sys
import time
from pathlib import Path
from typing import Any

from conformance.agent_guest import NEEDS as AGENT_NEEDS
from conformance.agent_guest import AgentGuest
from conformance.certificates import Authority
from conformance.context import Context
from conformance.domain_backup import (
    ANSWER_S,
    GRAIN,
    Backup,
    change,
    digests,
    exact,
    latest,
    make_domain,
    nothing_left,
)
from conformance.image import MIB, file_digest
from conformance.libvirtd import NEEDS, Domain, Libvirtd, bindings_directory
from conformance.outcome import CheckFailedError
from conformance.process import tail
from conformance.registry import Part, check, expect, expect_in
from conformance.repository import Repository, rows_of
from conformance.server import server_environment

SEED = 5


@check("libvirt", "full, incrementals", needs=(*NEEDS, "openssl"), part=Part.LIVE)
def incrementals(context: Context) -> None:
    """A full and incrementals while three disks are written to, one of them raw; refusals."""
    source = random.Random(SEED)
    authority = Authority(context.directory / "pki")
    authority.server().key.chmod(0o644)  # QEMU runs as another user
    domain, home = make_domain(context, context.directory / "pki"), context.directory / "points"
    change(domain, source, 8)
    first = exact(domain, home, source, "full")
    expect([first], domain.checkpoints(), "checkpoints")
    # What _exact wrote while it was frozen counts too: 5 pieces of at most 3 grains.
    limit = change(domain, source) + 15 * GRAIN
    second = exact(domain, home, source, "incremental", limit)
    expect([second], domain.checkpoints(), "checkpoints")
    left = Backup(domain, home)
    left.read()
    left.leave()
    expect([second], domain.checkpoints(), "checkpoints after one that failed")
    exact(domain, home, source, "incremental")
    _one_disk(domain, home, source)
    _restarted(domain, home)
    _over_tcp(domain, home)
    _over_tcp(domain, home, f"&tls={authority.client(with_pair=True)}")
    _refusals(domain, home)


def _one_disk(domain: Domain, home: Path, source: random.Random) -> None:
    """What the other disks need is kept, and the next backup builds upon two checkpoints."""
    before = domain.checkpoints()
    change(domain, source)
    backup = Backup(domain, home, only="vda")
    expect({"vda": "incremental"}, backup.modes(), "modes of one disk")
    backup.read()
    backup.succeed()
    expect([*before, backup.disks["vda"]["checkpoint"]], domain.checkpoints(), "checkpoints")
    exact(domain, home, source, "incremental")
    expect(1, len(domain.checkpoints()), "checkpoints")


def _restarted(domain: Domain, home: Path) -> None:
    """A libvirtd that dies and comes back does not disturb a backup that is running."""
    then = digests(domain)
    backup = Backup(domain, home)
    domain.libvirtd.restart()
    domain.write("vda", 0, 4096, 99)
    backup.read()
    backup.succeed()
    expect(then, latest(domain, home), "SHA-256 over a restart of libvirtd")
    nothing_left(domain)


def _over_tcp(domain: Domain, home: Path, tls: str = "") -> None:
    """As for a hypervisor on another host: the first of some ports that is free; by TLS."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = f"&listen=127.0.0.1:{port}-{port + 20}{tls}"
        then = digests(domain)
        backup = Backup(domain, home, parameters=ports)
        expect("incremental", backup.modes()["vda"], "mode over TCP")
        backup.read()
        backup.succeed()
    expect(then, latest(domain, home), "SHA-256 over TCP")
    nothing_left(domain)


def _refusals(domain: Domain, home: Path) -> None:
    """Others' jobs are left alone, and ours are not disturbed."""
    frozen = Backup(domain, home)
    Backup(domain, home, expecting="another nbdsrv is backing web up")
    frozen.leave()
    xml = domain.libvirtd.context.directory / "foreign.xml"
    shared = _shared(domain)
    scratch = shared / "foreign.scratch"
    xml.write_text(
        f"<domainbackup mode='pull'><server transport='unix' socket='{shared}/foreign'/><disks>"
        f"<disk name='vda' type='file'><scratch file='{scratch}'/></disk></disks></domainbackup>"
    )
    domain.libvirtd.virsh("backup-begin", domain.name, xml)
    Backup(domain, home, expecting="somebody else's backup of web is running")
    expect(True, domain.has_job(), "the other's job still runs")
    domain.libvirtd.virsh("domjobabort", domain.name)
    domain.libvirtd.virsh("destroy", domain.name)
    Backup(domain, home, expecting="web is shut off")
    domain.libvirtd.virsh("start", domain.name)


@check("libvirt", "kill -9", needs=NEEDS, part=Part.LIVE)
def killed(context: Context) -> None:
    """Killed in every state, and at random: the next incremental is exact, and nothing is left."""
    source = random.Random(SEED + 1)
    domain, home = make_domain(context), context.directory / "points"
    change(domain, source)
    exact(domain, home, source, "full")
    for state in ("frozen", "read", "committed"):
        change(domain, source)
        backup = Backup(domain, home)
        change(domain, source, 1)
        if state != "frozen":
            backup.read()
        if state == "committed":
            backup.tell("succeed")
            backup.hear("committed")
        backup.kill()
        exact(domain, home, source, "incremental")
        expect(1, len(domain.checkpoints()), f"checkpoints after a kill when {state}")
    for _ in range(6):
        change(domain, source, 1)
        with contextlib.suppress(CheckFailedError):  # it may be killed before it says anything
            _kill_soon(domain, home, source)
        exact(domain, home, source, "incremental")
    expect(1, len(domain.checkpoints()), "checkpoints in the end")


def _kill_soon(domain: Domain, home: Path, source: random.Random) -> None:
    backup = Backup(domain, home, killed_after_s=source.uniform(0.3, 1.5))
    backup.read()
    backup.tell("succeed")
    backup.hear("committed")
    backup.hear("done")


@check("libvirt", "nbdsrv backup", needs=NEEDS, part=Part.LIVE)
def command(context: Context) -> None:
    """The command itself, into two repositories: a full, an incremental, a dry run; a live copy."""
    source = random.Random(SEED + 4)
    domain = make_domain(context)
    bindings = bindings_directory(context)
    path = [server_environment()["PYTHONPATH"], *([str(bindings)] if bindings else [])]
    environment = {"PYTHONPATH": os.pathsep.join(path)}
    repos = [
        Repository(context, f"repo:{context.directory / name}", environment, group=domain.name)
        for name in ("one", "two")
    ]
    for repo in repos:
        repo.init()
    where = f"libvirt:{domain.libvirtd.uri}&scratch={context.directory}#{domain.name}"
    words = ["backup", where, "--json", "--quiet"]
    words += [word for repo in repos for word in ("--to", repo.target)]
    for mode in ("full", "incremental"):
        change(domain, source)
        rows = rows_of(repos[0].run(*words).stdout)
        modes = {(row["repository"], row["disk"]): row["mode"] for row in rows}
        for repo in repos:
            expect(mode, modes[repo.target, "vda"], f"mode of vda in {rows}")
            for name, disk in domain.disks.items():
                restored = context.directory / f"{name}.restored"
                restored.unlink(missing_ok=True)
                repo.run("restore", f"{repo.target}#{domain.name}/{name}@latest", restored)
                expect(disk.digest(), file_digest(restored), f"SHA-256 of {name}")
        expect(1, len(domain.checkpoints()), "checkpoints")
        nothing_left(domain)
    copy = context.directory / "vdb.copy"
    repos[0].run(*words, "--dry-run")
    repos[0].run("copy", f"{where}/vdb", f"raw:{copy}")
    expect(domain.disks["vdb"].digest(), file_digest(copy), "SHA-256 of a live copy of vdb")
    expect(1, len(domain.checkpoints()), "checkpoints after a copy")
    nothing_left(domain)


@check("libvirt", "QEMU killed", needs=NEEDS, part=Part.LIVE)
def qemu_killed(context: Context) -> None:
    """Bitmaps do not survive QEMU's death: a full backup that says so, and then incrementals."""
    source = random.Random(SEED + 2)
    domain, home = make_domain(context), context.directory / "points"
    change(domain, source)
    exact(domain, home, source, "full")
    domain.libvirtd.virsh("destroy", domain.name)  # SIGTERM first: QEMU saves its bitmaps
    domain.libvirtd.virsh("start", domain.name)
    change(domain, source)
    exact(domain, home, source, "incremental")
    domain.libvirtd.kill(f"guest={domain.name},debug-threads")
    _until_off(domain)
    domain.libvirtd.virsh("start", domain.name)
    _read_back(domain)
    backup = Backup(domain, home)
    expect({"vda": "full", "vdb": "full", "vdc": "full"}, backup.modes(), "modes after a crash")
    expect_in("bitmap", backup.disks["vda"]["reason"], "the reason")
    then = digests(domain)
    backup.read()
    backup.succeed()
    expect(then, latest(domain, home), "SHA-256 after a crash")
    exact(domain, home, source, "incremental")
    expect(1, len(domain.checkpoints()), "checkpoints in the end")


def _until_off(domain: Domain) -> None:
    deadline = time.monotonic() + ANSWER_S
    while "shut off" not in domain.libvirtd.virsh("domstate", domain.name).stdout:
        if time.monotonic() > deadline:
            raise CheckFailedError("the domain is not shut off, though its QEMU was killed")
        time.sleep(0.1)


def _read_back(domain: Domain) -> None:
    """What was written and not flushed may or may not have survived a crash: look."""
    for disk in domain.disks.values():
        copy = domain.libvirtd.context.directory / "look.raw"
        domain.libvirtd.context.run(
            *("qemu-img", "convert", "-U", "-f", disk.form, "-O", "raw", disk.path, copy)
        )
        disk.content[:] = copy.read_bytes()


@check(
    "libvirt",
    "guest agent",
    needs=(*NEEDS, *AGENT_NEEDS, "dumpe2fs", "e2fsck"),
    part=Part.LIVE,
)
def guest_agent(context: Context) -> None:
    """A Linux that writes to ext4 all the time: frozen clean by its agent, thawed in every case."""
    guest = AgentGuest(context)
    disks = {"vda": (48 * MIB, "qcow2")}
    domain = Domain(Libvirtd(context), "web", disks, (guest.kernel, guest.initrd))
    home = context.directory / "points"
    _until_agent(domain)
    for parameters, consistency in (("&agent=off", "crash"), ("&agent=needed", "filesystem")):
        backup = Backup(domain, home, parameters=parameters)
        expect(consistency, backup.consistency, f"consistency with {parameters}")
        expect("thawed", _agent(domain, "guest-fsfreeze-status"), "the guest's file systems")
        backup.read()
        backup.succeed()
        header = context.run("dumpe2fs", "-h", home / "vda.latest").stdout
        expect(consistency == "crash", "needs_recovery" in header, "ext4 has a journal to replay")
    context.run("e2fsck", "-f", "-n", home / "vda.latest")
    # As if a backup had been killed at the worst moment.
    _die_frozen(domain)
    expect("frozen", _agent(domain, "guest-fsfreeze-status"), "the guest's file systems")
    backup = Backup(domain, home)
    expect("filesystem", backup.consistency, "consistency after a kill")
    expect("thawed", _agent(domain, "guest-fsfreeze-status"), "the guest's file systems")
    backup.read()
    backup.succeed()
    nothing_left(domain)


def _agent(domain: Domain, command: str) -> Any:
    order = json.dumps({"execute": command})
    said = domain.libvirtd.virsh("qemu-agent-command", domain.name, order, code=None)
    return json.loads(said.stdout)["return"] if said.code == 0 else None


def _until_agent(domain: Domain) -> None:
    deadline = time.monotonic() + ANSWER_S
    while _agent(domain, "guest-ping") is None:
        if time.monotonic() > deadline:
            console = domain.libvirtd.context.directory / f"{domain.name}.console"
            raise CheckFailedError(f"no agent: {tail(console.read_text(errors='replace'))}")
        time.sleep(0.3)


_DIE_FROZEN = """\
import sys
from nbdsrv.source.libvirt_checkpoints import new_token
from nbdsrv.source.libvirt_workplace import Workplace
Workplace.make(sys.argv[1], new_token(), sys.argv[2], None).note_frozen()
"""


def _die_frozen(domain: Domain) -> None:
    """What is there when a backup dies between freezing the guest and thawing it."""
    context = domain.libvirtd.context
    uuid = domain.libvirtd.virsh("domuuid", domain.name).stdout.strip()
    words = (sys.executable, "-c", _DIE_FROZEN, context.directory, uuid)
    context.run(*words, environment=server_environment())
    domain.libvirtd.virsh("domfsfreeze", domain.name)


@check("libvirt", "virtnbdbackup", needs=(*NEEDS, "virtnbdbackup"), part=Part.LIVE)
def virtnbdbackup(context: Context) -> None:
    """Its checkpoints and ours in one domain; each goes on from its own, and deletes its own."""
    source = random.Random(SEED + 3)
    domain, home = make_domain(context), context.directory / "points"
    theirs = context.directory / "theirs"
    change(domain, source)
    _theirs(domain, theirs, "full")
    change(domain, source)
    exact(domain, home, source, "full")
    change(domain, source)
    ours = exact(domain, home, source, "incremental")
    expect([ours, "virtnbdbackup.0"], domain.checkpoints(), "checkpoints of both")
    # It insists on being alone, whoever else is there; nothing of ours or of it is harmed.
    refused = _theirs(domain, theirs, "inc", code=1)
    expect_in("Foreign checkpoint found", refused, "what virtnbdbackup says")
    expect([ours, "virtnbdbackup.0"], domain.checkpoints(), "checkpoints of both")
    domain.libvirtd.virsh("checkpoint-delete", domain.name, ours)
    change(domain, source)
    then = digests(domain)
    _theirs(domain, theirs, "inc")
    restored = context.directory / "restored"
    restored.mkdir()
    context.run(
        *("virtnbdrestore", "-U", domain.libvirtd.uri, "-i", theirs, "-o", restored),
        environment={"PATH": f"/usr/bin:{os.environ['PATH']}"},
        timeout_s=120,
    )
    for name in ("vda", "vdb"):
        image = next(restored.glob(f"*{name}*"))
        context.run("qemu-img", "convert", "-O", "raw", image, context.directory / "look.raw")
        expect(then[name], file_digest(context.directory / "look.raw"), f"their {name}")
    change(domain, source)
    backup = Backup(domain, home)
    expect("full", backup.modes()["vda"], "our mode without our checkpoint")
    expect_in("no longer has checkpoint", backup.disks["vda"]["reason"], "the reason")
    backup.read()
    backup.succeed()
    exact(domain, home, source, "incremental")
    expect(2, sum("virtnbdbackup." in name for name in domain.checkpoints()), "their checkpoints")


def _shared(domain: Domain) -> Path:
    """A directory that QEMU, who is another user, can make sockets in."""
    shared = domain.libvirtd.context.directory / "shared"
    shared.mkdir(exist_ok=True)
    shared.chmod(0o777)
    return shared


def _theirs(domain: Domain, home: Path, level: str, code: int = 0) -> str:
    context = domain.libvirtd.context
    shared = _shared(domain)
    finished = context.run(
        *("virtnbdbackup", "-U", domain.libvirtd.uri, "-d", domain.name, "-l", level),
        *("-o", home, "--scratchdir", shared, "-f", shared / "socket"),
        code=code,
        timeout_s=120,
        environment={"PATH": f"/usr/bin:{os.environ['PATH']}"},
    )
    return finished.stdout + finished.stderr
