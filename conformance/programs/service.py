"""A service with a configuration file: who gets in, what changes under clients, what is seen."""

import os
import socket
import time
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from conformance.certificates import Authority
from conformance.configured import ConfiguredServer
from conformance.context import Context
from conformance.image import MIB
from conformance.outcome import CheckFailedError, MissingPeerError
from conformance.registry import check, expect, expect_in

HEAD = """\
listen = ["unix:@DIR@/nbd", "127.0.0.1:{port}"]
socket_mode = "666"
[admin]
socket = "@DIR@/admin"
[audit]
file = "@DIR@/audit"
"""
NOBODY = 65534


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _export(name: str, image: Path, more: str = "") -> str:
    return f'[[export]]\nname = "{name}"\nsource = "{image}"\n{more}\n'


def _audited(server: ConfiguredServer, **facts: object) -> None:
    deadline = time.monotonic() + 10
    while not any(facts.items() <= line.items() for line in server.audit()):
        if time.monotonic() > deadline:
            raise CheckFailedError(f"no audit line with {facts}: {server.audit()}")
        time.sleep(0.05)


@check("service", "by uid and address", needs=("nbdinfo", "setpriv"))
def by_uid_and_address(context: Context) -> None:
    """nbdinfo as root, as nobody, over TCP: three clients of two exports see what they may."""
    if os.geteuid():
        raise MissingPeerError("needs root to become somebody else")
    image = context.image(size=16 * MIB)
    rules = f"write = true\nallow = [{{uid = {NOBODY}, access = 'ro'}}, {{uid = 0}}]"
    other = "hidden = false\nallow = [{address = '127.0.0.1'}]"
    port = _free_port()
    text = HEAD.format(port=port) + _export("vm1", image.path, rules)
    server = ConfiguredServer(context, text + _export("vm2", image.path, other), lines=4).begin()
    context.directory.chmod(0o755)
    unix, tcp = f"nbd+unix:///vm1?socket={server.socket}", f"nbd://127.0.0.1:{port}"
    as_nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    expect_in("is_read_only: false", context.run("nbdinfo", unix).stdout, "root's vm1")
    expect_in("is_read_only: true", context.run(*as_nobody, "nbdinfo", unix).stdout, "nobody's")
    listed = context.run("nbdinfo", "--list", "--json", tcp).stdout
    expect((False, True), ('"vm1"' in listed, '"vm2"' in listed), "what TCP clients see")
    hidden = context.run("nbdinfo", f"{tcp}/vm1", code=1).stderr
    absent = context.run("nbdinfo", f"{tcp}/vm0", code=1).stderr
    expect(absent.replace("vm0", "vm1"), hidden, "what is said of the hidden export")
    refused = context.run("nbdinfo", unix.replace("vm1", "vm2"), code=1).stderr
    # What libnbd 1.14 makes of NBD_REP_ERR_POLICY.
    expect_in("not supported", refused, "what is said of the one that is only forbidden")
    _audited(server, event="attach", export="vm1", uid=NOBODY, access="ro")
    _audited(server, event="attach", export="vm1", uid=0, access="rw")
    _audited(server, event="refuse", export="vm1", address="127.0.0.1", reason="not allowed")
    _audited(server, event="refuse", export="vm2", uid=0, reason="not allowed")


