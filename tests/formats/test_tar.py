"""Members of archives that tar programs write are found where they lie; broken ones are refused."""

import io
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.formats.image_file import ImageFile, open_image_file
from nbdsrv.formats.tar import MAX_EXTENSION, Member, walk

LONG = "directory/" * 30 + "disk.vmdk"
CONTENTS = {"vm.ovf": b"<x/>", "empty": b"", "disk.vmdk": b"d" * 512, LONG: b"l" * 513}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@contextmanager
def image_file(path: Path, data: bytes | None = None) -> Iterator[ImageFile]:
    if data is not None:
        path.write_bytes(data)
    file = open_image_file(str(path))
    try:
        yield file
    finally:
        file.close()


def packed(kind: int, contents: dict[str, bytes] = CONTENTS) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=kind) as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return target.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_members_of_every_format(tmp_path: Path, kind: str) -> None:
    contents = dict(CONTENTS)
    if kind == "ustar":
        del contents[LONG]
        contents["p" * 90 + "/" + "n" * 90] = b"with a prefix"
    with image_file(tmp_path / "a.tar", packed(FORMATS[kind], contents)) as file:
        found = {m.name: file.read(m.position, m.size, m.name) for m in walk(file)}
    assert found == contents
    assert list(found) == list(contents)


def test_what_is_no_regular_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(b"content")
    (tmp_path / "in" / "link").symlink_to("file")
    (tmp_path / "in" / "hard").hardlink_to(tmp_path / "in" / "file")
    command = ["tar", "-cf", tmp_path / "a.tar", "-C", tmp_path, "in/file", "in"]
    subprocess.run(command, check=True, timeout=20)
    with image_file(tmp_path / "a.tar") as file:
        assert [(member.name, member.size) for member in walk(file)] == [("in/file", 7)]


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_members_of_more_than_8_gib(tmp_path: Path, kind: str) -> None:
    size = (9 << 30) + 5
    info = tarfile.TarInfo("huge")
    info.size = size
    with open(tmp_path / "a.tar", "wb") as target:
        target.write(info.tobuf(FORMATS[kind]))
        start = target.tell()
        target.seek(start + size + -size % 512)
        info = tarfile.TarInfo("behind")
        target.write(info.tobuf(FORMATS[kind]) + bytes(1024))
    with image_file(tmp_path / "a.tar") as file:
        assert list(walk(file)) == [
            Member("huge", start, size),
            Member("behind", start + size + -size % 512 + 512, 0),
        ]


def test_names_of_all_sorts(tmp_path: Path) -> None:
    contents = {"größe.vmdk": b"1", "line\nbreak": b"2", "rot\x1b[31m": b"3"}
    with image_file(tmp_path / "a.tar", packed(tarfile.GNU_FORMAT, contents)) as file:
        names = [member.name for member in walk(file)]
    assert names == ["größe.vmdk", "line\\nbreak", "rot\\x1b[31m"]


def test_archive_without_an_end(tmp_path: Path) -> None:
    whole = packed(tarfile.GNU_FORMAT, {"a": b"1" * 512})
    with image_file(tmp_path / "a.tar", whole[:1024]) as file:
        assert list(walk(file)) == [Member("a", 512, 512)]
    with (
        image_file(tmp_path / "b.tar", whole[:1023]) as file,
        pytest.raises(CorruptImage, match="at 0: member a of 512 bytes reaches past the end"),
    ):
        list(walk(file))


