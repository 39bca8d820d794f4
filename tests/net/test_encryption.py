"""TLS at the socket: modes, what STARTTLS forgets, certificates, transmission.

proto.md "TLS support"; CVE-2021-3716 (state kept across STARTTLS), the STARTTLS injection family;
reference rows "rejected WRITE over TLS" to "client cert missing".
"""

import random
import ssl
import time
import warnings
from pathlib import Path

import pytest
from authority import Certificates
from served_images import DISK_SIZE, MIB, Images, Serve
from serving import ServerProcess
from wire import Wire, info_data, meta_data, option

from protocol import structs
from protocol.constants import Command, CommandFlag, Dialect, Errno, Option, Reply, ReplyType

ALLOCATION = "base:allocation"


def tls_options(certificates: Certificates) -> list[str | Path]:
    """The server's pair."""
    pair = certificates.server
    return ["--tls-cert", pair.certificate, "--tls-key", pair.key]


@pytest.fixture
def forced(
    serve: Serve, images: Images, certificates: Certificates, tmp_path: Path
) -> ServerProcess:
    """TLS required."""
    where = ("--listen", f"unix:{tmp_path}/sock")
    return serve(images.disk, images.big, *where, *tls_options(certificates), uris=2)


@pytest.fixture
def selective(
    serve: Serve, images: Images, certificates: Certificates, tmp_path: Path
) -> ServerProcess:
    """``big`` over TLS only, ``disk`` for everyone."""
    where = ("--listen", f"unix:{tmp_path}/sock")
    modes = ("--tls", "per-export", "--tls-export", "big")
    return serve(images.disk, images.big, *where, *modes, *tls_options(certificates), uris=2)


@pytest.fixture
def encrypted_scratch(
    serve: Serve, certificates: Certificates, tmp_path: Path
) -> tuple[ServerProcess, Path]:
    """A writable image over TLS."""
    image = tmp_path / "image"
    image.write_bytes(random.Random(1).randbytes(6 * MIB))
    where = ("--listen", f"unix:{tmp_path}/sock")
    return serve(image, "--write", *where, *tls_options(certificates)), image


def plain(server: ServerProcess) -> Wire:
    """Before STARTTLS."""
    wire = server.connect()
    wire.greet()
    return wire


def secure(server: ServerProcess, context: ssl.SSLContext) -> Wire:
    """After STARTTLS."""
    wire = plain(server)
    wire.starttls(context)
    return wire


# --- required ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "data"),
    [
        (Option.LIST, b""),
        (Option.INFO, info_data("disk")),
        (Option.GO, info_data("disk")),
        (Option.STRUCTURED_REPLY, b""),
        (Option.EXTENDED_HEADERS, b""),
        (Option.LIST_META_CONTEXT, meta_data("disk", [])),
        (Option.SET_META_CONTEXT, meta_data("disk", [])),
        (99, b"?"),
    ],
)
def test_required_refuses_everything_in_plain_text(
    forced: ServerProcess, certificates: Certificates, number: int, data: bytes
) -> None:
    wire = plain(forced)
    assert wire.verdict(number, data) == Reply.ERR_TLS_REQD
    wire.starttls(certificates.client_context())
    wire.go("disk")
    assert len(wire.read(0, 512)) == 512


@pytest.mark.parametrize("flags", [0, 1, 3])
def test_required_closes_on_export_name(forced: ServerProcess, flags: int) -> None:
    wire = forced.connect()
    wire.receive(18)
    wire.send(structs.ClientFlags.build({"flags": flags}) + option(Option.EXPORT_NAME, b"disk"))
    assert wire.is_closed()


def test_abort_in_plain_text_is_acknowledged(forced: ServerProcess) -> None:
    wire = plain(forced)
    assert wire.verdict(Option.ABORT) == Reply.ACK
    assert wire.is_closed()


def test_starttls_with_data_is_invalid(forced: ServerProcess, certificates: Certificates) -> None:
    wire = plain(forced)
    assert wire.verdict(Option.STARTTLS, b"x") == Reply.ERR_INVALID
    wire.starttls(certificates.client_context())
    assert wire.verdict(Option.LIST) == Reply.ACK


def test_second_starttls_is_invalid(forced: ServerProcess, certificates: Certificates) -> None:
    wire = secure(forced, certificates.client_context())
    assert wire.verdict(Option.STARTTLS) == Reply.ERR_INVALID
    wire.go("disk")
    assert len(wire.read(0, 512)) == 512


def test_never_tls_required_after_tls(forced: ServerProcess, certificates: Certificates) -> None:
    wire = secure(forced, certificates.client_context())
    asked = {
        Option.GO: info_data("nothing"),
        Option.INFO: info_data("nothing"),
        Option.SET_META_CONTEXT: meta_data("nothing", []),
        99: b"",
    }
    for number, data in asked.items():
        assert wire.verdict(number, data) not in {Reply.ACK, Reply.ERR_TLS_REQD}


# --- what STARTTLS forgets --------------------------------------------------------------------


