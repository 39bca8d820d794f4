"""TLS with GnuTLS's and OpenSSL's clients: libnbd, QEMU, nbd-client.

The certificates come from :mod:`conformance.certificates`, new for every check.
"""

import json
from pathlib import Path

from conformance.certificates import Authority
from conformance.context import Context
from conformance.image import MIB, file_digest
from conformance.outcome import CheckFailedError
from conformance.programs.nbd_client import listed_names
from conformance.programs.nbdsh import run_scenario
from conformance.registry import check, expect, expect_in
from conformance.server import Server

LIBNBD = ("nbdinfo", "nbdcopy", "openssl")


def _authority(context: Context, name: str = "pki", host: str = "localhost") -> Authority:
    return Authority(context.directory / name, host)


def _refused(context: Context, uri: str, what: str) -> str:
    finished = context.run("nbdinfo", "--size", uri, code=None)
    if finished.code != 1 or finished.stdout.strip():
        raise CheckFailedError(f"{what} was let in: {finished.describe()}")
    return finished.stderr


def _secure(server: Server, home: Path, name: str = "", *, tcp: bool = False) -> str:
    return server.uri(name, tcp=tcp, tls=True, tls_certificates=str(home))


@check("libnbd TLS", "nbds+unix", needs=LIBNBD)
def over_unix(context: Context) -> None:
    """TLS over a Unix socket, as nbdinfo reports it."""
    authority = _authority(context)
    server = context.serve(context.image(), tls=authority.server())
    uri = _secure(server, authority.client())
    report = json.loads(context.run("nbdinfo", "--json", uri).stdout)
    expect((True, True), (report["TLS"], report["structured"]), "TLS and structured replies")


@check("libnbd TLS", "nbds copy x4", needs=LIBNBD)
def over_tcp(context: Context) -> None:
    """nbdcopy over TCP and four TLS connections, both directions."""
    authority = _authority(context)
    image, target = context.image(size=64 * MIB), context.image("target", 64 * MIB, spans=())
    client = authority.client()
    source = context.serve(image, listen=("tcp",), tls=authority.server())
    sink = context.serve(target, listen=("tcp",), tls=authority.server(), write=True)
    copy = context.directory / "copy"
    four = ("--connections=4", "--threads=4")
    context.run("nbdcopy", *four, _secure(source, client, tcp=True), copy)
    expect(image.digest(), file_digest(copy), "sha256 of the download")
    context.run("nbdcopy", *four, "--flush", copy, _secure(sink, client, tcp=True))
    expect(image.digest(), target.digest(), "sha256 of the upload")


@check("libnbd TLS", "plaintext refused", needs=LIBNBD)
def plaintext_refused(context: Context) -> None:
    """Where TLS is required a plaintext client gets nothing, not even the list."""
    server = context.serve(context.image(), tls=_authority(context).server())
    expect_in("TLS", _refused(context, server.uri(), "a plaintext client"), "the refusal")
    for words in (("--json",), ("--list",), ("--map",)):
        finished = context.run("nbdinfo", *words, server.uri(), code=None)
        expect(1, finished.code, f"exit code of nbdinfo {' '.join(words)}")


@check("libnbd TLS", "wrong CA", needs=LIBNBD)
def wrong_authority(context: Context) -> None:
    """A client that trusts another CA leaves; the next client is served."""
    authority, other = _authority(context), _authority(context, "other")
    # Over TCP: before the fix of CVE-2024-7383 libnbd checks none on a Unix socket.
    server = context.serve(context.image(), listen=("tcp",), tls=authority.server())
    misled = authority.client(trust=other)
    _refused(context, _secure(server, misled, tcp=True), "a server of another CA")
    context.run("nbdinfo", _secure(server, authority.client(), tcp=True))


@check("libnbd TLS", "client certificate", needs=LIBNBD)
def client_certificate(context: Context) -> None:
    """With a CA for clients: a certificate of it opens, none or another's does not."""
    authority, other = _authority(context), _authority(context, "other")
    server = context.serve(context.image(), tls=authority.server(demand_client=True))
    _refused(context, _secure(server, authority.client()), "a client without a certificate")
    stranger = other.client(trust=authority, with_pair=True)
    _refused(context, _secure(server, stranger), "a client of another CA")
    context.run("nbdinfo", _secure(server, authority.client(with_pair=True)))
    context.run("nbdcopy", _secure(server, authority.client(with_pair=True)), "null:")