def test_sparse_members(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.seek(1 << 20)
        file.write(b"x" * 4096)
    for kind in ("gnu", "pax"):
        command = ["tar", "--sparse", f"--format={kind}", "-cf", tmp_path / "a.tar", "sparse"]
        subprocess.run(command, check=True, timeout=20, cwd=tmp_path)
        with (
            image_file(tmp_path / "a.tar") as archive,
            pytest.raises(UnsupportedImage, match="stored sparse; pack it again without --sparse"),
        ):
            list(walk(archive))


def test_a_limit_on_members(tmp_path: Path) -> None:
    data = packed(tarfile.GNU_FORMAT, {str(number): b"" for number in range(5)})
    with image_file(tmp_path / "a.tar", data) as file:
        assert len(list(walk(file, 6))) == 5
        with pytest.raises(CorruptImage, match="more than 4 members"):
            list(walk(file, 4))


def checksummed(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("position", "data", "what"),
    [
        (124, b"9", "at 0: tar header whose size is b'9"),
        (124, b"\xff" * 12, "at 0: tar header with an impossible size"),
        (124, b"\x80" + b"\x7f" * 11, "at 0: tar header with an impossible size"),
        (124, b"\x80" + bytes(5) + b"\1" + bytes(5), "reaches past the end"),
        (156, b"x", "a broken record in a pax header"),
    ],
)
def test_broken_headers(tmp_path: Path, position: int, data: bytes, what: str) -> None:
    archive = bytearray(packed(tarfile.USTAR_FORMAT, {"a": b"12 path=ab\n"}))
    archive[position : position + len(data)] = data
    archive[:512] = checksummed(archive[:512])
    with (
        image_file(tmp_path / "a.tar", bytes(archive)) as file,
        pytest.raises(CorruptImage) as raised,
    ):
        list(walk(file))
    assert what in str(raised.value)


def test_wrong_checksum(tmp_path: Path) -> None:
    archive = bytearray(packed(tarfile.GNU_FORMAT))
    archive[0] ^= 1
    with (
        image_file(tmp_path / "a.tar", bytes(archive)) as file,
        pytest.raises(CorruptImage, match="at 0: tar header with checksum"),
    ):
        list(walk(file))


def extended(kind: bytes, content: bytes, size: int | None = None) -> bytes:
    info = tarfile.TarInfo("extension")
    info.type = kind
    info.size = len(content) if size is None else size
    header = info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)
    return header + packed(tarfile.USTAR_FORMAT, {"a": b"1"})


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"path=abc\n", "a broken record"),
        (b"0 path=abc\n", "a broken record"),
        (b"9999999 path=abc\n", "a broken record"),
        (b"12 path=ab\n", "a broken record"),
        (b"11 size=-1\n", "an impossible size"),
        (b"34 size=9999999999999999999999999\n", "an impossible size"),
        (b"22 size=1000000000000\n", "reaches past the end"),
        (b"8 a=bc\n\n" * 5000, "more than 4096 records"),
    ],
)
def test_broken_pax_headers(tmp_path: Path, content: bytes, what: str) -> None:
    with (
        image_file(tmp_path / "a.tar", extended(b"x", content)) as file,
        pytest.raises(CorruptImage, match=what),
    ):
        list(walk(file))


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_extension_that_is_too_long(tmp_path: Path, kind: bytes) -> None:
    data = extended(kind, bytes(MAX_EXTENSION + 1))
    with (
        image_file(tmp_path / "a.tar", data) as file,
        pytest.raises(CorruptImage, match=f"an extended tar header of {MAX_EXTENSION + 1} bytes"),
    ):
        list(walk(file))


ARCHIVES = [packed(kind) for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)]


@given(
    st.sampled_from(ARCHIVES),
    st.lists(st.tuples(st.integers(0, 6000), st.binary(min_size=1, max_size=12)), max_size=3),
    st.booleans(),
)
@settings(max_examples=300)
def test_any_change_is_understood_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    archive: bytes,
    changes: list[tuple[int, bytes]],
    repaired: bool,
) -> None:
    mutant = bytearray(archive)
    for position, data in changes:
        mutant[position : position + len(data)] = data
    if repaired:  # so that what lies behind the checksum is reached
        for start in range(0, min(6144, len(mutant)), 512):
            if any(mutant[start : start + 512]) and archive[start + 257 : start + 262] == b"ustar":
                mutant[start : start + 512] = checksummed(mutant[start : start + 512])
    with image_file(tmp_path_factory.getbasetemp() / "mutant.tar", bytes(mutant)) as file:
        try:
            found = list(walk(file))
        except DiskError as error:
            found = []
            text = str(error)
            assert text.count("\n") == 0
        for member in found:
            assert 0 < member.position <= member.position + member.size <= file.size
