import os
from pathlib import Path

import pytest

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.native.chunk_reader import ChunkReader
from nbdsrv.repository.native.entry import ENTRY_SIZE, Body, Kind, Place
from nbdsrv.repository.native.frames import FRAME, encode_frames, frame_span
from nbdsrv.repository.native.index import encode_segment
from nbdsrv.repository.native.layout import index_key, new_ulid, pack_key
from nbdsrv.repository.native.pack import Pack, PackKind
from nbdsrv.repository.native.sealing import Codec, compress
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.directory import DirectoryStore
from nbdsrv.store.faulty import FaultyStore
from nbdsrv.store.memory import MemoryStore
from tests.repository.native.made import made

CONTENT = b"".join(bytes([n]) * 40_000 + bytes(range(256)) * 98 for n in range(1, 4))


def stored(vault: Vault, content: bytes, codec: Codec = Codec.FRAMES) -> tuple[bytes, Place]:
    pack = Pack(PackKind.CHUNKS, vault.repository, vault.sealing, vault.hashing)
    id_ = vault.hashing.id_of(content)
    body: Body
    if codec is Codec.FRAMES:
        body = encode_frames(memoryview(content), id_, 2)
    else:
        codec, body = compress(content)
    row = pack.add(Kind.CHUNK, codec, len(content), id_, body)
    data = pack.finish()
    vault.store.put_new(pack_key(pack.name), data)
    return id_, row.place(pack.name)


@pytest.fixture(params=[False, True], ids=["plain", "encrypted"])
def vault(request: pytest.FixtureRequest, tmp_path: Path) -> Vault:
    return made(DirectoryStore(str(tmp_path / "r")), encrypted=request.param)


