"""Our units, judged by systemd's own tools; and the configuration that comes with them.

The executable they name is put where they expect it only in copies: nothing is installed here.
"""

import re
import shutil
import sys
from pathlib import Path

from conformance.certificates import Authority
from conformance.context import Context
from conformance.outcome import CheckFailedError
from conformance.process import PROJECT
from conformance.registry import check, expect, expect_in
from conformance.repository import command
from conformance.server import server_environment

UNITS = PROJECT / "systemd"
INSTALLED = "/opt/nbdsrv/bin/nbdsrv"
NEEDS = ("systemd-analyze",)
MOST_EXPOSED = {
    "nbdsrv.service": 1.5,
    "nbdsrv@.service": 0.5,
    "nbdsrv-backup@.service": 3.5,
    "nbdsrv-verify.service": 3.0,
}
"""Of ten; systemd's overall exposure. Backups run as root, and talk to hypervisors."""


def _copies(context: Context) -> list[Path]:
    """All units, with an executable that is there; templates as an instance of theirs."""
    program = context.directory / "nbdsrv"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m nbdsrv "$@"\n')
    program.chmod(0o755)
    for name in ("verify.conf", "x.conf"):
        (context.directory / name).write_text("")
    copies = []
    for unit in sorted(UNITS.iterdir()):
        if unit.suffix in {".service", ".socket", ".timer"}:
            copy = context.directory / unit.name
            copy.write_text(unit.read_text().replace(INSTALLED, str(program)))
            copies.append(copy)
    expect(True, len(copies) >= 8, "units")
    return copies


@check("systemd", "analyze verify", needs=NEEDS)
def verify(context: Context) -> None:
    """No unit has a key, a value or a section that systemd does not know."""
    for copy in _copies(context):
        unit = copy
        if copy.stem.endswith("@"):
            unit = copy.with_name(copy.name.replace("@.", "@x."))
            shutil.copy(copy, unit)
        finished = context.run("systemd-analyze", "verify", "--man=no", unit, code=None)
        said = [line for line in finished.stderr.splitlines() if str(context.directory) in line]
        said += [line for line in finished.stderr.splitlines() if "nbdsrv" in line]
        if said or finished.code:
            raise CheckFailedError(f"{unit.name}: {said or finished.describe()}")


@check("systemd", "analyze security", needs=NEEDS)
def security(context: Context) -> None:
    """How exposed each service is, at most."""
    for copy in _copies(context):
        if copy.suffix != ".service":
            continue
        words = ("systemd-analyze", "security", "--offline=true", "--no-pager", copy)
        text = context.run(*words, code=None).stdout
        match = re.search(r"Overall exposure level for .*: ([0-9.]+)", text)
        if match is None:
            raise CheckFailedError(f"{copy.name}: no exposure level in {text[-300:]!r}")
        if float(match[1]) > MOST_EXPOSED[copy.name]:
            raise CheckFailedError(f"{copy.name}: exposure {match[1]} of 10")


@check("systemd", "configuration to begin with")
def configuration(context: Context) -> None:
    """systemd/nbdsrv.toml lacks nothing but something to serve; with its hints taken, images."""
    text = (UNITS / "nbdsrv.toml").read_text()
    for path in ("/run/nbdsrv", "/var/log/nbdsrv", "/etc/nbdsrv", "/srv/images"):
        text = text.replace(path, str(context.directory))
    config = context.directory / "nbdsrv.toml"
    words = command("serve", "--check", "--config", config)
    image = context.directory / "vm1.qcow2"
    context.run("qemu-img", "create", "-f", "qcow2", image, "16M")
    tls = Authority(context.directory / "tls").server(demand_client=True)
    shutil.copy(tls.certificate, context.directory / "server-cert.pem")
    shutil.copy(tls.key, context.directory / "server-key.pem")
    shutil.copy(context.directory / "tls" / "ca-cert.pem", context.directory)
    (context.directory / "passphrase").write_text("secret\n")
    repository = f"repo:{context.directory / 'repo'}"
    context.run(*command("init", repository), environment=server_environment())
    config.write_text(text)
    context.run(*words, code=2, environment=server_environment())
    hints = re.sub(r"(?m)^# (?=[\[a-z }\]]|  )", "", text.partition("# [metrics]")[2])
    taken = text.partition("# [metrics]")[0] + "[metrics]" + hints
    config.write_text(taken.replace("repo:/srv/backup", repository))
    said = context.run(*words, environment=server_environment()).stdout
    expect_in("1 export, 1 repository", said, "what --check says")
