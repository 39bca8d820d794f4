"""The descriptor: what is understood, what is refused, and that text and meaning go both ways."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.errors import CorruptImage
from nbdsrv.formats.image_file import ImageFile, open_image_file
from nbdsrv.formats.vmdk.descriptor import (
    MAX_DESCRIPTOR,
    MAX_EXTENTS,
    Descriptor,
    ExtentLine,
    parse,
    read_descriptor,
    render,
)

HEAD = b"# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
TYPE = b'createType="vmfs"\n'
EXTENT = b'RW 8 VMFS "flat"\n'


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageFile]:
    path = tmp_path_factory.mktemp("descriptor") / "disk.vmdk"
    path.write_bytes(HEAD + TYPE + EXTENT)
    file = open_image_file(str(path))
    yield file
    file.close()


def test_all_that_is_in_one(file: ImageFile) -> None:
    text = """# Disk DescriptorFile
version=4
encoding="UTF-8"
CID=abe3bf4
parentCID=0000001f
isNativeSnapshot="no"
createType="custom"
parentFileNameHint="../base disk.vmdk"

# Extent description
RW 4192256 SPARSE "disk one-s001.vmdk"
RDONLY 63 FLAT "disk-f002.vmdk" 128
RW 1 ZERO
NOACCESS 9 FLAT "/dev/sda" 63 partitionUUID 1234

# The Disk Data Base
ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "20"
ddb.longContentID = "1f"
"""
    found = parse(file, 0, text.encode() + bytes(100) + b"what was there before")
    assert found == Descriptor(
        create_type="custom",
        extents=(
            ExtentLine(4192256, "SPARSE", "disk one-s001.vmdk"),
            ExtentLine(63, "FLAT", "disk-f002.vmdk", 128, "RDONLY"),
            ExtentLine(1, "ZERO"),
            ExtentLine(9, "FLAT", "/dev/sda", 63, "NOACCESS"),
        ),
        content_id=0xABE3BF4,
        parent_content_id=0x1F,
        parent_name="../base disk.vmdk",
        version="4",
        database={"adaptertype": "lsilogic", "geometry.cylinders": "20", "longcontentid": "1f"},
    )
    assert found.has_parent


def test_without_parent(file: ImageFile) -> None:
    assert not read_descriptor(file, 0, file.size).has_parent
    assert not parse(file, 0, TYPE + EXTENT).has_parent


@pytest.mark.parametrize(
    ("name", "charset"), [("windows-1252", "cp1252"), ("GBK", "gbk"), ("Shift_JIS", "shift_jis")]
)
def test_charsets(file: ImageFile, name: str, charset: str) -> None:
    disk = "Größe" if charset == "cp1252" else "磁盘" if charset == "gbk" else "ディスク"
    text = f'encoding="{name}"\ncreateType="vmfs"\nRW 8 VMFS "{disk}.vmdk"\n'
    assert parse(file, 0, text.encode(charset)).extents[0].name == f"{disk}.vmdk"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (HEAD + EXTENT, "has no createType"),
        (HEAD + TYPE + b"CID=87654321\n", "says cid a second time"),
        (
            HEAD + TYPE + b"RW 8 VMFS flat\n",
            "line 6 of its descriptor is no extent: 'RW 8 VMFS flat'",
        ),
        (HEAD + TYPE + b"rw 8 ZERO\n", "is no extent"),
        (HEAD + TYPE + b"RW -8 ZERO\n", "is no extent"),
        (HEAD + TYPE + b"RW 0 ZERO\n", "an extent of impossible size"),
        (HEAD + TYPE + b"RW 99999999999999999999 ZERO\n", "is no extent"),
        (HEAD + TYPE + b"RW 9999999999999999999 ZERO\n", "an extent of impossible size"),
        (HEAD + TYPE + b'RW 8 FLAT "a" 9999999999999999999\n', "an extent of impossible size or"),
        (HEAD + TYPE + b"RW 10000000000000000 ZERO\n" * 2, "more than 2**63 bytes"),
        (HEAD + TYPE + b"RW 8 ZERO\n" * (MAX_EXTENTS + 1), f"more than {MAX_EXTENTS} extents"),
        (HEAD + TYPE + b"RX 8 VMFS\n", "line 6 of its descriptor makes no sense: 'RX 8 VMFS'"),
        (HEAD.replace(b"12345678", b"12345678z") + TYPE, "cid is '12345678z'"),
        (HEAD.replace(b"ffffffff", b"123456789") + TYPE, "parentcid is '123456789'"),
        (
            HEAD + b'createType="vmf\xff"\n',
            "at 79: its descriptor is in utf-8, but this byte is not",
        ),
        (b'encoding="klingon"\n\xe4' + TYPE, "at 19: its descriptor is in klingon, but this"),
        (b"", "has no createType"),
    ],
)
def test_what_is_refused(file: ImageFile, data: bytes, what: str) -> None:
    with pytest.raises(CorruptImage) as raised:
        parse(file, 0, data)
    assert what in str(raised.value)
    assert str(raised.value).startswith(f"corrupt image: {file.path} at ")
    assert "\n" not in str(raised.value)


def test_too_long(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_bytes(HEAD + TYPE)
    os.truncate(path, MAX_DESCRIPTOR + 1)
    file = open_image_file(str(path))
    with pytest.raises(CorruptImage, match=f"a descriptor of {MAX_DESCRIPTOR + 1} bytes"):
        read_descriptor(file, 0, file.size)
    file.close()


names = st.text(
    st.characters(exclude_characters='"', exclude_categories=("C", "Z")), min_size=1, max_size=20
)
ids = st.integers(0, 0xFFFFFFFF)
extents = st.builds(
    ExtentLine,
    st.integers(1, 1 << 50),
    st.sampled_from(("FLAT", "SPARSE", "VMFS", "SESPARSE")),
    names,
    access=st.sampled_from(("RW", "RDONLY", "NOACCESS")),
) | st.builds(ExtentLine, st.integers(1, 1 << 50), st.just("ZERO"))
descriptors = st.builds(
    Descriptor,
    st.sampled_from(("monolithicSparse", "streamOptimized")),
    st.lists(extents, max_size=5).map(tuple),
    ids,
    ids,
    st.just("") | names,
    database=st.dictionaries(st.sampled_from(("uuid", "adaptertype")), names),
)


@given(descriptors)
@settings(max_examples=100)
def test_text_and_meaning_go_both_ways(file: ImageFile, descriptor: Descriptor) -> None:
    assert parse(file, 0, render(descriptor).encode()) == descriptor


@given(st.binary(max_size=60), st.integers(0, len(HEAD + TYPE + EXTENT)))
@settings(max_examples=200)
def test_any_bytes_are_understood_or_refused(file: ImageFile, junk: bytes, at: int) -> None:
    text = HEAD + TYPE + EXTENT
    refused, found = "", None
    try:
        found = parse(file, 0, text[:at] + junk + text[at + len(junk) // 2 :])
    except CorruptImage as error:
        refused = str(error)
    assert found is not None or refused.startswith("corrupt image: ")
    assert "\n" not in refused
