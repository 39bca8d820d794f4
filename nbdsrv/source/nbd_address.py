"""An NBD URI as a user writes it, and what we show the server it leads to.

::

    nbds://host/export ── parse ──> Uri
    NBDSRV_TLS_CERTIFICATES=DIR ──> ca-cert.pem, client-cert.pem, client-key.pem

Rule: a URI does not name files. It may come from elsewhere (a hypervisor, a configuration that is
not ours), and must not choose by which of our files we prove who we are.
"""

import os
import ssl
from typing import NamedTuple

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError
from nbdsrv.net.client_tls import NO_CREDENTIALS, Credentials, client_context
from protocol.uri import Uri, UriError, parse

__all__ = ["Address", "find_address"]

CERTIFICATES = "NBDSRV_TLS_CERTIFICATES"


class Address(NamedTuple):
    """Where to, and with what.

    Attributes:
        context: for TLS; None where there is to be none.
        credentials: from which it was made.
    """

    uri: Uri
    context: ssl.SSLContext | None
    credentials: Credentials


async def find_address(
    text: str, workers: Workers, credentials: Credentials | None = None
) -> Address:
    """Understand an NBD URI, and read certificates if it is to be TLS.

    Args:
        text: the URI.
        workers: for reading files.
        credentials: None for those in the directory that ``NBDSRV_TLS_CERTIFICATES`` names, or, if
            it names none, the system's authorities.

    Raises:
        ConfigError: not a URI that can be used, or a file that cannot.
    """
    try:
        uri = parse(text)
    except UriError as error:
        hint = f"; set {CERTIFICATES}" if "tls-certificates=" in text else ""
        raise ConfigError(f"{text}: {error}{hint}") from error
    if not uri.tls:
        return Address(uri, None, credentials or NO_CREDENTIALS)
    if credentials is None:
        credentials = await workers.look_up(_usual)
    return Address(uri, await workers.look_up(client_context, uri, credentials), credentials)


def _usual() -> Credentials:
    directory = os.environ.get(CERTIFICATES, "")
    if not directory:
        return NO_CREDENTIALS
    try:
        return Credentials.in_directory(directory)
    except ConfigError as error:
        raise ConfigError(f"{CERTIFICATES}: {error}") from error
