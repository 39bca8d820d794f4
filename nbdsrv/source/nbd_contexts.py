"""Which meta contexts another server has: a proxy offers them all, without knowing what they mean.

::

    LIST_META_CONTEXT ──> base:allocation  qemu:dirty-bitmap:b0  qemu:allocation-depth ...
                            always asked for      └── passed on, MAX_PASSED at most
"""

from nbdsrv.disk.workers import Workers
from nbdsrv.net.client_connect import Patience, Remote, contexts_of
from nbdsrv.net.client_tls import Credentials
from nbdsrv.source.nbd_address import find_address
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH

__all__ = ["offered_contexts"]

MAX_PASSED = 16
"""Contexts asked for on each connection: a server may answer for all of them whenever it is asked
for one, and a repository has one for each of its points."""


async def offered_contexts(
    text: str,
    workers: Workers,
    *,
    credentials: Credentials | None = None,
    patience: Patience | None = None,
) -> tuple[str, ...]:
    """The contexts to ask for when the export of an NBD URI is passed on.

    Raises:
        ConfigError: not a URI that can be used.
        DiskError: there is no server.
    """
    uri, context, _ = await find_address(text, workers, credentials)
    remote = Remote(uri, context, (), patience or Patience())
    found = [ALLOCATION, ALLOCATION_DEPTH]
    found += [name for name in await contexts_of(remote) if name not in found]
    return tuple(found[: 2 + MAX_PASSED])
