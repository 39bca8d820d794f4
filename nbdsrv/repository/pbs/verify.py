"""Verification of a datastore, step by step.

::

    structure   manifests, signatures, indexes (hashed); every chunk is there
    packs       + CRC-32 of every chunk, SHA-256 of every blob          takes no key
    chunks      + every chunk opens, and its content has its digest     encrypted: takes the key

Chunks that many snapshots share are looked at once. Chunks nobody refers to are the
server's garbage and not looked at.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from enum import Enum, auto
from functools import partial

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.chunk_sweep import DiskUse, Ref, Sweep
from nbdsrv.repository.damage import Check, Finding, Hurt, Note
from nbdsrv.repository.pbs.blob import check_blob
from nbdsrv.repository.pbs.chunks import Chunks, chunk_path, zero_digest
from nbdsrv.repository.pbs.index import FixedIndex, open_index, others_than
from nbdsrv.repository.pbs.keys import CryptKey
from nbdsrv.repository.pbs.layout import CHUNKS, MANIFEST
from nbdsrv.repository.pbs.listing import Listing, Row
from nbdsrv.repository.pbs.manifest import Archive
from nbdsrv.repository.pbs.structs import DIGEST, MAX_BLOB
from nbdsrv.store.store import ObjectMissing
from nbdsrv.store.tree import Tree

__all__ = ["verify"]


class Without(Enum):
    """What a disk is encrypted with, where that is none of our keys."""

    KEY = auto()


Key = CryptKey | Without | None
"""None: of what is not encrypted."""
BATCH = 4096
"""Digests read at a time."""
ADVICE = "the next backup stores the chunk anew if its source still has it; `proxmox-backup-manager"
ADVICE += " verify` puts the broken file aside first"
AGAIN = "restore another point, and make a new backup"


def verify(
    tree: Tree,
    listing: Listing,
    rows: Sequence[Row],
    level: str,
    disk: str | None,
    advance: Callable[[int, int], None],
    *,
    every: bool,
) -> Generator[None, None, Check]:
    """Verify some snapshots. In threads, step by step.

    Args:
        tree: the datastore.
        listing: knows the keys.
        rows: the snapshots.
        level: one of ``repository.LEVELS``.
        disk: only disks of that name.
        advance: as in ``Repository.verify``.
        every: are these all snapshots?
    """
    run = _Run(tree, listing, level, disk)
    for row in rows:
        yield from run.snapshot(row)
    yield from run.chunks(advance)
    if every:
        run.note_unfinished()
        run.check.unread += listing.unread
    run.tell_unchecked()
    return run.check


class _Run:
    def __init__(self, tree: Tree, listing: Listing, level: str, disk: str | None) -> None:
        self._tree = tree
        self._listing = listing
        self._disk = disk
        self._chunks = Chunks(tree)
        # By key: the digests of one are nothing to another.
        self._uses: dict[Key, list[DiskUse]] = {}
        self._file_archives = 0
        self._unsigned = 0
        self.check = Check(level)

    # --- snapshots -----------------------------------------------------------------------------

    def snapshot(self, row: Row) -> Iterator[None]:
        """Manifest, indexes, blobs."""
        check, point = self.check, f"{row.point.group}/{row.point.id}"
        check.points += 1
        check.objects += 1
        if row.outage:
            check.unread.append(str(row.point.facts["reason"]))
            return
        if row.manifest is None:
            self._find(f"{row.path}/{MANIFEST}", row.point.facts["reason"], Hurt(point, ""))
            return
        if row.manifest.verify_state == "failed":
            text = f"{point}: the server's own last verification of it failed"
            check.notes.append(Note(row.path, text))
        if row.point.facts.get("signature") != "valid":
            self._unsigned += 1
        disks = {each.filename: name for name, each in row.archives.items()}
        for archive in row.manifest.archives.values():
            name = archive.filename
            if name.endswith(".fidx"):
                wanted = disks.get(name)
                if wanted is None:
                    self._find(f"{row.path}/{name}", "is missing", Hurt(point, name))
                elif self._disk is None or row.point.disk(self._disk) == row.point.disk(wanted):
                    self._index(row, point, wanted, archive)
            elif self._disk is None and name.endswith(".blob"):
                self._blob(row, point, archive)
            elif name.endswith(".didx"):
                self._file_archives += 1
            yield

    def _index(self, row: Row, point: str, disk: str, archive: Archive) -> None:
        check = self.check
        path = f"{row.path}/{archive.filename}"
        check.disks += 1
        check.objects += 1
        try:
            csum = bytes.fromhex(archive.csum)
            index = open_index(self._tree, path, size=archive.size, csum=csum)
        except CorruptImage as error:
            self._find(path, str(error), Hurt(point, disk, [(0, archive.size)], archive.size))
            return
        except DiskError as error:
            check.unread.append(str(error))
            return
        check.read_bytes += index.count * DIGEST
        index.close()
        key: Key = None
        if archive.crypt_mode == "encrypt":
            assert row.manifest is not None
            key = self._listing.key_of(row.manifest) or Without.KEY
        refs = partial(_refs, self._tree, path, key)
        self._uses.setdefault(key, []).append(DiskUse(point, disk, refs))

    def _blob(self, row: Row, point: str, archive: Archive) -> None:
        check = self.check
        path = f"{row.path}/{archive.filename}"
        where = self._tree.full(path)
        check.objects += 1
        try:
            if check.level == "structure":
                node = self._tree.find(path)
                if node is None:
                    raise CorruptImage(f"corrupt repository: {where}: is missing")
                if node.size != archive.size:
                    text = f"has {node.size} bytes, the manifest says {archive.size}"
                    raise CorruptImage(f"corrupt repository: {where}: {text}")
                return
            raw = self._tree.read(path, limit=MAX_BLOB)
            check.read_bytes += len(raw)
            check_blob(where, raw)
            if hashlib.sha256(raw).hexdigest() != archive.csum.lower():
                text = "does not have the checksum the manifest says"
                raise CorruptImage(f"corrupt repository: {where}: {text}")
        except ObjectMissing:
            self._find(path, f"corrupt repository: {where}: is missing", Hurt(point, ""))
        except CorruptImage as error:
            self._find(path, str(error), Hurt(point, ""))
        except DiskError as error:
            check.unread.append(str(error))

    def _find(self, key: str, text: str, hurt: Hurt) -> None:
        self.check.findings.append(Finding(key, None, text, [hurt], advice=AGAIN))

    # --- chunks --------------------------------------------------------------------------------

    def chunks(self, advance: Callable[[int, int], None]) -> Iterator[None]:
        """Each once for each key."""
        for key, uses in self._uses.items():
            sweep = Sweep(
                self.check,
                uses,
                self._examiner(key),
                chunk_path,
                CHUNKS,
                ADVICE,
                advance,
            )
            yield from sweep.run()

    def _examiner(self, key: Key) -> Callable[[bytes, int], int]:
        if self.check.level == "structure":
            return lambda digest, _: self._chunks.find(digest)
        if self.check.level == "packs" or isinstance(key, Without):
            return self._chunks.check
        return lambda digest, length: self._chunks.prove(digest, length, key)

    # --- the end -------------------------------------------------------------------------------

    def note_unfinished(self) -> None:
        """Backups that run, or were given up."""
        for group, paths in sorted(self._listing.unfinished.items()):
            for path in paths:
                text = f"{group}: has no {MANIFEST}: a backup that is running, or was given up"
                self.check.notes.append(Note(path, text))

    def tell_unchecked(self) -> None:
        """What this format, or this run, has no means to check."""
        said = self.check.unchecked
        if self.check.level == "structure":
            said.append("no chunk was read: --level packs checks their CRC, chunks their content")
        elif self.check.level == "packs":
            said.append("a CRC-32 does not notice every change: --level chunks checks digests")
        elif Without.KEY in self._uses:
            text = "of encrypted chunks only the CRC-32 was checked, for want of the key"
            said.append(f"{text}: name its file in NBDSRV_PBS_KEYFILE")
        if self._unsigned:
            text = f"manifests without a signature that could be checked: {self._unsigned}"
            said.append(f"{text}; whoever can write the datastore could have replaced them")
        if self._file_archives:
            said.append(f"archives of files (.didx), which hold no disk: {self._file_archives}")


def _refs(tree: Tree, path: str, key: Key) -> Iterator[Sequence[Ref]]:
    """What an index refers to, but for zeroes."""
    node = tree.find(path) if tree.distant else None
    index = FixedIndex(tree, path, node.size if node is not None else 0)
    try:
        chunk, zero, short = index.chunk_size, b"", b""
        if not isinstance(key, Without) and index.count:
            zero = zero_digest(chunk, key)
            short = zero_digest(index.length(index.count - 1), key)
        for first in range(0, index.count, BATCH):
            raw = index.digests(first, min(BATCH, index.count - first))
            batch: list[Ref] = []
            for at in others_than(zero or bytes(DIGEST), raw):
                number, digest = first + at, raw[at * DIGEST : (at + 1) * DIGEST]
                if digest != short:
                    batch.append((number * chunk, index.length(number), digest))
            yield batch
    finally:
        index.close()
