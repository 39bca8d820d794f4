"""A file of an archive, as every other Disk.

Which chunks are zeroes is told by their ids: borg's worker says which id so many zeroes have (it
depends on the repository's key). That is asked once for each size of which a chunk comes twice,
and for the commonest sizes; such chunks are holes, and nothing is read for them.

What lies in the file is served as it is: a qcow2 image in an archive is a disk of the qcow2's
bytes. ``facts`` say so (``content``).
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from nbdsrv.disk.workers import Workers
from nbdsrv.repository.borg.process import CHUNK_S, BorgProcesses
from nbdsrv.repository.pieces import ID_SIZE, Pieces
from nbdsrv.repository.pieces_disk import PiecesDisk
from nbdsrv.repository.repository import Point

__all__ = ["BorgDisk", "chunk_of", "zero_ids"]

MAX_SIZES = 16
"""Sizes of chunks of which the id of zeroes is asked for; hashing some MiB each."""


def chunk_of(borg: BorgProcesses, id_: bytes) -> bytes:
    """A chunk, proven by borg: its CRC, and its id by hash or authentication code. Blocking.

    Raises:
        CorruptImage: it is damaged or missing.
        DiskError: it cannot be read.
    """
    _, body = borg.call("get", CHUNK_S, id=id_.hex())
    return body


def zero_ids(borg: BorgProcesses, pieces: Pieces) -> frozenset[bytes]:
    """The ids of chunks of zeroes, of the sizes that matter. Blocking.

    Raises:
        DiskError: borg cannot be asked.
    """
    sizes: Counter[int] = Counter()
    repeated: Counter[int] = Counter()
    last = b""
    for index in range(len(pieces)):
        id_ = pieces.id(index)
        size = pieces.length(index)
        sizes[size] += 1
        if id_ == last:
            repeated[size] += 1
        last = id_
    wanted = [size for size, _ in repeated.most_common(MAX_SIZES // 2)]
    wanted += [size for size, _ in sizes.most_common(MAX_SIZES // 2) if size not in repeated]
    wanted = [size for size in wanted if size > 0]
    if not wanted:
        return frozenset()
    _, body = borg.call("zeroes", sizes=wanted)
    return frozenset(body[at : at + ID_SIZE] for at in range(0, len(body), ID_SIZE))


class BorgDisk(PiecesDisk):
    """A regular file of an archive, read-only."""

    format = "borg"

    def __init__(
        self,
        workers: Workers,
        borg: BorgProcesses,
        point: Point,
        path: str,
        pieces: Pieces,
        zeroes: frozenset[bytes],
        content: str,
        others: Mapping[str, Callable[[], Pieces]],
        release: Callable[[], Awaitable[None]],
    ) -> None:
        """Use ``BorgRepository.open_disk``."""
        super().__init__(workers, borg.name, point, path, pieces, content, others, release)
        self._borg = borg
        self._zeroes = zeroes

    def _own_facts(self) -> Mapping[str, object]:
        facts = self.point.facts
        return {
            "archive": facts.get("archive"),
            "comment": facts.get("comment"),
            "chunks": len(self.pieces),
            "encryption": facts.get("encryption"),
            "borg": self._borg.facts.get("borg"),
        }

    def _piece(self, id_: bytes) -> bytes:
        return chunk_of(self._borg, id_)

    def _is_zero(self, id_: bytes, size: int, *, repeated: bool) -> bool:
        return id_ in self._zeroes
