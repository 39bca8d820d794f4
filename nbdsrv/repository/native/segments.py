"""The segments of the index as they lie in a store, read one behind the other. Blocking.

::

    list index/ ── each: get, checked ──> (key, Segment), or (key, why it cannot be read)

Every backup puts some, and a collector one in the place of all: between two of its runs there may
be hundreds, each a request where the store is distant.
"""

from collections.abc import Iterator

from nbdsrv.errors import DiskError
from nbdsrv.repository.native.abreast import objects_abreast
from nbdsrv.repository.native.hashing import Hashing
from nbdsrv.repository.native.index import MAX_SEGMENT, Segment
from nbdsrv.repository.native.layout import INDEX
from nbdsrv.store.store import Store, Stored

__all__ = ["read_segments"]


def read_segments(
    store: Store, repository: bytes, hashing: Hashing
) -> Iterator[tuple[str, Segment | DiskError]]:
    """All of them by key, in the order of the listing, or why one cannot be read.

    Args:
        store: of the repository.
        repository: its id.
        hashing: how it names things.

    Raises:
        StoreError: they cannot be listed.
    """

    def read(stored: Stored) -> Segment:
        data = store.get(stored.key, MAX_SEGMENT)
        return Segment.parse(stored.key, data, repository, hashing)

    objects = (stored for stored in store.list(INDEX) if stored.key.endswith(".ix"))
    for stored, found in objects_abreast(store, read, objects):
        yield stored.key, found
