"""Verification of indexes and the chunks they refer to, step by step.

::

    structure       chunks follow each other, and every one is in a store
    packs, chunks   + every chunk unpacks, and its content has its id

What lies in a store has no checksum but the id of its content, so that the last two are the same.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.casync.disk import Zeroes
from nbdsrv.repository.casync.index import BlobIndex
from nbdsrv.repository.casync.listing import Entry, Row
from nbdsrv.repository.casync.stores import STORE, ChunkStores, Place
from nbdsrv.repository.chunk_sweep import DiskUse, Ref, Sweep
from nbdsrv.repository.damage import Check, Finding, Hurt
from nbdsrv.store.tree import Tree

__all__ = ["verify"]

BATCH = 4096
"""Items handed on at a time."""
UNPROVEN = "an index carries no checksum: an id in it that was replaced by that of another chunk of"
UNPROVEN += " the same length cannot be seen"
ADVICE = "fetch the chunk from another store, or restore another point"


def verify(
    tree: Tree,
    rows: Sequence[Row],
    stores_of: Callable[[str], Sequence[Place]],
    level: str,
    disk: str | None,
    advance: Callable[[int, int], None],
) -> Generator[None, None, Check]:
    """Verify some points. In threads, step by step.

    Args:
        tree: where the indexes lie.
        rows: the points.
        stores_of: where the chunks of an index are; blocking.
        level: one of ``repository.LEVELS``.
        disk: only disks of that name.
        advance: as in ``Repository.verify``.
    """
    check = Check(level)
    uses: dict[tuple[Place, ...], dict[str, list[DiskUse]]] = {}
    for row in rows:
        check.points += 1
        point = f"{row.point.group}/{row.point.id}"
        for name, entry in row.entries.items():
            if disk not in {None, name}:
                continue
            check.disks += 1
            check.objects += 1
            digest = yield from _walk(tree, check, point, name, entry)
            if digest:
                use = DiskUse(point, name, partial(_refs, tree, entry))
                places = tuple(stores_of(entry.path))
                uses.setdefault(places, {}).setdefault(digest, []).append(use)
    for places, by_digest in uses.items():
        for digest, those in by_digest.items():
            yield from _sweep(check, places, digest, those, advance)
    check.unchecked.append(UNPROVEN)
    if level == "structure":
        check.unchecked.append("no chunk was read: --level chunks checks their content")
    return check


def _walk(
    tree: Tree, check: Check, point: str, name: str, entry: Entry
) -> Generator[None, None, str]:
    """Go through an index; what its ids are made with, or "" if it cannot be used."""
    size = entry.facts.size if entry.facts is not None else 0
    try:
        index = BlobIndex(tree, entry.path, entry.length)
        try:
            zero = Zeroes(index).id
            items = index.items(0, index.size, zero) if index.count else ()
            for number, _ in enumerate(items):
                if not number % BATCH:
                    yield
            check.read_bytes += entry.length
            return index.digest
        finally:
            index.close()
    except CorruptImage as error:
        hurt = Hurt(point, name, [(0, size)] if size else [], size)
        advice = "restore another point"
        check.findings.append(Finding(entry.path, None, str(error), [hurt], advice=advice))
    except DiskError as error:
        check.unread.append(str(error))
    return ""


def _sweep(
    check: Check,
    places: tuple[Place, ...],
    digest: str,
    uses: Sequence[DiskUse],
    advance: Callable[[int, int], None],
) -> Iterator[None]:
    stores = ChunkStores(places, digest)
    if not places:
        text = f"{uses[0].point} {uses[0].disk}: there is no chunk store beside it"
        check.unread.append(f"{text}; name it in {STORE}")
        return
    examine = _find if check.level == "structure" else _read
    sweep = Sweep(
        check,
        uses,
        partial(examine, stores),
        lambda id_: places[0].file(id_, ".cacnk"),
        places[0].path or places[0].name,
        ADVICE,
        advance,
    )
    yield from sweep.run()


def _find(stores: ChunkStores, id_: bytes, length: int) -> int:
    del length
    return stores.find(id_)


def _read(stores: ChunkStores, id_: bytes, length: int) -> int:
    return stores.read(id_, length)[1]


def _refs(tree: Tree, entry: Entry) -> Iterator[Sequence[Ref]]:
    """What an index refers to, but for zeroes."""
    index = BlobIndex(tree, entry.path, entry.length)
    try:
        if not index.count:
            return
        zeroes = Zeroes(index)
        batch: list[Ref] = []
        for number, item in enumerate(index.items(0, index.size, zeroes.id)):
            _, start, end, id_ = item
            if not zeroes.has(item):
                batch.append((start, end - start, id_))
            if not number % BATCH:
                yield batch
                batch = []
        yield batch
    finally:
        index.close()
