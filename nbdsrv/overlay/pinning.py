"""The point an overlay stands on is pinned in its repository, so that ``prune`` keeps it.

::

    first write ── pin ── overlay.json         opened again: put again, if it is not there
    overlay drop ── overlay gone ── pin gone

Only our own repositories know pins. In one that cannot be written there is none, and the log says
so: an overlay is not refused for it.
"""

import contextlib
import logging
import socket
from collections.abc import Iterator

from nbdsrv.errors import NbdsrvError
from nbdsrv.export.grammar import Kind, parse_source
from nbdsrv.overlay.description import Description
from nbdsrv.repository.native.pins import pin_key, put_pin
from nbdsrv.repository.opening import NATIVE
from nbdsrv.store.opening import open_store
from nbdsrv.store.store import Store

__all__ = ["pin", "unpin"]

log = logging.getLogger(__name__)


def pin(found: Description, path: str) -> None:
    """Pin what the overlay at ``path`` stands on, if that can be. Blocking; never fails."""
    point = found.base.get("point") or found.base.get("of_point")
    try:
        with _store(found) as store:
            if store is not None:
                name = f"{found.base.get('group')}/{point}"
                put_pin(store, found.id, name, socket.gethostname(), path)
    except NbdsrvError as error:
        log.warning(
            "overlay.unpinned overlay=%s reason=%s; keep %s yourself", path, error, found.selector
        )


def unpin(found: Description) -> None:
    """The overlay is no more: take its pin away. Blocking.

    Raises:
        ConfigError, StoreError: it may be there still.
    """
    with _store(found) as store:
        if store is not None:
            store.delete(pin_key(found.id))


@contextlib.contextmanager
def _store(found: Description) -> Iterator[Store | None]:
    """Of the repository of the overlay's point; None if it is over something else."""
    if not found.selector:
        yield None
        return
    source = parse_source(found.source)
    if source.kind is not Kind.REPOSITORY or source.scheme not in NATIVE:
        yield None
        return
    store = open_store(source.scheme, source.location)
    try:
        yield store
    finally:
        store.close()
