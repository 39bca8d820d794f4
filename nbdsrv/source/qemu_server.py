"""The NBD server inside QEMU: there is one at most, ours or somebody else's.

::

    ?nbd=PLACE        somebody's, running already: exports are added to it, it is left running
    otherwise         ours, on a Unix socket in the private directory

QEMU does not tell where its server listens. Ours is known by its socket.
"""

from contextlib import suppress

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.qemu_address import Place
from nbdsrv.source.qemu_graph import listens
from nbdsrv.source.qemu_scratch import Scratch
from nbdsrv.source.qmp import QmpClient, QmpRefused

__all__ = ["start_server", "stop_server"]


async def start_server(client: QmpClient, scratch: Scratch, nbd: Place | None) -> Place:
    """Where exports will be.

    Raises:
        SourceError: another server runs, and it was not said where.
    """
    if nbd is not None:
        return nbd
    address = {"type": "unix", "data": {"path": scratch.socket}}
    # QEMU's own limit, 100, is soon reached with many disks; nobody but us gets to the socket.
    arguments = {"addr": address, "max-connections": 0}
    try:
        await client.execute("nbd-server-start", arguments)
    except QmpRefused as error:
        if not await listens(scratch.socket):
            hint = "if QEMU serves NBD already, say where: ?nbd=SOCKET or ?nbd=HOST:PORT"
            raise SourceError(f"{error}; {hint}") from error
    scratch.protect_socket()
    return Place(path=scratch.socket)


async def stop_server(client: QmpClient, scratch: Scratch, *, started: bool = False) -> bool:
    """Stop ours, unless others have begun to use it; was it stopped?

    Args:
        client: the monitor.
        scratch: with the socket; if somebody listens there, it is ours.
        started: it is in any case, for we have started it just now.

    Raises:
        SourceError: QEMU is gone.
    """
    if not (started or await listens(scratch.socket)) or await client.execute(
        "query-block-exports"
    ):
        return False
    with suppress(QmpRefused):
        await client.execute("nbd-server-stop")
        return True
    return False
