"""Points: one object each, and nothing in it is believed unseen."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.native.entry import Kind
from nbdsrv.repository.native.hashing import Hashing
from nbdsrv.repository.native.layout import new_ulid, point_key
from nbdsrv.repository.native.pack import Pack, PackKind
from nbdsrv.repository.native.point import (
    DiskRecord,
    PointRecord,
    Ref,
    decode_point,
    encode_point,
)
from nbdsrv.repository.native.sealing import Codec, Sealing, compress

OWNER = b"sixteen bytes id"
SEALINGS = {"plain": Sealing(), "encrypted": Sealing(bytes(32))}
ULID = new_ulid()
KEY = point_key("vm", ULID)
ROOT = Ref(id="0a" * 32, pack="0b" * 32, offset=64, length=100, codec=1)
RECORD = PointRecord(
    id=ULID,
    group="vm",
    created=1_700_000_000.5,
    labels={"why": "because"},
    disks=[DiskRecord(name="sda", size=1 << 40, root=ROOT, image_id="0c" * 32)],
    blobs={"vm.xml": "<domain/>"},
)


def encoded(content: bytes, *, kind: Kind = Kind.POINT, entries: int = 1) -> bytes:
    """A point's object with that content, plain."""
    hashing = Hashing("blake3")
    pack = Pack(PackKind.POINT, OWNER, Sealing(), hashing)
    codec, body = compress(content)
    for _ in range(entries):
        pack.add(kind, codec, len(content), hashing.id_of(content), body)
    return bytes(pack.finish())


def decoded(data: bytes, key: str = KEY, sealing: Sealing | None = None) -> PointRecord:
    sealing = sealing or Sealing()
    return decode_point(key, data, OWNER, sealing, Hashing("blake3", sealing.id_key))


def altered(**fields: object) -> bytes:
    return encoded(msgspec.json.encode({**msgspec.to_builtins(RECORD), **fields}))


@pytest.mark.parametrize("name", SEALINGS)
def test_a_point_comes_back(name: str) -> None:
    sealing = SEALINGS[name]
    data = bytes(encode_point(RECORD, OWNER, sealing, Hashing("blake3", sealing.id_key)))
    assert RECORD == decoded(data, sealing=sealing)
    content = msgspec.json.encode(RECORD)
    assert (compress(content)[1] in data) == (name == "plain")
    assert RECORD.disk("sda") is not None
    assert RECORD.disk("sdb") is None


@given(st.sampled_from(list(SEALINGS)), st.data())
def test_no_mutation_makes_another_point(name: str, data: st.DataObject) -> None:
    sealing = SEALINGS[name]
    raw = encode_point(RECORD, OWNER, sealing, Hashing("blake3", sealing.id_key))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))]
    said = ""
    try:
        assert RECORD == decoded(bytes(raw), sealing=sealing)
    except CorruptImage as error:
        said = str(error)
    assert not said or said.startswith(f"corrupt repository: {KEY}: ")


def test_fields_of_later_versions_are_ignored_and_other_versions_refused() -> None:
    assert RECORD == decoded(altered(mood="fine"))
    with pytest.raises(CorruptImage, match="version 2; use a newer nbdsrv"):
        decoded(altered(v=2))


def test_a_point_under_another_name_is_none() -> None:
    data = altered()
    for key in (point_key("other", ULID), point_key("vm", new_ulid()), "points/vm/x.pt"):
        with pytest.raises(CorruptImage, match="it is the point"):
            decoded(data, key)


ROOT_FIELDS = msgspec.to_builtins(ROOT)
DISK_FIELDS = msgspec.to_builtins(RECORD.disks[0])


@pytest.mark.parametrize(
    "root",
    [
        {"id": ""},
        {"id": "0A" * 32},
        {"pack": "../../../etc/passwd"},
        {"pack": "0b" * 31},
        {"pack": " " * 64},
        {"offset": -1},
        {"offset": 10**18},
        {"length": -56},
        {"length": 1 << 40},
        {"length": None},
    ],
)
def test_a_root_that_lies_nowhere(root: dict[str, object]) -> None:
    disk = {**DISK_FIELDS, "root": {**ROOT_FIELDS, **root}}
    with pytest.raises(CorruptImage):
        decoded(altered(disks=[disk]))


@pytest.mark.parametrize(
    "fields",
    [
        {"created": -1},
        {"created": 1e300},
        {"created": "yesterday"},
        {"disks": [DISK_FIELDS, DISK_FIELDS]},
        {"disks": [{**DISK_FIELDS, "size": -1}]},
        {"disks": [{**DISK_FIELDS, "size": 1 << 60}]},
        {"disks": 7},
        {"labels": {"a": 1}},
    ],
)
def test_what_no_point_says(fields: dict[str, object]) -> None:
    with pytest.raises(CorruptImage):
        decoded(altered(**fields))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"NBDPACK1",
        encoded(b""),
        encoded(b"{}"),
        encoded(b"\xff\xfe"),
        encoded(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        encoded(b"{}", kind=Kind.CHUNK),
        encoded(b"{}", entries=2),
        encoded(b"{}", entries=0),
    ],
    ids=[f"number {n}" for n in range(9)],  # their bytes differ from process to process
)
def test_objects_that_are_no_points(data: bytes) -> None:
    with pytest.raises(CorruptImage):
        decoded(data)


def test_a_point_of_another_repository_or_kind_of_pack() -> None:
    data = altered()
    with pytest.raises(CorruptImage, match="another repository"):
        decode_point(KEY, data, b"x" * 16, Sealing(), Hashing("blake3"))
    pack = Pack(PackKind.METAS, OWNER, Sealing(), Hashing("blake3"))
    pack.add(Kind.POINT, Codec.RAW, 2, Hashing("blake3").id_of(b"{}"), b"{}")
    with pytest.raises(CorruptImage, match="no restore point"):
        decoded(bytes(pack.finish()))
