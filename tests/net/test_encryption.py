"""TLS at the socket: modes, what STARTTLS forgets, certificates, transmission.

proto.md "TLS support"; CVE-2021-3716 (state kept across STARTTLS), the STARTTLS injection family;
reference rows "rejected WRITE over TLS" to "client cert missing".
"""

import ssl
import time
import warnings
from pathlib import Path

import pytest
from authority import Certificates
from encrypted import plain, secure, tls_options
from served_images import MIB, Images, Serve
from serving import ServerProcess
from wire import Wire, info_data, meta_data, option

from protocol import structs
from protocol.constants import Command, Dialect, Errno, Option, Reply

ALLOCATION = "base:allocation"


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
