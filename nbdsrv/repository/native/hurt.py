"""From damage to disks: which ranges of which disks of which points cannot be read. Blocking.

::

    bad places ── every point's root ── pages ── slots ──> Hurt(point, disk, ranges)
                        │ bad: all       │ bad: its span
                        └── the same content in another pack that is not bad: nobody is hurt

Walks maps only, and only when something is broken.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from nbdsrv.errors import DiskError
from nbdsrv.repository.native.census import Census
from nbdsrv.repository.native.damage import Finding, Hurt, damage_of, is_denied
from nbdsrv.repository.native.entries import key_of
from nbdsrv.repository.native.entry import Kind, Place
from nbdsrv.repository.native.point import DiskRecord, PointRecord
from nbdsrv.repository.native.slots import Page, Root
from nbdsrv.repository.native.vault import Vault

__all__ = ["BadPlaces", "trace"]

MAX_COPIES = 100
MAX_HURTS = 1000
"""Disks of points that one finding lists."""


class BadPlaces:
    """What is broken, by place.

    Attributes:
        findings: all of them, in the order in which they were made.
    """

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._whole: dict[bytes, Finding] = {}
        self._parts: dict[tuple[bytes, int], Finding] = {}

    def __bool__(self) -> bool:
        return bool(self._whole or self._parts)

    def whole(self, pack: bytes, finding: Finding) -> None:
        """Nothing of a pack can be read."""
        if pack not in self._whole:
            self._whole[pack] = finding
            self.findings.append(finding)

    def part(self, pack: bytes, offset: int, finding: Finding) -> None:
        """The entry there cannot be read."""
        if (pack, offset) not in self._parts and pack not in self._whole:
            self._parts[pack, offset] = finding
            self.findings.append(finding)

    def at(self, place: Place) -> Finding | None:
        """What is wrong with a place; None for nothing."""
        return self._whole.get(place.pack) or self._parts.get((place.pack, place.offset))

    def packs(self) -> set[bytes]:
        """Names of the packs in which something is."""
        return self._whole.keys() | {pack for pack, _ in self._parts}

    def is_missing(self, pack: bytes, kind: Kind) -> Finding:
        """The finding for a pack that is not there."""
        key = key_of(kind, pack)
        finding = self._whole.get(pack)
        if finding is None:
            finding = Finding(key, None, "it is missing", advice=MISSING)
            self.whole(pack, finding)
        return finding


MISSING = (
    "bring the object back from a copy of the repository, if there is one; the next backup"
    " stores its content anew, if its source has it"
)


def trace(vault: Vault, census: Census, bad: BadPlaces) -> None:
    """Tell each finding whom it hurts, and where intact copies are; find out what is missing.

    Args:
        vault: the repository.
        census: taken just now: a collector may have moved what an older one knows.
        bad: what is broken.

    Raises:
        StoreError: the store does not answer.
    """
    objects = vault.point_objects()
    census.recount()  # what was committed meanwhile leads into packs that are newer
    tracer = _Tracer(vault, census, bad)
    with _looked_up(vault, census):
        for _, record in vault.read_points(objects):
            if not isinstance(record, PointRecord):
                _told(record)
                continue
            for disk in record.disks:
                tracer.disk(record, disk)


@contextmanager
def _looked_up(vault: Vault, census: Census) -> Iterator[None]:
    entries = vault.entries
    before, entries.elsewhere = entries.elsewhere, census.index.find_all
    try:
        yield
    finally:
        entries.elsewhere = before


class _Tracer:
    def __init__(self, vault: Vault, census: Census, bad: BadPlaces) -> None:
        self._vault = vault
        self._census = census
        self._bad = bad
        self._pages: dict[bytes, list[tuple[int, Finding]] | None] = {}

    def disk(self, record: PointRecord, disk: DiskRecord) -> None:
        point = f"{record.group}/{record.id}"
        finding = self._lost(Kind.ROOT, bytes.fromhex(disk.root.id), disk.root.place)
        try:
            root = self._vault.root(disk.root)
        except DiskError as error:
            _told(error)
            if finding is not None:
                _hurt(finding, point, disk.name, 0, disk.size)
            return
        for number, id_, place in root.pages.places():
            self._page(point, disk.name, root, number, id_, place)

    def _page(
        self, point: str, name: str, root: Root, number: int, id_: bytes, place: Place
    ) -> None:
        start = number * root.page_span
        finding = self._lost(Kind.PAGE, id_, place)
        if id_ not in self._pages:
            self._pages[id_] = self._slots(root, number)
        hits = self._pages[id_]
        if hits is None:
            if finding is not None:
                length = min(root.page_span, root.size - start)
                _hurt(finding, point, name, start, length)
            return
        for index, each in hits:
            offset = start + index * root.chunk_size
            length = min(root.chunk_size, root.size - offset)
            _hurt(each, point, name, offset, length)

    def _slots(self, root: Root, number: int) -> list[tuple[int, Finding]] | None:
        """The slots of a page that are lost; None if the page is."""
        try:
            page: Page = self._vault.page(root, number)
        except DiskError as error:
            _told(error)
            return None
        found = []
        for index, id_, place in page.places():
            finding = self._lost(Kind.CHUNK, id_, place)
            if finding is not None:
                found.append((index, finding))
        return found

    def _lost(self, kind: Kind, id_: bytes, place: Place) -> Finding | None:
        """Why content cannot be read; None if it can, be it from elsewhere."""
        finding = self._bad.at(place)
        there = place.pack in self._census.packs
        if finding is None and there:
            return None
        packs = self._census.packs
        for other in self._census.index.find_all(id_):
            if (
                other[:2] != place[:2]
                and other.pack in packs
                and packs[other.pack].key == key_of(kind, other.pack)
                and self._bad.at(other) is None
            ):
                key = packs[other.pack].key
                if finding and key not in finding.copies and len(finding.copies) < MAX_COPIES:
                    finding.copies.append(key)
                return None
        return finding or self._bad.is_missing(place.pack, kind)


def _told(error: DiskError) -> None:
    """What cannot be read has been found before, be it broken or not for us to read.

    Raises:
        DiskError: the store could not be asked.
    """
    if not is_denied(error):
        damage_of(error)


def _hurt(finding: Finding, point: str, disk: str, offset: int, length: int) -> None:
    if not finding.hurts or (finding.hurts[-1].point, finding.hurts[-1].disk) != (point, disk):
        if len(finding.hurts) >= MAX_HURTS:
            return
        finding.hurts.append(Hurt(point, disk))
    finding.hurts[-1].add(offset, length)