@check("service", "by certificate", needs=("nbdinfo", "qemu-img", "openssl"))
def by_certificate(context: Context) -> None:
    """The right subject, another one of the same CA, and one of another CA."""
    image = context.image(size=16 * MIB)
    authority = Authority(context.directory / "ours")
    stranger = Authority(context.directory / "theirs")
    right, wrong = authority.client(with_pair=True), authority.client(with_pair=True)
    other = stranger.client(trust=authority, with_pair=True)
    tls = authority.server(demand_client=True)
    port = _free_port()
    text = HEAD.format(port=port) + (
        f'[tls]\ncert = "{tls.certificate}"\nkey = "{tls.key}"\nca = "{tls.client_ca}"\n'
    )
    text += _export("vm1", image.path, f'allow = [{{subject = "CN={right.name}"}}]')
    server = ConfiguredServer(context, text, lines=2).begin()

    def uri(home: Path) -> str:
        return f"nbds://localhost:{port}/vm1?tls-certificates={home}"

    expect(image.size, int(context.run("nbdinfo", "--size", uri(right)).stdout), "size")
    said = context.run("nbdinfo", "--size", uri(wrong), code=1).stderr
    expect_in("No such file", said, "what the wrong subject is told")
    context.run("nbdinfo", "--size", uri(other), code=1)
    words = ("qemu-img", "info", "--image-opts", "--object")
    for home, code in ((right, 0), (wrong, 1)):
        creds = f"tls-creds-x509,id=t,endpoint=client,dir={home}"
        where = f"driver=nbd,host=localhost,port={port},export=vm1,tls-creds=t"
        context.run(*words, creds, where, code=code)
    _audited(server, event="attach", export="vm1", subject=f"CN={right.name}")
    _audited(server, event="refuse", export="vm1", subject=f"CN={wrong.name}")
    if not any("verify" in line.get("reason", "").lower() for line in server.audit()):
        raise CheckFailedError(f"no audit line about the other CA: {server.audit()}")


@check("service", "bad configuration", needs=("nbdinfo",))
def bad_configuration(context: Context) -> None:
    """Exit code 2 and the line at the start; at a reload the same, and the old one is kept."""
    image = context.image(size=16 * MIB)
    port = _free_port()
    head = HEAD.format(port=port)
    good = head + _export("vm1", image.path)
    server = ConfiguredServer(context, good, lines=2).begin()
    at = good.count("\n")
    cases = {
        _export("a", image.path, "acess = 1"): f":{at + 4}: export.a.acess: unknown key",
        _export("a", image.path, "write = 1"): f":{at + 4}: export.a.write: expected true or",
        _export("a", Path("/nowhere/a.img")): f":{at + 3}: export.a.source: /nowhere/a.img",
        _export("vm1", image.path): f":{at + 2}: export.vm1.name: this name is taken",
        f'[metrics]\nlisten = "127.0.0.1:{port}"\n': f":{at + 2}: metrics.listen: overlaps",
    }
    for bad, said in cases.items():
        server.write(good + bad)
        for finished in (
            server.nbdsrv("reload", code=2),
            server.try_again(code=2),
        ):
            expect_in(f"{server.config}{said}", finished.stderr, "what is said")
            expect(1, len(finished.stderr.splitlines()), "lines of it")
    expect(image.size, int(context.run("nbdinfo", "--size", server.uri("vm1")).stdout), "size")
    failed = server.status()["server"]["reloads"]["failed"]
    expect(len(cases), failed, "failed reloads in status")


@check("service", "metrics and status", needs=("nbdcopy",))
def metrics(context: Context) -> None:
    """What was copied is what is counted; the page is what Prometheus's own parser takes."""
    image = context.image(size=16 * MIB)
    port, scraped = _free_port(), _free_port()
    text = HEAD.format(port=port) + f'[metrics]\nlisten = "127.0.0.1:{scraped}"\n'
    server = ConfiguredServer(context, text + _export("vm1", image.path), lines=2).begin()
    copies = 3
    for number in range(copies):
        context.run("nbdcopy", server.uri("vm1"), context.directory / f"copy{number}")
    with urllib.request.urlopen(f"http://127.0.0.1:{scraped}/metrics", timeout=10) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    found = {
        (sample.name, sample.labels.get("export", ""), sample.labels.get("kind", "")): sample.value
        for family in families
        for sample in family.samples
    }
    (export,) = server.status()["exports"]
    for name, key in (
        ("nbdsrv_sent_bytes_total", "sent"),
        ("nbdsrv_received_bytes_total", "received"),
        ("nbdsrv_attached_total", "attached"),
    ):
        expect(export[key], found[name, "vm1", ""], name)
    expect(export["reads"], found["nbdsrv_requests_total", "vm1", "read"], "reads")
    data = sum(length for _, length, is_data in image.extents() if is_data)
    if not copies * data <= export["sent"] <= copies * data * 1.05 + 100_000:
        raise CheckFailedError(f"{export['sent']} bytes sent of {copies} times {data}")
    once = server.nbdsrv("status", "--once").stdout
    expect_in("vm1", once, "the plain picture")
    expect_in("unix:", once, "where it listens")
