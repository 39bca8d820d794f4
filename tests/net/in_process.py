"""A real ``Server`` in the test's own event loop, for what only shows from inside.

Clients live in threads (``asyncio.to_thread``); the sockets between them are real.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from authority import Certificates

from nbdsrv.disk.workers import Workers
from nbdsrv.export.exports import Catalogue, Export
from nbdsrv.export.grammar import parse_source
from nbdsrv.export.opener import open_source
from nbdsrv.net.listener import listen
from nbdsrv.net.server import Limits, Server
from nbdsrv.net.tls import server_context
from protocol.handshake.events import TlsMode

CLOSE_S = 10.0


@asynccontextmanager
async def running(
    socket: Path,
    image: Path,
    *,
    writable: bool = False,
    limits: Limits | None = None,
    certificates: Certificates | None = None,
    stop: bool = True,
) -> AsyncIterator[Server]:
    """Serve ``image`` as ``disk`` on a Unix socket; with certificates, TLS is required.

    ``stop=False``: the caller has stopped the server when it leaves.
    """
    workers = Workers()
    opener = partial(open_source, parse_source(str(image)), workers, writable=writable)
    catalogue = Catalogue()
    catalogue.add(Export("disk", opener))
    mode, context = TlsMode.OFF, None
    if certificates is not None:
        mode, context = TlsMode.REQUIRED, _context(certificates)
    server = Server(catalogue, workers, limits=limits, tls=mode, context=context)
    server.listen(listen(f"unix:{socket}"))
    try:
        yield server
    finally:
        if stop:
            async with asyncio.timeout(CLOSE_S):
                await server.stop()
        workers.close()


def _context(certificates: Certificates) -> ssl.SSLContext:
    pair = certificates.server
    return server_context(str(pair.certificate), str(pair.key))