@check("libnbd TLS", "per export", needs=LIBNBD)
def per_export(context: Context) -> None:
    """One export in plaintext, one only under TLS, on the same socket."""
    authority = _authority(context)
    images = {"open": context.image("a"), "secret": context.image("b", 16 * MIB)}
    tls = authority.server(mode="per-export", only_for=("secret",))
    server = context.serve(exports=images, tls=tls)
    home = authority.client()
    expect(
        str(32 * MIB), context.run("nbdinfo", "--size", server.uri("open")).stdout.strip(), "open"
    )
    expect_in("TLS", _refused(context, server.uri("secret"), "plaintext"), "the refusal")
    for name, image in images.items():
        text = context.run("nbdinfo", "--size", _secure(server, home, name)).stdout
        expect(str(image.size), text.strip(), f"size of {name} under TLS")


@check("libnbd TLS", "TLS 1.2 and 1.3", needs=LIBNBD)
def versions(context: Context) -> None:
    """GnuTLS held to one version by its system priorities: 1.2 and 1.3 pass, 1.1 does not."""
    authority = _authority(context)
    server = context.serve(context.image(), tls=authority.server())
    uri = _secure(server, authority.client())
    for version, code in (("tls1.3", 0), ("tls1.2", 0), ("tls1.1", 1)):
        others = {"tls1.0", "tls1.1", "tls1.2", "tls1.3"} - {version}
        priorities = context.directory / f"{version}.conf"
        lines = ["[overrides]", *(f"disabled-version = {other}" for other in sorted(others))]
        priorities.write_text("\n".join([*lines, ""]))
        environment = {"GNUTLS_SYSTEM_PRIORITY_FILE": str(priorities)}
        finished = context.run("nbdinfo", uri, code=None, environment=environment)
        if finished.code != code:
            raise CheckFailedError(f"{version}: {finished.describe()}")


@check("libnbd TLS", "refused write", needs=LIBNBD)
def refused_write(context: Context) -> None:
    """Payloads of refused writes are drained through TLS: the connection stays in sync."""
    authority = _authority(context)
    image = context.image()
    server = context.serve(image, tls=authority.server())
    run_scenario(context, "requests", "read_only", _secure(server, authority.client()), image.path)


@check("libnbd TLS", "sparse, errors, map", needs=LIBNBD)
def requests(context: Context) -> None:
    """What the plaintext path shows holds under TLS as well."""
    authority = _authority(context)
    image = context.image()
    server = context.serve(image, tls=authority.server())
    uri = _secure(server, authority.client())
    for module, scenario in (
        ("requests", "sparse_reads"),
        ("requests", "df_reads"),
        ("requests", "read_beyond_end"),
        ("requests", "cache_and_status"),
        ("options", "info_then_go"),
        ("options", "unknown_export"),
    ):
        run_scenario(context, module, scenario, uri, image.path)


@check("qemu-img TLS", "convert", needs=("qemu-img", "openssl"))
def qemu_convert(context: Context) -> None:
    """QEMU's client with a certificate of its own, over TCP."""
    authority = _authority(context)
    image = context.image()
    server = context.serve(image, listen=("tcp",), tls=authority.server(demand_client=True))
    home = authority.client(with_pair=True)
    credentials = f"tls-creds-x509,id=creds,endpoint=client,dir={home}"
    source = f"driver=nbd,host={server.host},port={server.port},tls-creds=creds"
    copy = context.directory / "copy"
    context.run(
        "qemu-img", "convert", "--object", credentials, "--image-opts", "-O", "raw", source, copy
    )
    expect(image.digest(), file_digest(copy), "sha256 of the download")


@check("nbd-client TLS", "list", needs=("nbd-client", "openssl"))
def nbd_client_list(context: Context) -> None:
    """nbd-client -l -x over TCP."""
    authority = _authority(context)
    server = context.serve(
        exports={"first": context.image("a")}, listen=("tcp",), tls=authority.server()
    )
    words = ("nbd-client", "-x", "-A", str(authority.certificate), "-H", "localhost")
    text = context.run(*words, "-l", server.host, str(server.port)).stdout
    expect(["first"], listed_names(text), "names")
