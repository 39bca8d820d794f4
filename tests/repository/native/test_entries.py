"""Reading entries: from where they should be, and from elsewhere if they are not there."""

import threading

import pytest

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.native import entries as entries_module
from nbdsrv.repository.native.entries import Entries
from nbdsrv.repository.native.entry import Kind, Place
from nbdsrv.repository.native.hashing import Hashing
from nbdsrv.repository.native.layout import pack_key
from nbdsrv.repository.native.pack import Pack, PackKind
from nbdsrv.repository.native.sealing import Codec, Sealing
from nbdsrv.store.faulty import Failure, FaultyStore, calls
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import Store, StoreError

OWNER = b"sixteen bytes id"
CONTENT = b"the content of a chunk"


@pytest.fixture(params=["plain", "encrypted"])
def sealing(request: pytest.FixtureRequest) -> Sealing:
    return Sealing(bytes(32) if request.param == "encrypted" else None)


class Scene:
    """The same chunk in two packs."""

    def __init__(self, sealing: Sealing) -> None:
        self.store = MemoryStore()
        self.sealing = sealing
        self.hashing = Hashing("blake3", sealing.id_key)
        self.id = self.hashing.id_of(CONTENT)
        self.places = [self.packed(), self.packed()]
        self.damage: list[DiskError] = []

    def packed(self) -> Place:
        pack = Pack(PackKind.CHUNKS, OWNER, self.sealing, self.hashing)
        row = pack.add(Kind.CHUNK, Codec.RAW, len(CONTENT), self.id, CONTENT)
        data = pack.finish()
        self.store.put_new(pack_key(pack.name), data)
        return row.place(pack.name)

    def entries(self, store: Store | None = None) -> Entries:
        made = Entries(store or self.store, OWNER, self.sealing, self.hashing)
        made.elsewhere = lambda id_: iter(self.places if id_ == self.id else ())
        made.on_damage = self.damage.append
        return made

    def spoil(self, number: int, at: int) -> None:
        key = pack_key(self.places[number].pack)
        data = bytearray(self.store.get(key))
        data[at] ^= 1
        self.store.put(key, data)


@pytest.fixture
def scene(sealing: Sealing) -> Scene:
    return Scene(sealing)


def read(scene: Scene, entries: Entries, place: Place | None = None) -> bytes:
    return bytes(entries.read(Kind.CHUNK, scene.id, place or scene.places[0]))


def test_from_where_it_lies(scene: Scene) -> None:
    entries = scene.entries()
    assert CONTENT == read(scene, entries) == read(scene, entries, scene.places[1])
    assert [] == scene.damage


def test_a_pack_that_was_repacked_is_no_damage(scene: Scene) -> None:
    scene.store.delete(pack_key(scene.places[0].pack))
    assert CONTENT == read(scene, scene.entries())
    assert [] == scene.damage


@pytest.mark.parametrize("at", [64, 64 + 20, 64 + 52])
def test_a_damaged_one_is_read_elsewhere_and_told(scene: Scene, at: int) -> None:
    scene.spoil(0, at)
    assert CONTENT == read(scene, scene.entries())
    (told,) = scene.damage
    assert f"{pack_key(scene.places[0].pack)} at 64: " in str(told)


def test_a_short_pack_is_read_elsewhere(scene: Scene) -> None:
    key = pack_key(scene.places[0].pack)
    scene.store.put(key, scene.store.get(key)[:100])
    assert CONTENT == read(scene, scene.entries())
    assert 1 == len(scene.damage)


def test_a_bad_sector_is_read_elsewhere(scene: Scene) -> None:
    key = pack_key(scene.places[0].pack)
    faulty = FaultyStore(scene.store, failures=[Failure(calls("get_range", key=key), 5, None)])
    assert CONTENT == read(scene, scene.entries(faulty))
    assert 1 == len(scene.damage)


def test_a_store_that_does_not_answer_is_no_damage(scene: Scene) -> None:
    faulty = FaultyStore(scene.store, failures=[Failure(calls("get_range"), 110, None)])
    with pytest.raises(StoreError) as caught:
        read(scene, scene.entries(faulty))
    assert 110 == caught.value.errno
    assert [] == scene.damage


def test_lost_is_what_no_pack_has(scene: Scene) -> None:
    for place in scene.places:
        scene.store.delete(pack_key(place.pack))
    with pytest.raises(CorruptImage, match="is missing; `nbdsrv verify`"):
        read(scene, scene.entries())
    assert 1 == len(scene.damage)


def test_wrong_content_is_never_returned(scene: Scene) -> None:
    for number in range(2):
        scene.spoil(number, 64 + 52 + 3)
    with pytest.raises(CorruptImage, match=pack_key(scene.places[0].pack)):
        read(scene, scene.entries())


@pytest.mark.parametrize(
    "place",
    [
        (0, 10),
        (1 << 40, 10),
        (64, (1 << 32) - 1),
        (64, -1),
        (-64, 10),
    ],
)
def test_places_where_nothing_can_be_are_not_read(scene: Scene, place: tuple[int, int]) -> None:
    faulty = FaultyStore(scene.store)
    scene_places, scene.places = scene.places, []
    wrong = Place(scene_places[0].pack, *place, 0)
    with pytest.raises(CorruptImage, match="no entry can be there"):
        read(scene, scene.entries(faulty), wrong)
    assert [] == faulty.log


def test_a_salt_that_was_read_wrongly_once_is_read_again() -> None:
    scene = Scene(Sealing(bytes(32)))
    scene.places = scene.places[:1]
    entries = scene.entries()
    scene.spoil(0, 40)
    with pytest.raises(CorruptImage):
        read(scene, entries)
    scene.spoil(0, 40)
    assert CONTENT == read(scene, entries)


def test_many_threads_and_few_seals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries_module, "MAX_SEALS", 2)
    scene = Scene(Sealing(bytes(32)))
    places = [scene.packed() for _ in range(8)]
    entries = scene.entries()
    wrong = []

    def work() -> None:
        read = (entries.read_there(Kind.CHUNK, scene.id, place) for place in places * 20)
        wrong.extend(content for content in read if content != CONTENT)

    crew = [threading.Thread(target=work) for _ in range(4)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    assert [] == wrong
    assert 2 >= len(entries._seals)
