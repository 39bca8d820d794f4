"""Do points, maps, packs' directories and the index agree? Blocking; reads no chunk.

::

    points ── roots ── pages ── slots ──> claims     (pack, offset) and a hash of the rest
                  │        └ hash of ids = the root's; all of them = the point's image_id
                  └ size = the point's
    packs  ── directories ─────────────> entries     from the header to the directory, without gaps
                                            ├── every claim must be one of them
    index  ── records ──────────────────────┴── the same, pack by pack: sums of hashes
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import NamedTuple

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.native.census import Census, Row
from nbdsrv.repository.native.damage import Finding, Hurt, Note, damage_of, is_denied, is_outage
from nbdsrv.repository.native.entries import key_of
from nbdsrv.repository.native.entry import ENTRY_SIZE, Kind, Place
from nbdsrv.repository.native.hashing import ZERO_ID
from nbdsrv.repository.native.hurt import BadPlaces
from nbdsrv.repository.native.layout import group_of, pack_of, ulid_of
from nbdsrv.repository.native.mark import Mapped, Marker
from nbdsrv.repository.native.pack import (
    HEADER_SIZE,
    TRAILER_SIZE,
    Listed,
    row_size,
)
from nbdsrv.repository.native.point import DiskRecord, PointRecord, Ref
from nbdsrv.repository.native.sealing import BrokenPayload
from nbdsrv.repository.native.slots import Page, Root
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.store import ObjectMissing, Stored

__all__ = ["MapWalk", "check_directories", "check_index"]

HEAL = (
    "the next backup stores anew what was lost, if its source has it; `nbdsrv gc` then removes the"
    " damaged pack"
)
NO_RESTORE = "do not restore from it"
REMADE = "`nbdsrv gc` makes the index anew"
BITS = 0xFFFFFFFF
CIPHER_BYTE = 9
RESERVED = slice(10, 16)


def claim(id_: bytes, offset: int, clen: int, codec: int, frames: bytes, /) -> int:
    """An entry in 64 bits: equal ones are equal, and different ones hardly ever."""
    return offset << 32 | hash((id_, clen, codec, frames.rstrip(b"\0"))) & BITS


class Told(NamedTuple):
    """What a root says of its disk, and where its pages contradict it."""

    size: int
    image_id: str
    wrong: list[str]


class MapWalk(Marker):
    """Walks the maps of the points that are chosen, and checks each on the way.

    Attributes:
        bad: places from which a root or page could not be read.
        findings: what is broken otherwise: points, and maps that contradict themselves.
        disks: that were walked.
        blind: is there a point, root or page that could not be read? Nobody knows what it needs.
        previous: group to (point, the one before it) of all points that could be read.
    """

    row = staticmethod(claim)

    def __init__(
        self,
        vault: Vault,
        census: Census,
        threads: Executor,
        chosen: Callable[[PointRecord], Iterable[str]],
        unread: dict[str, None],
    ) -> None:
        """As ``Marker``; ``chosen``: the names of a point's disks that are to be walked; what may
        not be read, which is no damage, is noted in ``unread``.
        """
        super().__init__(vault, census, frozenset(), threads)
        self._chosen = chosen
        self._unread = unread
        self._contents: dict[bytes, bytes] = {}
        self._told: dict[str, Told] = {}
        self.bad = BadPlaces()
        self.findings: list[Finding] = []
        self.disks = 0
        self.blind = False
        self.previous: defaultdict[str, list[tuple[str, str | None]]] = defaultdict(list)

    def point(self, key: str) -> PointRecord:
        """What readers pass over is looked at too: a point's object has no name to check it by.

        In a plain repository its salt remains, which is nobody's.
        """
        data = self._vault.point_data(key)
        record = self._vault.decoded_point(key, data)
        encrypted = self._vault.sealing.id_key is not None
        if any(data[RESERVED]) or data[CIPHER_BYTE] != encrypted:
            raise CorruptImage(f"corrupt repository: {key}: bytes that say nothing were changed")
        return record

    def lost_point(self, key: str, error: DiskError) -> None:
        """It is told with all that it hurts, if it is damage."""
        self.blind = True
        group, id_ = group_of(key), ulid_of(key)
        if group is not None and id_ is not None:
            self.previous[group].append((id_, None))  # not missed, at least
        if is_denied(error):
            self._unread[str(error)] = None
            return
        if not isinstance(error, CorruptImage) or is_outage(error, self._vault.store):
            raise error
        hurt = Hurt(key.removeprefix("points/").removesuffix(".pt"), "")
        advice = "bring it back from a copy, or delete it with `nbdsrv prune --damaged`"
        self.findings.append(Finding(key, None, _why(error, key), [hurt], [], advice))

    def disks_of(self, record: PointRecord) -> Iterable[DiskRecord]:
        """Those that are chosen."""
        self.previous[record.group].append((record.id, record.previous))
        names = set(self._chosen(record))
        if names:
            self.found.points += 1
        chosen = [disk for disk in record.disks if disk.name in names]
        self.disks += len(chosen)
        return chosen

    def walked(self, mapped: Mapped, root: Root | None) -> None:
        """What the root says of its pages is what they say, and what the point says."""
        disk = mapped.disk
        if root is not None:
            self._told[disk.root.id] = Told(
                root.size, root.image_id(self._vault.hashing).hex(), self._contradictions(root)
            )
        told = self._told.get(disk.root.id)
        if told is None:
            return  # it cannot be read
        wrong = []
        if told.size != disk.size:
            wrong.append(f"its map is one of {told.size} bytes, the point says {disk.size}")
        if told.image_id != disk.image_id:
            wrong.append("its map is not the one the point was committed with")
        wrong += told.wrong
        if wrong:
            hurt = Hurt(mapped.point, disk.name)
            hurt.add(0, disk.size)
            text = f"disk {disk.name}: {wrong[0]}"
            self.findings.append(Finding(mapped.key, None, text, [hurt], [], NO_RESTORE))

    def _contradictions(self, root: Root) -> list[str]:
        """The first page that holds something else than its root says, in words."""
        for number in range(len(root)):
            id_ = root.pages.id(number)
            expected = root.content(number)
            content = ZERO_ID if id_ == ZERO_ID else self._contents.get(id_, expected)
            if content != expected:
                return [f"page {number} of its map holds other chunks than the map says"]
        return []

    def root(self, ref: Ref) -> Root | DiskError:
        """A root, from its very place if that is sound."""
        id_ = bytes.fromhex(ref.id)
        data = self._there(Kind.ROOT, id_, ref.place)
        if data is not None:
            try:
                return Root.parse(data)
            except BrokenPayload as error:
                return self._impossible(Kind.ROOT, ref.place, error)
        return super().root(ref)

    def page(self, root: Root, number: int) -> Page | DiskError:
        """Likewise, and its chunks' hash is remembered."""
        id_, place = root.pages.id(number), root.pages.place(number)
        data = self._there(Kind.PAGE, id_, place)
        page: Page | DiskError
        if data is None:
            page = super().page(root, number)
        else:
            try:
                page = Page.parse(data, root.slots_of(number), root.chunk_size)
            except BrokenPayload as error:
                page = self._impossible(Kind.PAGE, place, error)
        if isinstance(page, Page):
            self._contents[id_] = page.content(self._vault.hashing)
        return page

    def _there(self, kind: Kind, id_: bytes, place: Place) -> bytes | None:
        """Content from that very place; None, and a finding, if it is not there."""
        if place.pack not in self._census.packs:
            return None  # moved: the index knows; or missing, which the trace tells
        try:
            return bytes(self._vault.entries.read_there(kind, id_, place))
        except ObjectMissing:
            return None
        except DiskError as error:
            if is_denied(error):
                return None  # told by who reads it from wherever it is
            size = self._census.packs[place.pack].size
            within = place.offset + ENTRY_SIZE + place.length <= size
            if within and is_outage(error, self._vault.store):
                raise
            key = key_of(kind, place.pack)
            text = _why(damage_of(error), key, place.offset)
            finding = Finding(key, place.offset, text, advice=HEAL)
            self.bad.part(place.pack, place.offset, finding)
        return None

    def _damage(self, error: DiskError, place: Place) -> DiskError:
        if is_denied(error):
            self._unread[str(error)] = None
            return error
        return super()._damage(error, place)

    def _lose(self, error: DiskError) -> None:
        self.blind = True
        super()._lose(error)

    def _impossible(self, kind: Kind, place: Place, error: BrokenPayload) -> CorruptImage:
        """Content that is what its id says and yet no page or root."""
        key = key_of(kind, place.pack)
        self.bad.part(place.pack, place.offset, Finding(key, place.offset, str(error)))
        return CorruptImage(f"corrupt repository: {key} at {place.offset}: {error}")


