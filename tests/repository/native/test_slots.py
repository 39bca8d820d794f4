"""Pages and roots: encoded as documented, and bounded before they are believed."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.repository.native.entry import MAX_CONTENT
from nbdsrv.repository.native.hashing import ZERO_ID, Hashing
from nbdsrv.repository.native.pack import MAX_PACK
from nbdsrv.repository.native.sealing import BrokenPayload
from nbdsrv.repository.native.slots import (
    MAX_SIZE,
    SLOT,
    SLOT_SIZE,
    Page,
    Root,
    encode_page,
    slot_form,
)

HASHING = Hashing("blake3")
NAMES = [b"a" * 32, b"b" * 32]
CHUNK = 1 << 16
FORM = slot_form(CHUNK)
ONE = FORM.pack(b"1" * 32, 0, 64, 100, 0, b"")
TWO = FORM.pack(b"2" * 32, 1, 5000, 70, 2, b"\x10\0\0\x20")
NONE = bytes(FORM.size)
PAGE = encode_page(NAMES, ONE + NONE + TWO, FORM)
CONTENT = HASHING.id_of(b"1" * 32 + ZERO_ID + b"2" * 32)


def root(size: int = 40 * CHUNK + 5) -> Root:
    slots = SLOT.pack(b"1" * 32, 0, 64, 100, 0, b"") + bytes(SLOT_SIZE)
    pages = Page(NAMES[:1], slots + SLOT.pack(b"3" * 32, 0, 900, 10, 0, b""), SLOT)
    return Root(size, CHUNK, 16, pages, CONTENT + ZERO_ID + b"c" * 32)


def test_a_page_is_what_was_encoded() -> None:
    page = Page.parse(PAGE, 3, CHUNK)
    assert 3 == len(page)
    assert [b"1" * 32, ZERO_ID, b"2" * 32] == [page.id(n) for n in range(3)]
    assert (NAMES[1], 5000, 70, 2, b"\x10\0\0\x20") == page.place(2)
    assert b"" == page.place(0).frames
    assert [(0, b"1" * 32, page.place(0)), (2, b"2" * 32, page.place(2))] == list(page.places())
    assert CONTENT == page.content(HASHING)
    assert PAGE == encode_page(page.names, page.slots, FORM)
    assert b"NBDPAGE1" + struct.pack("<II", 3, 2) == PAGE[:16]


def test_the_content_of_a_page_does_not_depend_on_where_it_lies() -> None:
    one, two = (FORM.pack(n * 32, 0, at, 9, 1, b"") for n, at in ((b"1", 777), (b"2", 64)))
    moved = Page([b"z" * 32], one + NONE + two, FORM)
    assert CONTENT == moved.content(HASHING)
    assert ZERO_ID == Page((), NONE * 5, FORM).content(HASHING)


def test_a_root_is_what_was_encoded() -> None:
    encoded = root().encode()
    parsed = Root.parse(encoded)
    assert encoded == parsed.encode()
    assert (40 * CHUNK + 5, CHUNK, 16, 3) == (
        parsed.size,
        parsed.chunk_size,
        parsed.page_slots,
        len(parsed),
    )
    assert (41, [16, 16, 9]) == (parsed.chunks, [parsed.slots_of(n) for n in range(3)])
    assert [CONTENT, ZERO_ID, b"c" * 32] == [parsed.content(n) for n in range(3)]
    assert ZERO_ID == parsed.pages.id(1)
    assert (NAMES[0], 900, 10, 0, b"") == parsed.pages.place(2)
    image = struct.pack("<QII", parsed.size, CHUNK, 16) + CONTENT + ZERO_ID + b"c" * 32
    assert HASHING.id_of(image) == parsed.image_id(HASHING)


def test_a_disk_without_bytes() -> None:
    empty = Root.parse(Root(0, CHUNK, 16, Page((), b"", SLOT), b"").encode())
    assert (0, 0, 0) == (empty.size, len(empty), empty.chunks)


@pytest.mark.parametrize("count", [2, 4, 0])
def test_a_page_of_another_length_than_the_root_says(count: int) -> None:
    with pytest.raises(BrokenPayload, match=f"in place of {count}"):
        Page.parse(PAGE, count, CHUNK)


@pytest.mark.parametrize(
    "slot",
    [
        (2, 64, 1, 0),  # no such pack
        ((1 << 32) - 1, 64, 1, 0),
        (0, 63, 1, 0),  # in the header
        (0, MAX_PACK, 1, 0),
        (0, 64, (1 << 32) - 1, 0),
        (0, 64, 1, 3),  # an unknown codec
    ],
)
def test_a_slot_that_leads_to_where_nothing_can_be(slot: tuple[int, int, int, int]) -> None:
    encoded = encode_page(NAMES, FORM.pack(b"1" * 32, *slot, b""), FORM)
    with pytest.raises(BrokenPayload, match="impossible place"):
        Page.parse(encoded, 1, CHUNK)


def test_a_page_for_chunks_of_another_size() -> None:
    with pytest.raises(BrokenPayload, match="another length"):
        Page.parse(PAGE, 3, 4 * CHUNK)


@pytest.mark.parametrize(
    ("size", "chunk", "slots", "pages"),
    [
        (40 * CHUNK, CHUNK, 16, 2),
        (MAX_SIZE + 1, CHUNK, 16, 0),
        ((1 << 64) - 1, 1 << 26, 1 << 14, 0),
        (1, 0, 16, 1),
        (1, CHUNK, 0, 1),
        (1, MAX_CONTENT + 1, 16, 1),
        (1, CHUNK, (1 << 14) + 1, 1),
        (1, 511, 16, 1),
    ],
)
def test_a_root_of_impossible_sizes(size: int, chunk: int, slots: int, pages: int) -> None:
    data = struct.pack("<8sQIIII", b"NBDROOT1", size, chunk, slots, pages, 0) + bytes(80 * pages)
    with pytest.raises(BrokenPayload):
        Root.parse(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"NBDPAGE1",
        b"NBDPAGE1" + struct.pack("<II", (1 << 32) - 1, (1 << 32) - 1),
        b"NBDPAGE1" + struct.pack("<II", 0, 1 << 31),
        PAGE[:-1],
        PAGE + b"x",
        b"X" + PAGE[1:],
    ],
)
def test_counts_that_the_bytes_do_not_bear_out(data: bytes) -> None:
    with pytest.raises(BrokenPayload):
        Page.parse(data, 3, CHUNK)
    with pytest.raises(BrokenPayload):
        Root.parse(data)


@given(st.data())
def test_mutated_maps_are_maps_or_broken(data: st.DataObject) -> None:
    for whole in (PAGE, root().encode()):
        raw = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 5))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        try:
            if whole is PAGE:
                list(Page.parse(raw, 3, CHUNK).places())
            else:
                parsed = Root.parse(bytes(raw))
                list(parsed.pages.places())
                assert len(parsed) * parsed.page_span >= parsed.size
        except BrokenPayload:
            pass
