"""Certificates for the TLS tests, made anew for each run with elliptic curves.

::

    Authority "ours" -- signs --> server (localhost, 127.0.0.1, ::1)   client
    Authority "other" - signs --> stranger: a client nobody here trusts
"""

import datetime as dt
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority that signs servers and clients into ``directory``."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        certificate = (
            self._begin(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = self._store(f"{name}-ca.pem", certificate)

    def server(self, name: str = "server") -> Pair:
        """A server that may call itself localhost, 127.0.0.1 and ::1."""
        names = x509.SubjectAlternativeName(
            [
                x509.DNSName("localhost"),
                x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
                x509.IPAddress(ipaddress.ip_address("::1")),
            ]
        )
        return self._sign(name, ExtendedKeyUsageOID.SERVER_AUTH, names)

    def client(self, name: str = "client") -> Pair:
        """A client."""
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        return self._sign(name, ExtendedKeyUsageOID.CLIENT_AUTH, names)

    def _sign(
        self, name: str, purpose: x509.ObjectIdentifier, names: x509.SubjectAlternativeName
    ) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            self._begin(_name(name), key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(names, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        path = self._directory / f"{name}-key.pem"
        pem = serialization.Encoding.PEM
        form = serialization.PrivateFormat.PKCS8
        path.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
        return Pair(self._store(f"{name}-cert.pem", certificate), path)

    def _begin(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey
    ) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(issuer_key, False)
        )

    def _store(self, name: str, certificate: x509.Certificate) -> Path:
        path = self._directory / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


@dataclass(frozen=True, slots=True)
class Certificates:
    """What TLS tests need.

    Attributes:
        ca: our authority's certificate, PEM.
        stranger: a client pair signed by an authority that our server does not trust.
    """

    ca: Path
    server: Pair
    client: Pair
    stranger: Pair

    def client_context(self, pair: Pair | None = None) -> ssl.SSLContext:
        """A client that verifies our server and shows ``pair``, if any."""
        context = ssl.create_default_context(cafile=str(self.ca))
        if pair is not None:
            context.load_cert_chain(pair.certificate, pair.key)
        return context


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
