"""TLS for our side of a connection to somebody else's server.

::

    Credentials(ca, cert, key)      which files; the system's authorities where there is no ca
    client_context(uri, ...)        what the URI demands of the server's certificate
    start_tls(channel, ...)         OpenSSL on the socket itself, as in ``channel``

Rule: a certificate is checked, and the name in it, unless the URI says tls-verify-peer=0.
"""

import os
import ssl
from dataclasses import dataclass

from nbdsrv.errors import ConfigError
from nbdsrv.net.channel import PlainChannel, TlsChannel, shake_hands
from protocol.uri import Uri

__all__ = ["Credentials", "client_context", "start_tls"]

CA_FILE, CERT_FILE, KEY_FILE = "ca-cert.pem", "client-cert.pem", "client-key.pem"
"""What libnbd and QEMU call them in a directory of certificates."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM files.

    Attributes:
        ca: authorities that may have signed the server's certificate; None for the system's.
        cert: our certificate, for servers that want one.
        key: its private key, not encrypted.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None

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


def client_context(uri: Uri, credentials: Credentials) -> ssl.SSLContext:
    """What a connection to ``uri`` is upgraded with. Blocking: reads files.

    Raises:
        ConfigError: a file is missing or is not what it should be, or the URI wants a kind of
            TLS there is none of here.
    """
    if uri.tls_type not in {None, "x509"}:
        raise ConfigError(f"{uri.scheme}: tls-type={uri.tls_type} is not supported, only x509 is")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if uri.tls_verify_peer is False:
        context.check_hostname = False
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


async def start_tls(channel: PlainChannel, context: ssl.SSLContext, uri: Uri) -> TlsChannel:
    """The client's side of a TLS handshake; the plain channel is used up.

    The certificate must be for ``tls-hostname``, else the host; for a Unix socket localhost.

    Raises:
        ConnectionError: it failed, for instance because the certificate is not to be trusted.

    Cancellation (the connect deadline) closes the socket.
    """
    sock = context.wrap_socket(
        channel.sock,
        server_hostname=uri.tls_hostname or uri.host or "localhost",
        do_handshake_on_connect=False,
        suppress_ragged_eofs=True,
    )
    try:
        return await shake_hands(sock)
    except ssl.SSLCertVerificationError as error:
        sock.close()
        raise ConnectionError(f"TLS: the certificate: {error.verify_message}") from error
    except (OSError, ValueError) as error:  # ValueError: a host no certificate can name
        sock.close()
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(f"TLS handshake failed: {reason}") from error
    except BaseException:
        sock.close()
        raise