@pytest.mark.parametrize("codec", [Codec.FRAMES, Codec.ZSTD])
def test_chunks_and_frames(vault: Vault, codec: Codec) -> None:
    id_, place = stored(vault, CONTENT, codec)
    reader = ChunkReader(vault)
    assert CONTENT == reader.chunk(id_, place, len(CONTENT))
    for _ in range(2):
        for number in range(-(-len(CONTENT) // FRAME)):
            expected = CONTENT[number * FRAME : (number + 1) * FRAME]
            assert expected == reader.frame(id_, place, len(CONTENT), number)
    reader.close()


def test_only_frames_of_packs_that_have_been_read_are_known_to_lie_in_a_file(vault: Vault) -> None:
    id_, place = stored(vault, CONTENT)
    reader = ChunkReader(vault)
    assert reader.stored(place, len(CONTENT), 0) is None
    reader.frame(id_, place, len(CONTENT), 1)
    found = reader.stored(place, len(CONTENT), 0)
    assert found is not None
    assert found[3].resident(*found[:3])
    assert reader.stored(place._replace(frames=b"\xff" * 99), len(CONTENT), 0) is None
    reader.close()


def test_a_cold_frame_is_one_read(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    id_, place = stored(vault, CONTENT)
    reader = ChunkReader(vault)
    reader.frame(id_, place, len(CONTENT), 0)  # opens the pack
    asked: list[tuple[int, int]] = []
    pread = os.pread

    def counted(fd: int, size: int, at: int) -> bytes:
        asked.append((at, size))
        return pread(fd, size, at)

    monkeypatch.setattr(os, "pread", counted)
    assert CONTENT[FRAME : 2 * FRAME] == reader.frame(id_, place, len(CONTENT), 1)
    position, size = frame_span(place.frames, len(CONTENT), 1)
    assert [(place.offset + ENTRY_SIZE + position, size)] == asked
    reader.close()


def test_lengths_that_are_wrong_cost_time_and_not_content(vault: Vault) -> None:
    id_, place = stored(vault, CONTENT)
    reader = ChunkReader(vault)
    for lengths in (b"", b"\1", b"\xff" * 40, place.frames[:-1], b"\7" + place.frames[1:]):
        wrong = place._replace(frames=lengths)
        assert CONTENT == reader.chunk(id_, wrong, len(CONTENT))
        for number in range(-(-len(CONTENT) // FRAME)):
            expected = CONTENT[number * FRAME : (number + 1) * FRAME]
            assert expected == reader.frame(id_, wrong, len(CONTENT), number)
    reader.close()


def test_a_pack_whose_salt_is_damaged_is_told(vault: Vault) -> None:
    id_, place = stored(vault, CONTENT)
    path = Path(vault.store.name) / pack_key(place.pack)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    reader = ChunkReader(vault)
    if vault.config.cipher is None:
        assert CONTENT[:FRAME] == reader.frame(id_, place, len(CONTENT), 0)
    else:
        for _ in range(2):
            with pytest.raises(CorruptImage, match=pack_key(place.pack)):
                reader.frame(id_, place, len(CONTENT), 0)
    reader.close()


def test_damage_in_a_frame_is_told_and_leaves_the_others(vault: Vault) -> None:
    id_, place = stored(vault, CONTENT)
    path = Path(vault.store.name) / pack_key(place.pack)
    data = bytearray(path.read_bytes())
    start, _ = frame_span(place.frames, len(CONTENT), 1)
    data[place.offset + ENTRY_SIZE + start + 20] ^= 1
    path.write_bytes(data)
    reader = ChunkReader(vault)
    with pytest.raises(CorruptImage, match=pack_key(place.pack)):
        reader.frame(id_, place, len(CONTENT), 1)
    with pytest.raises(CorruptImage, match=f"at {place.offset}"):
        reader.chunk(id_, place, len(CONTENT))
    assert CONTENT[:FRAME] == reader.frame(id_, place, len(CONTENT), 0)
    reader.close()


def test_a_place_that_is_another_chunks_is_never_believed(vault: Vault) -> None:
    id_, _ = stored(vault, CONTENT)
    _, place = stored(vault, CONTENT[::-1])
    reader = ChunkReader(vault)
    for number in range(2):
        with pytest.raises(CorruptImage):
            reader.frame(id_, place, len(CONTENT), number)
    with pytest.raises(CorruptImage):
        reader.chunk(id_, place, len(CONTENT))
    reader.close()


def test_a_pack_that_is_gone_is_looked_for_elsewhere(vault: Vault) -> None:
    id_, place = stored(vault, CONTENT)
    _, other = stored(vault, CONTENT)
    vault.store.delete(pack_key(place.pack))
    vault.entries.elsewhere = lambda wanted: iter([other] if wanted == id_ else [])
    reader = ChunkReader(vault)
    assert CONTENT[:FRAME] == reader.frame(id_, place, len(CONTENT), 0)
    assert CONTENT == reader.chunk(id_, place, len(CONTENT))
    reader.close()


def test_a_deleted_pack_that_is_open_stays_readable(tmp_path: Path) -> None:
    vault = made(DirectoryStore(str(tmp_path / "r")))
    id_, place = stored(vault, CONTENT)
    reader = ChunkReader(vault)
    reader.frame(id_, place, len(CONTENT), 0)
    vault.store.delete(pack_key(place.pack))
    assert CONTENT == reader.chunk(id_, place, len(CONTENT))
    reader.close()


@pytest.mark.parametrize("encrypted", [False, True])
def test_what_was_repacked_is_one_request_a_frame(*, encrypted: bool) -> None:
    """Maps go on naming the old pack; each frame was asked for there twice, and then cut out of
    the whole chunk from the new one."""
    vault = made(MemoryStore(), encrypted=encrypted)
    id_, place = stored(vault, CONTENT)
    other, moved = stored(vault, CONTENT)
    assert (id_, place[1:]) == (other, moved[1:])
    segment = [(id_, moved, Kind.CHUNK)]
    vault.store.put_new(
        index_key(new_ulid()), encode_segment(segment, vault.repository, vault.hashing)
    )
    vault.store.delete(pack_key(place.pack))
    counted = FaultyStore(vault.store)
    vault.store = vault.entries._store = counted
    reader = ChunkReader(vault)
    assert CONTENT[:FRAME] == reader.frame(id_, place, len(CONTENT), 0)
    before = counted.calls
    for number in range(1, 4):
        expected = CONTENT[number * FRAME : (number + 1) * FRAME]
        assert expected == reader.frame(id_, place, len(CONTENT), number)
    assert CONTENT == reader.chunk(id_, place, len(CONTENT))
    said = [(call.method, call.key) for call in counted.log[before:]]
    assert [("get_range", pack_key(moved.pack))] * 4 == said
    vault.store.delete(pack_key(moved.pack))
    with pytest.raises(CorruptImage, match="is missing"):
        reader.frame(id_, place, len(CONTENT), 0)
    reader.close()