def check_directories(walk: MapWalk, census: Census, packs: Iterable[Stored]) -> "Sums":
    """Every claim must be an entry; entries must fill their packs.

    Returns:
        What the directories hold, to be compared with the index.

    Raises:
        StoreError: the store does not answer.
    """
    sums = Sums()
    for stored, rows in census.directories(packs):
        name = pack_of(stored.key)
        assert name is not None
        error = census.damage.pop(stored.key, None)
        if error is None and not _fills(stored.size, rows):
            error = CorruptImage(f"{stored.key}: its entries do not fill it")
        if error is not None:
            text = _why(error, stored.key)
            finding = Finding(stored.key, stored.size - TRAILER_SIZE, text, advice=HEAL)
            walk.bad.part(name, stored.size, finding)  # no entry is there: nobody is hurt by it
        else:
            sums.add(name, ((row.id, row.place(name), row.kind) for row in rows))
        live = walk.found.live.get(name)
        if live is None:
            continue
        entries = {claim(row.id, row.offset, row.clen, row.codec, row.frames) for row in rows}
        for lost in set(live.rows()) - entries:
            offset = lost >> 32
            text = "a map names an entry there that the pack does not have"
            walk.bad.part(name, offset, Finding(stored.key, offset, text, advice=HEAL))
    return sums


