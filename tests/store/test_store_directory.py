"""Objects as files: what is left behind, by whom, and on which file systems."""

import errno
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from nbdsrv.store import create_only
from nbdsrv.store.directory import DirectoryStore
from nbdsrv.store.store import ObjectMissing, StoreError
from tests.store.privileged import run_on_small_disk


def below(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def test_nothing_is_left_but_the_object(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path / "repo"))
    store.put_new("packs/0f/a", b"x")
    store.put_new("packs/0f/a", b"y")
    store.put("packs/0f/a", b"z")
    store.put_new("top", b"")
    assert below(tmp_path / "repo") == [".tmp", "packs", "packs/0f", "packs/0f/a", "top"]
    store.delete("packs/0f/a")
    assert below(tmp_path / "repo") == [".tmp", "packs", "packs/0f", "top"]


def test_who_only_reads_makes_nothing(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path / "repo"))
    assert list(store.list("")) == []
    with pytest.raises(ObjectMissing):
        store.get("a")
    store.delete("a")
    store.close()
    assert below(tmp_path) == []


def test_others_may_not_look_into_a_root_that_is_made_here(tmp_path: Path) -> None:
    DirectoryStore(str(tmp_path / "repo")).put_new("packs/a", b"x")
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in below(tmp_path)}
    assert modes == {"repo": 0o700, "repo/.tmp": 0o700, "repo/packs": 0o700, "repo/packs/a": 0o600}


def test_a_root_that_is_shared_shares_what_is_put(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    before = os.umask(0o002)
    try:
        DirectoryStore(str(tmp_path)).put_new("packs/a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "packs").stat().st_mode) == 0o770
    assert stat.S_IMODE((tmp_path / "packs/a").stat().st_mode) == 0o660


def test_other_things_in_the_directory_are_not_shown(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path))
    store.put_new("a/one", b"x")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "lost+found" / "a").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"")
    (tmp_path / "a" / "one~").write_bytes(b"")
    (tmp_path / "a" / "loop").symlink_to("..")
    os.mkfifo(tmp_path / "pipe")
    assert [row.key for row in store.list("")] == ["a/one"]
    for key in ("pipe", "a"):
        with pytest.raises(ObjectMissing):  # and no waiting for who writes into it
            store.get(key)


def test_times_are_the_files(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path))
    store.put_new("a", b"x")
    os.utime(tmp_path / "a", (1e9, 1e9))
    assert [row.modified for row in store.list("")] == [1e9]


def test_temporaries_of_the_dead_go_when_they_are_a_day_old(tmp_path: Path) -> None:
    old = time.time() - 25 * 3600
    temporaries = tmp_path / ".tmp"
    temporaries.mkdir()
    for name, modified in (
        ("123-0123456789abcdef", old),
        ("124-0123456789abcdef", time.time()),
        ("somebody-elses", old),
    ):
        (temporaries / name).write_bytes(b"half")
        os.utime(temporaries / name, (modified, modified))
    store = DirectoryStore(str(tmp_path))
    list(store.list(""))
    assert len(below(temporaries)) == 3
    store.put_new("a", b"x")
    assert below(temporaries) == ["124-0123456789abcdef", "somebody-elses"]


