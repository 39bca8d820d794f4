"""Xen Orchestra's list of a VM's points, which it believes as long as the numbers agree.

::

    cache.json.gz   {"/xo-vm-backups/<vm>/<stamp>.json": {..., "_filename": ..., "id": ...}, ...}

    removed ── the point appears ── written anew        a crash in between: there is none, and
                                                        Xen Orchestra makes it when it is asked

It is made from the points that are there, not from itself: it may lie.
"""

import logging
import zlib
from typing import Any

import msgspec
from isal import igzip

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.xo.layout import POINT, VM_BACKUPS
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.repository.xo.writer_place import Place

__all__ = ["drop_cache", "is_immutable", "write_cache"]

log = logging.getLogger(__name__)

CACHE = "cache.json.gz"
IMMUTABILITY = "immutability.json"
MAX_CACHE = 16 << 20
"""Bytes of all points' metadata together; without a cache Xen Orchestra reads them itself."""


def is_immutable(remote: Remote) -> bool:
    """Is it a remote whose files cannot be replaced? Xen Orchestra keeps no caches there."""
    return remote.tree.find(IMMUTABILITY) is not None


def drop_cache(place: Place, vm: str) -> None:
    """Before a point appears or goes. Raises StoreError."""
    directory = f"{VM_BACKUPS}/{vm}"
    place.remove(f"{directory}/{CACHE}")
    place.settle([directory])


def write_cache(place: Place, remote: Remote, vm: str) -> None:
    """After that. What goes wrong is no harm: there is none then."""
    directory = f"{VM_BACKUPS}/{vm}"
    try:
        entries: dict[str, Any] = {}
        total = 0
        for node in remote.tree.entries(directory):
            if not node.name.endswith(POINT) or node.directory:
                continue
            path = f"/{directory}/{node.name}"
            try:
                raw = remote.read(path[1:], MAX_CACHE)
                total += len(raw)
                if total > MAX_CACHE:
                    return
                entry = msgspec.json.decode(raw, type=dict[str, Any])
            except (CorruptImage, msgspec.MsgspecError, RecursionError):
                continue  # Xen Orchestra leaves those out, too
            entries[path] = {**entry, "_filename": path, "id": path}
        packed = igzip.compress(msgspec.json.encode(entries), 1)
        place.publish(f"{directory}/{CACHE}", remote.sealing.seal(packed))
    except (DiskError, zlib.error) as error:
        log.warning("xo.no_cache vm=%s reason=%s", vm, error)