def check_index(census: Census, sums: "Sums", findings: list[Finding], notes: list[Note]) -> None:
    """The index must say what the directories say."""
    for key, error in census.damage.items():
        text = _why(error, key)
        findings.append(Finding(key, None, text, advice=f"no content is lost; {REMADE}"))
    indexed = Sums()
    for _, segment in census.segments:
        indexed.add(None, segment)
    unknown = [name for name in sums.of if name not in indexed.of]
    if unknown and not census.blind:
        text = f"{len(unknown)} packs are in no segment of it; {REMADE}"
        notes.append(Note("index/", text))
    both = sums.of.keys() & indexed.of.keys()
    # A record that two segments have, as a collector that died leaves them, is no contradiction.
    for name in _different(census, {name for name in both if sums.of[name] != indexed.of[name]}):
        text = f"it contradicts {census.packs[name].key}"
        findings.append(Finding("index/", None, text, advice=f"no content is lost; {REMADE}"))


def _different(census: Census, names: set[bytes]) -> list[bytes]:
    """Of these packs, those of which the index does not say exactly what their directories do."""
    if not names:
        return []
    said: dict[bytes, set[Row]] = {name: set() for name in names}
    for _, segment in census.segments:
        for row in segment:
            if row[1].pack in said:
                said[row[1].pack].add(row)
    found = []
    packs = [census.packs[name] for name in sorted(names) if name in census.packs]
    for stored, rows in census.directories(packs):
        name = pack_of(stored.key)
        assert name is not None
        if said[name] != {(row.id, row.place(name), row.kind) for row in rows}:
            found.append(name)
    return found


class Sums:
    """Sets of records, one for each pack, compared by sums of their hashes.

    Attributes:
        of: by the pack's name.
    """

    def __init__(self) -> None:
        self.of: dict[bytes, int] = {}

    def add(self, name: bytes | None, rows: Iterable[tuple[bytes, Place, int]]) -> None:
        """More records; of the pack ``name``, or of many."""
        if name is not None:
            self.of.setdefault(name, 0)
        of = self.of
        for row in rows:
            pack = row[1][0]
            of[pack] = of.get(pack, 0) ^ hash(row)


def _fills(size: int, rows: list[Listed]) -> bool:
    """Do the entries lie one behind the other, from the header to the directory?"""
    at = HEADER_SIZE
    for row in sorted(rows, key=lambda row: row.offset):
        if row.offset != at:
            return False
        at += ENTRY_SIZE + row.clen
    return at + len(rows) * row_size(rows) + TRAILER_SIZE == size


def _why(error: Exception, key: str, offset: int | None = None) -> str:
    """An error's text without what a finding says anyway."""
    text = str(error).removeprefix("corrupt repository: ").removeprefix(key)
    if offset is not None:
        text = text.removeprefix(f" at {offset}")
    return text.removeprefix(": ")