def test_directories_that_were_removed_are_made_again(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path / "repo"))
    for number in range(2):
        assert store.put_new(f"packs/0f/{number}", b"x")
        store.delete(f"packs/0f/{number}")
        (tmp_path / "repo/packs/0f").rmdir()
        (tmp_path / "repo/packs").rmdir()
        (tmp_path / "repo/.tmp").rmdir()
    store.put("packs/0f/3", b"x")
    assert [row.key for row in store.list("")] == ["packs/0f/3"]


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A file system such as exFAT; returns what was asked of it."""
    asked: list[str] = []

    def link(source: str, target: str) -> None:
        asked.append(target)
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), target)

    monkeypatch.setattr(os, "link", link)
    return asked


def test_without_links_a_rename_that_replaces_nothing(
    tmp_path: Path, without_links: list[str]
) -> None:
    store = DirectoryStore(str(tmp_path))
    won = []

    def create(number: int) -> None:
        if store.put_new("a", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert without_links
    assert len(won) == 1
    assert store.get("a") == b"%d" % won[0]
    assert below(tmp_path) == [".tmp", "a"]
    temporary = tmp_path / "temporary"
    temporary.write_bytes(b"late")
    assert not create_only.link_or_rename(str(temporary), str(tmp_path / "a"))
    assert store.get("a") == b"%d" % won[0]


def test_without_either_it_says_so(
    tmp_path: Path, without_links: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create_only, "_RENAME_NOREPLACE", 1 << 20)  # a flag nobody knows
    store = DirectoryStore(str(tmp_path))
    with pytest.raises(StoreError, match="not supported") as caught:
        store.put_new("a", b"x")
    assert caught.value.errno == errno.ENOTSUP
    assert below(tmp_path) == [".tmp"]


def test_a_link_whose_answer_was_lost_is_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def link(source: str, target: str) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, "", target)

    monkeypatch.setattr(os, "link", link)
    assert DirectoryStore(str(tmp_path)).put_new("a", b"x")


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.EROFS])
def test_what_the_system_says_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = DirectoryStore(str(tmp_path))
    store.put_new("a", b"x")

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    for call, act in (
        ("fdatasync", lambda: store.put_new("b", b"x")),
        ("rename", lambda: store.put("b", b"x")),
        ("unlink", lambda: store.delete("a")),
        ("pread", lambda: store.get("a")),
        ("scandir", lambda: list(store.list(""))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            with pytest.raises(StoreError) as caught:
                act()
        assert caught.value.errno == number
        assert str(tmp_path) in str(caught.value)
        assert os.strerror(number) in str(caught.value)
    assert below(tmp_path) == [".tmp", "a"]


def test_a_file_where_a_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "repo").write_bytes(b"")
    store = DirectoryStore(str(tmp_path / "repo"))
    with pytest.raises(StoreError) as caught:
        store.put_new("a", b"x")
    assert caught.value.errno == errno.ENOTDIR
    with pytest.raises(ObjectMissing):
        store.get("a")


def test_a_full_disk_keeps_no_half_file(tmp_path: Path) -> None:
    run_on_small_disk(
        tmp_path,
        """
        store = DirectoryStore(disk)
        store.put_new("packs/a", bytes(300_000))
        for put in (store.put_new, store.put):
            try:
                put("packs/b", bytes(900_000))
            except StoreError as error:
                assert error.errno == errno.ENOSPC, error
                assert str(error) == disk + "/packs/b: No space left on device", error
            else:
                raise AssertionError("it fitted")
        assert os.listdir(disk + "/.tmp") == []
        assert [row.key for row in store.list("")] == ["packs/a"]
        assert store.put_new("packs/b", bytes(500_000))  # the room is there again
        """,
    )


def test_a_mount_that_is_read_only(tmp_path: Path) -> None:
    run_on_small_disk(
        tmp_path,
        """
        DirectoryStore(disk).put_new("packs/a", b"content")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        store = DirectoryStore(disk)
        assert store.get("packs/a") == b"content"
        assert store.get_range("packs/a", 3, 4) == b"tent"
        assert [row.key for row in store.list("")] == ["packs/a"]
        for act in (
            lambda: store.put_new("packs/b", b""),
            lambda: store.put("packs/a", b""),
            lambda: store.delete("packs/a"),
        ):
            try:
                act()
            except StoreError as error:
                assert error.errno == errno.EROFS, error
                assert disk + "/packs/" in str(error), error
            else:
                raise AssertionError("it was written")
        assert store.put_new("packs/a", b"other") is False
        """,
    )


def test_a_disk_without_room_for_names(tmp_path: Path) -> None:
    run_on_small_disk(
        tmp_path,
        """
        subprocess.run(["mount", "-o", "remount,nr_inodes=4", disk], check=True)
        store = DirectoryStore(disk)  # the root, .tmp, a temporary, and a file called packs
        try:
            store.put_new("packs/a", b"x")
            store.put_new("packs/b", b"x")
        except StoreError as error:
            assert error.errno == errno.ENOSPC, error
        else:
            raise AssertionError("it fitted")
        assert os.listdir(disk + "/.tmp") == []
        """,
    )


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to the disk, in order; it is done all the same."""
    done: list[str] = []

    def watch(name: str, *, by_descriptor: bool = False) -> None:
        real = getattr(os, name)

        def call(*args: object) -> object:
            shown = os.readlink(f"/proc/self/fd/{args[0]}") if by_descriptor else args[-1]
            if name == "mkdir":
                shown = args[0]
            if ".tmp/" in str(shown):
                shown = "a temporary"
            done.append(f"{name} {shown}")
            return real(*args)

        monkeypatch.setattr(os, name, call)

    watch("fdatasync", by_descriptor=True)
    watch("fsync", by_descriptor=True)
    for name in ("link", "rename", "mkdir"):
        watch(name)
    return done


def test_bytes_are_durable_before_a_name_and_names_before_it_returns(
    tmp_path: Path, order: list[str]
) -> None:
    root = tmp_path / "repo"
    store = DirectoryStore(str(root))
    store.put_new("packs/0f/a", b"x")
    assert order == [
        f"mkdir {root}",
        f"fsync {tmp_path}",
        f"mkdir {root}/.tmp",
        "fdatasync a temporary",
        f"mkdir {root}/packs",
        f"fsync {root}",
        f"mkdir {root}/packs/0f",
        f"fsync {root}/packs",
        f"link {root}/packs/0f/a",
        f"fsync {root}/packs/0f",
    ]
    order.clear()
    store.put("packs/0f/a", b"x")
    assert order == [
        "fdatasync a temporary",
        f"rename {root}/packs/0f/a",
        f"fsync {root}/packs/0f",
    ]


def test_what_another_writer_has_made_is_made_durable_too(tmp_path: Path, order: list[str]) -> None:
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "a").write_bytes(b"x")
    order.clear()
    store = DirectoryStore(str(tmp_path))
    assert not store.put_new("packs/a", b"x")
    assert order == [f"fsync {tmp_path}/packs"]
    order.clear()
    assert store.put_new("packs/b", b"x")
    assert f"fsync {tmp_path}" in order
