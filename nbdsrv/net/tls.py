"""TLS for the server: X.509, version 1.2 or newer, optionally with client certificates."""

import ssl

from nbdsrv.errors import ConfigError

__all__ = ["server_context"]


def server_context(cert: str, key: str, ca: str | None = None) -> ssl.SSLContext:
    """The context connections are upgraded with.

    Args:
        cert: PEM file, the server's certificate and what leads from it to the root.
        key: PEM file, its private key, not encrypted.
        ca: PEM file; if given, clients must show a certificate signed by one of these.

    Raises:
        ConfigError: a file is missing, is not PEM, or key and certificate do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Sessions are long and clients few: nothing to gain from resuming, so no tickets to leak.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except ssl.SSLError as error:
        reason = (error.reason or "not a PEM certificate and key").replace("_", " ").lower()
        raise ConfigError(f"TLS certificate {cert} with key {key}: {reason}") from error
    except OSError as error:
        raise ConfigError(_unreadable(error, cert, key)) from error
    except _EncryptedKey as error:
        raise ConfigError(f"TLS key {key} is encrypted; give one that is not") from error
    if ca is not None:
        # Who comes is told by his certificate (``net.peer``); loading that takes longer than a
        # handshake, so not on the loop when the first client comes.
        import cryptography.x509  # noqa: F401

        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"TLS CA {ca}: {_reason(error)}") from error
    return context


class _EncryptedKey(Exception):
    pass


def _no_password() -> str:
    raise _EncryptedKey


def _unreadable(error: OSError, cert: str, key: str) -> str:
    for what, path in (("certificate", cert), ("key", key)):
        try:
            with open(path, "rb"):
                pass
        except OSError as cause:
            return f"TLS {what} {path}: {cause.strerror}"
    return f"TLS certificate {cert} with key {key}: {error.strerror}"


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a PEM certificate").replace("_", " ").lower()
    return error.strerror or str(error)
