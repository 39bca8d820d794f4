"""The server's TLS context: real handshakes in memory, and one line for every bad file."""

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from authority import Certificates, Pair
from cryptography.hazmat.primitives import serialization

from nbdsrv.errors import ConfigError
from nbdsrv.net.tls import server_context


def context(certificates: Certificates, ca: Path | None = None) -> ssl.SSLContext:
    server = certificates.server
    return server_context(str(server.certificate), str(server.key), str(ca) if ca else None)


def client_context(certificates: Certificates, pair: Pair | None = None) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_verify_locations(certificates.ca)
    if pair is not None:
        made.load_cert_chain(pair.certificate, pair.key)
    return made


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLObject:
    """Both sides to the end, and a byte across; the server's side, or the first ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = server.wrap_bio(to_server, to_client, server_side=True)
    other = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    steps: list[Callable[[], object]] = [
        other.do_handshake,
        one.do_handshake,
        lambda: one.write(b"!"),
        lambda: other.read(1),
    ]
    for _ in range(10):
        for step in list(steps):
            try:
                step()
            except ssl.SSLWantReadError:
                break
            steps.remove(step)
        try:
            one.do_handshake()
        except ssl.SSLWantReadError:
            continue
        if not steps:
            return one
    raise AssertionError(f"the handshake goes on for ever, {len(steps)} steps are left")


def test_the_newest_version_both_have(certificates: Certificates) -> None:
    assert shake_hands(context(certificates), client_context(certificates)).version() == "TLSv1.3"


def test_tls_1_2_is_still_spoken(certificates: Certificates) -> None:
    client = client_context(certificates)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert shake_hands(context(certificates), client).version() == "TLSv1.2"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_older_versions_are_not(certificates: Certificates, version: ssl.TLSVersion) -> None:
    client = client_context(certificates)
    client.set_ciphers("ALL:@SECLEVEL=0")
    client.minimum_version = client.maximum_version = version
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol|version|alert"):
        shake_hands(context(certificates), client)


def test_without_a_ca_clients_need_no_certificate(certificates: Certificates) -> None:
    assert shake_hands(context(certificates), client_context(certificates)).getpeercert() is None


def test_with_a_ca_clients_show_one_signed_by_it(certificates: Certificates) -> None:
    server = context(certificates, certificates.ca)
    found = shake_hands(server, client_context(certificates, certificates.client)).getpeercert()
    assert ("DNS", "client") in found["subjectAltName"]  # type: ignore[index]


@pytest.mark.parametrize("who", ["nobody", "stranger"])
def test_with_a_ca_others_are_turned_away(certificates: Certificates, who: str) -> None:
    pair = certificates.stranger if who == "stranger" else None
    with pytest.raises(ssl.SSLError):
        shake_hands(context(certificates, certificates.ca), client_context(certificates, pair))


def refused(certificate: Path, key: Path, ca: Path | None = None) -> str:
    with pytest.raises(ConfigError) as raised:
        server_context(str(certificate), str(key), str(ca) if ca else None)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_key_of_another_certificate(certificates: Certificates) -> None:
    said = refused(certificates.server.certificate, certificates.client.key)
    assert "mismatch" in said
    assert str(certificates.client.key) in said


def test_files_that_are_missing_or_no_files(certificates: Certificates, tmp_path: Path) -> None:
    certificate, key = certificates.server.certificate, certificates.server.key
    for missing in (tmp_path / "nothing", tmp_path):
        assert f"TLS certificate {missing}" in refused(missing, key)
        assert f"TLS key {missing}" in refused(certificate, missing)
        assert f"TLS CA {missing}" in refused(certificate, key, missing)


@pytest.mark.parametrize("text", ["", "garbage\n", "-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_files_that_are_not_pem(certificates: Certificates, tmp_path: Path, text: str) -> None:
    certificate, key = certificates.server.certificate, certificates.server.key
    (tmp_path / "bad.pem").write_text(text)
    for said in (
        refused(tmp_path / "bad.pem", key),
        refused(certificate, tmp_path / "bad.pem"),
        refused(certificate, key, tmp_path / "bad.pem"),
    ):
        assert str(tmp_path / "bad.pem") in said
    assert "encrypted" not in said


def test_an_encrypted_key_is_not_asked_about(certificates: Certificates, tmp_path: Path) -> None:
    key = serialization.load_pem_private_key(certificates.server.key.read_bytes(), None)
    path = tmp_path / "encrypted.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    assert f"{path} is encrypted" in refused(certificates.server.certificate, path)
