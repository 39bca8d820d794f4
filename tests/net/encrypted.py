"""Clients on either side of STARTTLS."""

import ssl
from pathlib import Path

from authority import Certificates
from serving import ServerProcess
from wire import Wire


def tls_options(certificates: Certificates) -> list[str | Path]:
    """The server's pair."""
    pair = certificates.server
    return ["--tls-cert", pair.certificate, "--tls-key", pair.key]


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
