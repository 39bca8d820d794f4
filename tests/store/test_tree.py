"""Other tools' directories, read only: on this host and in a bucket."""

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.errors import CorruptImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.store import directory_tree
from nbdsrv.store.directory_tree import DirectoryTree
from nbdsrv.store.s3_tree import S3Tree
from nbdsrv.store.store import ObjectMissing, StoreError
from nbdsrv.store.tree import Tree, joined

FILES = {
    ".chunks/00ff/a.b": b"x" * 100_000,
    ".merge.json": b"{}",
    "vm/2026-01-01T00:00:00Z/index.json.blob": b"index",
    "vm/2026-01-01T00:00:00Z/empty": b"",
    "top": b"0123456789",
}

Make = Callable[[Mapping[str, bytes]], Tree]


@pytest.fixture(params=["directory", "directory without openat2", "s3"])
def make(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Make]:
    trees: list[Tree] = []
    if request.param == "s3":
        service, bucket = (request.getfixturevalue(name) for name in ("service", "bucket"))
        options = request.getfixturevalue("options")

        def make(files: Mapping[str, bytes]) -> Tree:
            for path, data in files.items():
                service.client.put_object(Bucket=bucket, Key=f"some/prefix/{path}", Body=data)
            trees.append(S3Tree(bucket, "some/prefix", options))
            return trees[-1]
    else:
        if request.param != "directory":
            monkeypatch.setattr(directory_tree, "_openat2", None)

        def make(files: Mapping[str, bytes]) -> Tree:
            for path, data in files.items():
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).write_bytes(data)
            trees.append(DirectoryTree(str(tmp_path)))
            return trees[-1]

    yield make
    for tree in trees:
        tree.close()
        tree.close()


def test_a_tree_shows_what_lies_in_it(make: Make) -> None:
    tree = make(FILES)
    assert [(n.name, n.directory, n.size) for n in tree.entries()] == [
        (".chunks", True, 0),
        (".merge.json", False, 2),
        ("top", False, 10),
        ("vm", True, 0),
    ]
    inside = tree.entries("vm/2026-01-01T00:00:00Z")
    assert [(n.name, n.size) for n in inside] == [("empty", 0), ("index.json.blob", 5)]
    assert tree.entries("no/such") == []
    assert tree.entries("top") == []


def test_files_are_read_whole_and_in_part(make: Make) -> None:
    tree = make(FILES)
    for path, data in FILES.items():
        assert tree.read(path) == data
    assert tree.read_range("top", 2, 5) == b"23456"
    with pytest.raises(StoreError, match="top"):
        tree.read_range("top", 8, 3)
    with pytest.raises(StoreError, match="more than 99999") as caught:
        tree.read(".chunks/00ff/a.b", 99_999)
    assert caught.value.errno == errno.EFBIG


def test_what_is_missing_is_said_to_be(make: Make) -> None:
    tree = make(FILES)
    for path in ("nothing", "vm/nothing", "top/nothing"):
        with pytest.raises(ObjectMissing):
            tree.read(path)
        with pytest.raises(ObjectMissing):
            tree.read_range(path, 0, 1)
        assert tree.find(path) is None
    with pytest.raises(StoreError):
        tree.read("vm")


def test_finding_tells_files_from_directories(make: Make) -> None:
    tree = make(FILES)
    file = tree.find("vm/2026-01-01T00:00:00Z/index.json.blob")
    assert file is not None
    assert (file.name, file.directory, file.size) == ("index.json.blob", False, 5)
    assert file.modified > 1e9
    directory = tree.find("vm/2026-01-01T00:00:00Z")
    assert directory is not None
    assert directory.directory


@pytest.mark.parametrize("path", ["../top", "/etc/passwd", "vm/../top", "a//b", ".", "vm/", "a\0b"])
def test_no_path_leads_out(make: Make, path: str) -> None:
    tree = make(FILES)
    for call in (tree.read, tree.find, tree.entries, tree.open_file):
        if call == tree.open_file and tree.distant:
            continue
        with pytest.raises(CorruptImage, match="no path below it"):
            call(path)


@pytest.fixture(params=["openat2", "without"])
def tree(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tree]:
    if request.param == "without":
        monkeypatch.setattr(directory_tree, "_openat2", None)
    (tmp_path / "secret").write_bytes(b"not for you")
    root = tmp_path / "root"
    (root / "below").mkdir(parents=True)
    (root / "below" / "file").write_bytes(b"inside")
    tree = DirectoryTree(str(root))
    yield tree
    tree.close()


@pytest.mark.parametrize("target", ["../secret", "{tmp}/secret", "below/../../secret"])
def test_links_that_lead_out_are_refused(tree: Tree, tmp_path: Path, target: str) -> None:
    root = tmp_path / "root"
    (root / "link").symlink_to(target.format(tmp=tmp_path))
    (root / "directory").symlink_to("..")
    for path in ("link", "directory/secret"):
        with pytest.raises(CorruptImage, match="leads out"):
            tree.read(path)
        with pytest.raises(CorruptImage, match="leads out"):
            tree.open_file(path)
    assert [node.name for node in tree.entries()] == ["below"]


def test_links_within_are_followed(tree: Tree, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "link").symlink_to("below/file")
    (root / "directory").symlink_to("below")
    assert tree.read("link") == b"inside"
    assert tree.read("directory/file") == b"inside"
    assert [(n.name, n.directory) for n in tree.entries()] == [
        ("below", True),
        ("directory", True),
        ("link", False),
    ]


def test_loops_and_pipes_are_errors_and_nothing_waits(tree: Tree, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    with pytest.raises(CorruptImage, match="leads out"):
        tree.read("loop")
    with pytest.raises(StoreError, match="no regular file"):
        tree.read("pipe")
    assert [node.name for node in tree.entries()] == ["below"]


def test_a_root_may_be_a_link_and_must_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    tree = DirectoryTree(str(tmp_path / "link"))
    assert tree.read("file") == b"x"
    tree.close()
    with pytest.raises(StoreError, match="is closed"):
        tree.read("file")
    with pytest.raises(StoreError, match="no such directory"):
        DirectoryTree(str(tmp_path / "none"))
    with pytest.raises(StoreError):
        DirectoryTree(str(tmp_path / "real" / "file"))


def test_a_file_opens_as_what_formats_read(tree: Tree) -> None:
    fd = tree.open_file("below/file")
    assert fd is not None
    file = ImageFile.from_descriptor(tree.full("below/file"), fd)
    assert (file.read(0, 6, "all"), file.size, file.writable) == (b"inside", 6, False)
    assert file.path.endswith("root/below/file")
    file.close()


def test_threads_may_use_a_tree_at_once_while_it_is_closed(tree: Tree) -> None:
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(200):
                assert tree.read("below/file") == b"inside"
        except StoreError as error:
            assert "is closed" in str(error)  # noqa: PT017 - the other outcome is fine too
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    tree.close()
    for thread in threads:
        thread.join()
    assert not failures


@given(
    st.lists(st.sampled_from(["..", ".", "", "a", "b"]), max_size=8), st.sampled_from(["", "x/y"])
)
def test_relative_paths_lead_where_the_file_system_would(parts: list[str], start: str) -> None:
    relative = "/".join(parts)
    expected = os.path.normpath(f"/{start}/./{relative}")
    depth = start.count("/") + 1 if start else 0
    climbs = False
    for part in parts:
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        climbs |= depth < 0
    if relative.startswith("/") or climbs:
        with pytest.raises(CorruptImage, match="leads out"):
            joined("tree", start, relative)
    else:
        assert joined("tree", start, relative) == expected.strip("/")
