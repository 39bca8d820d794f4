"""A file of a snapshot, as every other Disk.

A blob of zeroes is known by its id, which is the SHA-256 of so many zeroes: it is a hole, and
nothing is read for it. That is asked of blobs that come twice, of those that take next to no room
in their pack, and of the sizes in which restic cuts long stretches of zeroes.

What lies in the file is served as it is: a qcow2 image in a snapshot is a disk of the qcow2's
bytes. ``facts`` say so (``content``).
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache

from nbdsrv.disk.workers import Workers
from nbdsrv.repository.pieces import Pieces
from nbdsrv.repository.pieces_disk import PiecesDisk
from nbdsrv.repository.repository import Point
from nbdsrv.repository.restic.blobs import BlobStore
from nbdsrv.repository.restic.sealed import OVERHEAD

__all__ = ["ResticDisk", "is_zero_blob"]

CUTS = frozenset({512 << 10, 8 << 20})
"""restic's chunker cuts zeroes at its smallest size; others' may at the largest."""
MAX_ZEROES = 16 << 20
"""Bytes of zeroes that are hashed to know their id."""
SPARSE = 64
"""A blob that takes this part of its size at most may be zeroes."""


@lru_cache(maxsize=4096)
def _zero_id(size: int) -> bytes:
    return hashlib.sha256(bytes(size)).digest()


def is_zero_blob(blobs: BlobStore, id_: bytes, size: int, *, repeated: bool) -> bool:
    """Is it the blob of so many zeroes? Nothing is read to find out."""
    if size > MAX_ZEROES:
        return False
    if not repeated and size not in CUTS:
        place = next(iter(blobs.places(id_)), None)
        if place is None or place.length - OVERHEAD > max(size // SPARSE, OVERHEAD):
            return False
    return _zero_id(size) == id_


class ResticDisk(PiecesDisk):
    """A regular file of a snapshot, read-only."""

    format = "restic"

    def __init__(
        self,
        workers: Workers,
        blobs: BlobStore,
        point: Point,
        path: str,
        pieces: Pieces,
        content: str,
        others: Mapping[str, Callable[[], Pieces]],
        release: Callable[[], Awaitable[None]],
    ) -> None:
        """Use ``ResticRepository.open_disk``."""
        super().__init__(workers, blobs.tree.name, point, path, pieces, content, others, release)
        self._blobs = blobs

    def _own_facts(self) -> Mapping[str, object]:
        facts = self.point.facts
        return {
            "snapshot": facts.get("snapshot"),
            "tags": facts.get("tags"),
            "blobs": len(self.pieces),
        }

    def _piece(self, id_: bytes) -> bytes:
        return self._blobs.blob(id_)

    def _is_zero(self, id_: bytes, size: int, *, repeated: bool) -> bool:
        return is_zero_blob(self._blobs, id_, size, repeated=repeated)
