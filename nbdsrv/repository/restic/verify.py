"""Is a restic repository what it was? Everything in it is named by its SHA-256.

::

    structure   snapshots, trees, index: every blob of every disk is said to lie in a pack that is
                there and long enough
    packs       the SHA-256 of these packs is their name;  of the bad ones, each blob is looked at
    chunks      each blob of the disks, once, at each place: MAC, zstd, SHA-256

A blob that is damaged in one pack and intact in another hurts nobody.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.damage import Check, Finding, Hurt, Note
from nbdsrv.repository.pieces import ID_SIZE, Pieces
from nbdsrv.repository.restic.blobs import BlobStore, pack_path
from nbdsrv.repository.restic.index import BlobPlace
from nbdsrv.repository.restic.snapshots import Row
from nbdsrv.repository.restic.trees import MIN_DISK, Trees
from nbdsrv.store.store import ObjectMissing

__all__ = ["verify"]

PIECE = 1 << 20
THREADS = 4
ADVICE = "`restic check --read-data` and `restic repair` are what mends a repository"


def verify(
    blobs: BlobStore,
    trees: Trees,
    rows: Sequence[Row],
    level: str,
    disk: str | None,
    *,
    whole: bool,
    advance: Callable[[int, int], None],
) -> Check:
    """Look at the snapshots in ``rows``. Blocking.

    Args:
        blobs: of the repository.
        trees: of the repository.
        rows: with their points.
        level: one of ``repository.LEVELS``.
        disk: only disks of that name.
        whole: also packs that none of these needs.
        advance: called with (bytes done, bytes to do).

    Raises:
        StoreError: the repository cannot be listed.
    """
    return _Verification(blobs, trees, rows, level, disk, advance).run(whole=whole)


class _Verification:
    def __init__(
        self,
        blobs: BlobStore,
        trees: Trees,
        rows: Sequence[Row],
        level: str,
        disk: str | None,
        advance: Callable[[int, int], None],
    ) -> None:
        self._blobs = blobs
        self._trees = trees
        self._rows = rows
        self._level = level
        self._disk = disk
        self._advance = advance
        self._check = Check(level)
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()
        self._done = self._total = 0

    def run(self, *, whole: bool) -> Check:
        check = self._check
        self._blobs.refresh()
        self._snapshots()
        self._sizes = {node.name: node.size for node in self._blobs.pack_files()}
        needed = self._needed()
        packs: dict[str, list[tuple[bytes, BlobPlace]]] = {}
        for id_ in needed:
            for place in self._blobs.places(id_):
                packs.setdefault(place.pack, []).append((id_, place))
        if whole:
            for name in self._blobs.index.packs():
                packs.setdefault(name, [])
        bad = self._look_at(packs)
        if not whole:  # what is wrong beside what was asked about
            beside = [name for name, what in bad.items() if not what.lost & needed]
            for name in beside:
                text = f"{bad.pop(name).text}; what these disks need of it is intact"
                check.notes.append(Note(pack_path(name), text))
        self._tell(bad, needed)
        for path, text in self._blobs.damaged.items():
            check.findings.append(Finding(path, None, text, advice=ADVICE))
        check.unread += [*self._blobs.unread.values(), *self._blobs.unsearched]
        check.objects = len(packs) + len(self._rows)
        self._say_what_is_left(whole=whole)
        return check

    # --- structure -----------------------------------------------------------------------------

    def _snapshots(self) -> None:
        for row in self._rows:
            point = row.point
            self._check.points += 1
            if point is None or "reason" not in point.facts:
                continue
            hurt = Hurt(f"{point.group}/{point.id}", "")
            reason = str(point.facts["reason"])
            if row.outage:
                self._check.unread.append(reason)
                continue
            key = f"snapshots/{row.name}"
            self._check.findings.append(Finding(key, None, reason, [hurt], advice=ADVICE))

    def _disks(self) -> Iterator[tuple[Row, str]]:
        for row in self._rows:
            if row.point is None:
                continue
            for disk in row.point.disks:
                if self._disk in {None, disk.name}:
                    yield row, disk.name

    def _files(self) -> Iterator[tuple[Row, str, Pieces | DiskError]]:
        """One after the other: those of a hundred snapshots would not fit the memory."""
        for row, name in self._disks():
            assert row.record is not None
            assert row.record.tree is not None
            try:
                yield row, name, self._trees.pieces(row.record.tree, name)
            except DiskError as error:
                yield row, name, error

    def _needed(self) -> set[bytes]:
        """The blobs of all disks."""
        needed: set[bytes] = set()
        for row, name, pieces in self._files():
            assert row.point is not None
            self._check.disks += 1
            if isinstance(pieces, DiskError):
                self._unreadable(row, name, pieces)
                continue
            content = pieces.ids
            needed.update(content[at : at + ID_SIZE] for at in range(0, len(content), ID_SIZE))
            begin, end = pieces.gap
            if end > begin and pieces.missing is not None:
                hurt = Hurt(f"{row.group}/{row.point.id}", name)
                hurt.add(begin, end - begin)
                text = f"the blob {self._blobs.nowhere}"
                key = f"blob {pieces.missing.hex()}"
                self._check.findings.append(Finding(key, None, text, [hurt], advice=ADVICE))
        return needed

    def _unreadable(self, row: Row, name: str, error: DiskError) -> None:
        assert row.point is not None
        if not isinstance(error, CorruptImage | ObjectMissing):
            self._check.unread.append(f"{row.group}/{name}@{row.point.id}: {error}")
            return
        hurt = Hurt(f"{row.group}/{row.point.id}", name)
        key = f"snapshots/{row.name}"
        self._check.findings.append(Finding(key, None, str(error), [hurt], advice=ADVICE))

    # --- packs and blobs -----------------------------------------------------------------------

    def _look_at(self, packs: dict[str, list[tuple[bytes, BlobPlace]]]) -> dict[str, "_Bad"]:
        """What is wrong with each pack that is not as it was."""
        if self._level == "packs":
            self._total = sum(self._sizes.get(name, 0) for name in packs)
        elif self._level == "chunks":
            self._total = sum(place.length for each in packs.values() for _, place in each)
            self._total += sum(self._sizes.get(name, 0) for name in packs)
        names = sorted(packs)
        with ThreadPoolExecutor(THREADS, "restic-verify") as crew:
            found = list(crew.map(self._pack, names, map(packs.get, names)))
        return {name: bad for name, bad in zip(names, found, strict=True) if bad is not None}

    def _pack(self, name: str, blobs: list[tuple[bytes, BlobPlace]] | None) -> "_Bad | None":
        wanted = blobs or []
        size = self._sizes.get(name)
        if size is None:
            return _Bad("the pack is missing", None, {id_ for id_, _ in wanted})
        short = [(id_, p) for id_, p in wanted if p.offset + p.length > size]
        if short:
            text = f"the pack has {size} bytes, its blobs need more: was it truncated?"
            return _Bad(text, size, {id_ for id_, _ in short})
        if self._level == "structure":
            return None
        try:
            intact = self._is_intact(name, size)
            if intact and self._level == "packs":
                return None
            lost, text, offset = self._blobs_of(wanted)
        except DiskError as error:
            with self._lock:
                self._check.unread.append(str(error))
            return None
        if intact and not lost:
            return None
        return _Bad(text or "its SHA-256 is not its name: it was changed", offset, lost)

    def _is_intact(self, name: str, size: int) -> bool:
        path, hash_ = pack_path(name), hashlib.sha256()
        for at in range(0, size, PIECE):
            hash_.update(self._blobs.tree.read_range(path, at, min(PIECE, size - at)))
            self._read(min(PIECE, size - at))
        return hash_.hexdigest() == name

    def _blobs_of(
        self, wanted: Iterable[tuple[bytes, BlobPlace]]
    ) -> tuple[set[bytes], str, int | None]:
        """The damaged ones, and what is wrong with the first."""
        lost: set[bytes] = set()
        text, offset = "", None
        for id_, place in sorted(wanted, key=lambda each: each[1].offset):
            try:
                self._blobs.at(id_, place)
            except CorruptImage as error:
                if not lost:
                    text, offset = str(error), place.offset
                lost.add(id_)
            if self._level == "chunks":
                self._read(place.length)
        return lost, text, offset

    def _read(self, length: int) -> None:
        with self._lock:
            self._check.read_bytes += length
            self._done += length
            self._advance(self._done, self._total)

    # --- what it means -------------------------------------------------------------------------

    def _tell(self, bad: dict[str, "_Bad"], needed: set[bytes]) -> None:
        """Findings for bad packs; a blob that is intact elsewhere hurts nobody."""
        owner: dict[bytes, Finding] = {}
        for name, what in bad.items():
            finding = Finding(pack_path(name), what.offset, what.text, advice=ADVICE)
            self._check.findings.append(finding)
            copies: dict[str, None] = {}
            for id_ in what.lost & needed:
                places = self._blobs.places(id_)
                others = [
                    p.pack for p in places if p.pack not in bad or id_ not in bad[p.pack].lost
                ]
                if others:
                    copies.update(dict.fromkeys(map(pack_path, others)))
                else:
                    owner.setdefault(id_, finding)
            finding.copies = list(copies)
        if owner:
            self._hurt(owner)

    def _hurt(self, owner: dict[bytes, Finding]) -> None:
        for row, name, pieces in self._files():
            if isinstance(pieces, DiskError):
                continue
            assert row.point is not None
            hurts: dict[int, Hurt] = {}
            for index, begin, end in pieces.between(0, pieces.size):
                finding = owner.get(pieces.id(index)) if index >= 0 else None
                if finding is None:
                    continue
                hurt = hurts.get(id(finding))
                if hurt is None:
                    hurt = hurts[id(finding)] = Hurt(f"{row.group}/{row.point.id}", name)
                    finding.hurts.append(hurt)
                hurt.add(begin, end - begin)

    def _say_what_is_left(self, *, whole: bool) -> None:
        check = self._check
        if self._level == "structure":
            check.unchecked.append("no pack was read; --level packs reads those of the disks")
        if self._level == "chunks":
            check.unchecked.append(
                "blobs that belong to no disk are covered by their pack's SHA-256"
            )
        if not whole:
            check.unchecked.append("packs that none of these points needs were not looked at")
        check.unchecked.append(
            f"files of less than {MIN_DISK} bytes are no disks: their blobs were not looked at"
        )
        for row in self._rows:
            if row.point is not None and "not_listed" in row.point.facts:
                text = "has more directories or files than are listed"
                check.notes.append(Note(f"snapshots/{row.name}", text))


class _Bad:
    """What is wrong with a pack: which of the wanted blobs are lost in it."""

    __slots__ = ("lost", "offset", "text")

    def __init__(self, text: str, offset: int | None, lost: set[bytes]) -> None:
        self.text = text
        self.offset = offset
        self.lost = lost