@pytest.mark.parametrize("before", [Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
def test_starttls_forgets_the_dialect_and_the_contexts(
    selective: ServerProcess, certificates: Certificates, before: Option
) -> None:
    wire = plain(selective)
    assert wire.verdict(before) == Reply.ACK
    wire.select("disk", ALLOCATION)
    wire.starttls(certificates.client_context())
    wire.go("disk")
    assert len(wire.read(0, 512)) == 512  # a compact request, a simple reply
    assert wire.call(Command.BLOCK_STATUS, 0, 512).error == Errno.EINVAL


def test_contexts_of_plain_text_are_void_after_starttls(
    selective: ServerProcess, certificates: Certificates
) -> None:
    wire = plain(selective)
    wire.use(Dialect.STRUCTURED)
    wire.select("disk", ALLOCATION)
    wire.starttls(certificates.client_context())
    wire.use(Dialect.STRUCTURED)  # not "in use already"
    wire.go("disk")
    assert wire.call(Command.BLOCK_STATUS, 0, 512).error == Errno.EINVAL


@pytest.mark.parametrize("behind", [option(Option.LIST), b"x", option(Option.ABORT), bytes(4000)])
def test_plain_text_behind_starttls_closes(
    selective: ServerProcess, certificates: Certificates, behind: bytes
) -> None:
    """A single byte an attacker injected ends the connection; it is never taken as encrypted."""
    wire = plain(selective)
    wire.send(option(Option.STARTTLS) + behind)
    try:
        if wire.option_reply().reply == Reply.ACK:
            wire.sock = certificates.client_context().wrap_socket(
                wire.sock, server_hostname="localhost"
            )
            pytest.fail("the injected bytes were ignored")
    except (EOFError, OSError):
        pass


# --- per export -------------------------------------------------------------------------------


def test_per_export_in_plain_text(selective: ServerProcess) -> None:
    wire = plain(selective)
    *listed, _ = wire.ask(Option.LIST)
    assert [structs.ServerReply.parse(entry.data).name.data for entry in listed] == [b"disk"]
    for name in ("big", "nothing"):  # what is secret looks like what does not exist
        for number in (Option.INFO, Option.GO):
            assert wire.verdict(number, info_data(name)) == Reply.ERR_TLS_REQD
    wire.use(Dialect.STRUCTURED)
    refused = {wire.verdict(10, meta_data(name, [ALLOCATION])) for name in ("big", "nothing")}
    assert len(refused) == 1
    assert refused.pop() >= 1 << 31
    wire.go("disk")
    assert len(wire.read(0, 512)) == 512


def test_per_export_secret_by_export_name_closes(selective: ServerProcess) -> None:
    wire = plain(selective)
    wire.send(option(Option.EXPORT_NAME, b"big"))
    assert wire.is_closed()


def test_per_export_over_tls(
    selective: ServerProcess, certificates: Certificates, images: Images
) -> None:
    for name, golden in (("disk", images.golden), ("big", images.golden_big)):
        wire = secure(selective, certificates.client_context())
        *listed, _ = wire.ask(Option.LIST)
        assert len(listed) == 2
        wire.use(Dialect.STRUCTURED)
        wire.go(name)
        assert golden[5:100_005] == wire.read(5, 100_000)


# --- certificates and versions ----------------------------------------------------------------


@pytest.fixture
def demanding(
    serve: Serve, images: Images, certificates: Certificates, tmp_path: Path
) -> ServerProcess:
    """Wants a client certificate of our CA."""
    where = ("--listen", f"unix:{tmp_path}/sock")
    return serve(images.disk, *where, *tls_options(certificates), "--tls-ca", certificates.ca)


def test_client_certificate_is_accepted(
    demanding: ServerProcess, certificates: Certificates
) -> None:
    wire = secure(demanding, certificates.client_context(certificates.client))
    wire.go("disk")
    assert len(wire.read(0, 512)) == 512


@pytest.mark.parametrize("which", ["none", "stranger", "server"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_wrong_client_certificate_is_closed(
    demanding: ServerProcess, certificates: Certificates, which: str, version: ssl.TLSVersion
) -> None:
    """None at all, another CA's, or one that is for servers."""
    pair = {"none": None, "stranger": certificates.stranger, "server": certificates.server}[which]
    context = certificates.client_context(pair)
    context.maximum_version = version
    wire = plain(demanding)
    with pytest.raises((OSError, EOFError)):
        _try_options(wire, context)


def _try_options(wire: Wire, context: ssl.SSLContext) -> None:
    wire.starttls(context)
    wire.ask(Option.LIST)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_modern_versions(
    forced: ServerProcess, certificates: Certificates, version: ssl.TLSVersion
) -> None:
    context = certificates.client_context()
    context.minimum_version = context.maximum_version = version
    wire = secure(forced, context)
    wire.go("disk")
    assert len(wire.read(0, MIB)) == MIB


def test_tls_1_1_is_refused(forced: ServerProcess, certificates: Certificates) -> None:
    context = certificates.client_context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    wire = plain(forced)
    assert wire.verdict(Option.STARTTLS) == Reply.ACK
    with pytest.raises((ssl.SSLError, ConnectionError)) as caught:
        wire.sock = context.wrap_socket(wire.sock, server_hostname="localhost")
    assert "NO_PROTOCOLS" not in str(caught.value), "the client could not even try"


def test_garbage_instead_of_tls_closes(forced: ServerProcess) -> None:
    for garbage in (b"\0" * 100, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(2000)):
        wire = plain(forced)
        assert wire.verdict(Option.STARTTLS) == Reply.ACK
        wire.send(garbage)
        wire.sock.shutdown(1)
        started = time.monotonic()
        while not wire.is_closed():  # an alert may come first
            assert time.monotonic() - started < 5


def test_stalled_tls_handshake_meets_the_deadline(
    serve: Serve, images: Images, certificates: Certificates, tmp_path: Path
) -> None:
    where = ("--listen", f"unix:{tmp_path}/sock", "--handshake-timeout", "0.5")
    wire = plain(serve(images.disk, *where, *tls_options(certificates)))
    assert wire.verdict(Option.STARTTLS) == Reply.ACK
    started = time.monotonic()
    assert wire.is_closed()
    assert time.monotonic() - started < 5


# --- transmission -----------------------------------------------------------------------------


def entered(server: ServerProcess, certificates: Certificates, dialect: Dialect) -> Wire:
    """In transmission over TLS."""
    wire = secure(server, certificates.client_context())
    wire.use(dialect)
    if dialect is Dialect.SIMPLE:
        wire.export_name("disk" if len(server.uris) > 1 else "")
    else:
        wire.go("disk" if len(server.uris) > 1 else "")
    return wire


def test_reads_over_tls(
    forced: ServerProcess, certificates: Certificates, images: Images, dialect: Dialect
) -> None:
    wire = entered(forced, certificates, dialect)
    shapes = [(0, 1), (0, DISK_SIZE), (511, 70_000), (MIB - 1, 2), (DISK_SIZE - 1, 1)]
    for offset, length in shapes:
        assert images.golden[offset : offset + length] == wire.read(offset, length)
    batch = b"".join(wire.prepare(Command.READ, n * 1000, 20_000) for n in range(64))
    wire.send(batch + wire.prepare(Command.DISC))
    for _ in range(64):
        answer = wire.answer()
        start = answer.asked.offset
        assert images.golden[start : start + 20_000] == answer.data()
    assert wire.is_closed()


def test_32_mib_over_tls(forced: ServerProcess, certificates: Certificates, images: Images) -> None:
    wire = secure(forced, certificates.client_context())
    wire.use(Dialect.STRUCTURED)
    wire.go("big")
    assert images.golden_big[7 : 7 + 32 * MIB] == wire.read(7, 32 * MIB)


@pytest.mark.parametrize("length", [1, 4096, 100_000, 131_072, 3 * MIB])
def test_rejected_write_over_tls_stays_in_sync(
    forced: ServerProcess, certificates: Certificates, dialect: Dialect, length: int
) -> None:
    """nbdkit skips the payload on the raw socket, beneath TLS, and hangs."""
    wire = entered(forced, certificates, dialect)
    assert wire.call(Command.WRITE, 0, payload=bytes(length)).error == Errno.EPERM
    assert len(wire.read(0, 4096)) == 4096


def test_writes_over_tls(
    encrypted_scratch: tuple[ServerProcess, Path], certificates: Certificates, dialect: Dialect
) -> None:
    server, image = encrypted_scratch
    wire = entered(server, certificates, dialect)
    model = bytearray(image.read_bytes())
    rng = random.Random(2)
    for offset, length in ((0, 1), (100, 5000), (9999, 131_072), (MIB, 4 * MIB + 1)):
        data = rng.randbytes(length)
        wire.write(offset, data, CommandFlag.FUA)
        model[offset : offset + length] = data
        assert data == wire.read(offset, length)
    data = rng.randbytes(300_000)
    stream = wire.prepare(Command.WRITE, 0, payload=data) + data
    for at in range(0, len(stream), 7001):
        wire.send(stream[at : at + 7001])
    assert wire.answer().error == Errno.OK
    model[: len(data)] = data
    assert bytes(model) == image.read_bytes()


def test_hole_is_a_hole_over_tls(forced: ServerProcess, certificates: Certificates) -> None:
    wire = entered(forced, certificates, Dialect.EXTENDED)
    assert wire.call(Command.READ, MIB, MIB).kinds == [ReplyType.OFFSET_HOLE]


def test_disc_ends_with_close_notify(forced: ServerProcess, certificates: Certificates) -> None:
    wire = plain(forced)
    assert wire.verdict(Option.STARTTLS) == Reply.ACK
    sock = certificates.client_context().wrap_socket(
        wire.sock, server_hostname="localhost", suppress_ragged_eofs=False
    )
    wire.sock = sock
    wire.go("disk")
    wire.request(Command.DISC)
    assert sock.recv(1) == b""  # without close_notify: SSLEOFError
