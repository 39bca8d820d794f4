"""TLS for our side of a connection to somebody else's server.

::

    Credentials(ca, cert, key)      which files; the system's authorities where there is no ca
    Credentials(exact=PEM)          this certificate and no other, as XAPI hands it out
    client_context(uri, ...)        what the URI demands of the server's certificate
    start_tls(channel, ...)         OpenSSL on the socket itself, as in ``channel``

Rule: a certificate is checked, and the name in it, unless the URI says tls-verify-peer=0. One that
is known exactly needs no further proof: neither an authority, nor a name, nor a date.
"""

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from nbdsrv.errors import ConfigError
from nbdsrv.net.channel import PlainChannel, TlsChannel, shake_hands
from protocol.uri import Uri

__all__ = ["NO_CREDENTIALS", "Credentials", "client_context", "start_tls"]

CA_FILE, CERT_FILE, KEY_FILE = "ca-cert.pem", "client-cert.pem", "client-key.pem"
"""What libnbd and QEMU call them in a directory of certificates."""

UNKNOWN_ISSUER = frozenset({18, 19, 20, 21})
"""OpenSSL's X509_V_ERR_*: signed by itself, at the end of its chain too, or by who is not here."""

NAMES = ("ca", "cert", "key", "exact", "hostname")
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM files, and what is known about the server.

    Attributes:
        ca: authorities that may have signed the server's certificate; None for the system's.
        cert: our certificate, for servers that want one.
        key: its private key, not encrypted.
        exact: PEM text, not a file: the server's certificate is one of these, byte by byte.
        hostname: the name its certificate must bear; None for the URI's. Sent as SNI too.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    exact: str | None = None
    hostname: str | None = None

    @classmethod
    def of(cls, tls: Mapping[str, str]) -> "Credentials":
        """From a hypervisor's (``FrozenDisk.tls``): the attributes by their names, none if empty.

        Raises:
            ConfigError: an unknown name.
        """
        if unknown := sorted(tls.keys() - set(NAMES)):
            raise ConfigError(f"TLS: {', '.join(unknown)} is none of {', '.join(NAMES)}")
        return cls(**{name: text for name, text in tls.items() if text})

    @classmethod
    def in_directory(cls, path: str) -> "Credentials":
        """``ca-cert.pem`` and, if they are there, ``client-cert.pem`` and ``client-key.pem``.

        Raises:
            ConfigError: there is no ca-cert.pem.
        """
        ca, cert, key = (os.path.join(path, name) for name in (CA_FILE, CERT_FILE, KEY_FILE))
        if not os.path.exists(ca):
            raise ConfigError(f"TLS certificates {path}: there is no {CA_FILE}")
        if not os.path.exists(cert):
            return cls(ca)
        return cls(ca, cert, key)


NO_CREDENTIALS = Credentials()
"""The system's authorities, and nothing of ours."""


def client_context(uri: Uri, credentials: Credentials) -> ssl.SSLContext:
    """What a connection to ``uri`` is upgraded with. Blocking: reads files.

    Raises:
        ConfigError: a file is missing or is not what it should be, or the URI wants a kind of
            TLS there is none of here.
    """
    if uri.tls_type not in {None, "x509"}:
        raise ConfigError(f"{uri.scheme}: tls-type={uri.tls_type} is not supported, only x509 is")
    if credentials.exact is not None:
        known_certificates(credentials.exact)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if uri.tls_verify_peer is False or credentials.exact is not None:
        context.check_hostname = False  # the certificate itself is compared in ``start_tls``
        context.verify_mode = ssl.CERT_NONE
    elif credentials.ca is None:
        context.load_default_certs()
    else:
        _load_authorities(context, credentials.ca)
    if credentials.cert is not None:
        _load_pair(context, credentials.cert, credentials.key or credentials.cert)
    return context


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as error:  # SSLError is one
        raise ConfigError(f"TLS CA {path}: {_reason(error)}") from error


def _load_pair(context: ssl.SSLContext, cert: str, key: str) -> None:
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except OSError as error:
        raise ConfigError(f"TLS certificate {cert} with key {key}: {_reason(error)}") from error


def _no_password() -> str:
    raise ConfigError("the TLS key is encrypted; give one that is not")


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a PEM file").replace("_", " ").lower()
    return error.strerror or str(error)


def known_certificates(pem: str) -> frozenset[bytes]:
    """The certificates in a PEM text, as DER.

    Raises:
        ConfigError: there is none, or one is damaged.
    """
    try:
        found = frozenset(ssl.PEM_cert_to_DER_cert(each) for each in _PEM.findall(pem))
    except ValueError as error:
        raise ConfigError(f"TLS: the server's certificate as given: {error}") from error
    if not found:
        raise ConfigError("TLS: the server's certificate as given is not PEM")
    return found


async def start_tls(
    channel: PlainChannel,
    context: ssl.SSLContext,
    uri: Uri,
    credentials: Credentials = NO_CREDENTIALS,
) -> TlsChannel:
    """The client's side of a TLS handshake; the plain channel is used up.

    The certificate must be for ``Credentials.hostname`` or ``tls-hostname``, else the host; for
    a Unix socket localhost.

    Raises:
        ConnectionError: it failed, for instance because the certificate is not to be trusted.

    Cancellation (the connect deadline) closes the socket.
    """
    name = credentials.hostname or uri.tls_hostname or uri.host or "localhost"
    try:
        sock = context.wrap_socket(
            channel.sock,
            server_hostname=name,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=True,
        )
    except ValueError as error:
        channel.close()
        raise ConnectionError(f"TLS: no certificate can name {name}") from error
    try:
        secured = await shake_hands(sock)
        if credentials.exact is not None:
            _check_exact(sock, credentials.exact)
        return secured
    except ssl.SSLCertVerificationError as error:
        sock.close()
        hint = ""
        if credentials.ca is None and error.verify_code in UNKNOWN_ISSUER:
            hint = "; NBDSRV_TLS_CERTIFICATES names a directory with the CA's"
        raise ConnectionError(f"TLS: the certificate: {error.verify_message}{hint}") from error
    except (OSError, ValueError) as error:
        sock.close()
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(f"TLS handshake failed: {reason}") from error
    except BaseException:
        sock.close()
        raise


def _check_exact(sock: ssl.SSLSocket, pem: str) -> None:
    if sock.getpeercert(binary_form=True) not in known_certificates(pem):
        raise ConnectionError("the server's certificate is not the one it should be")
