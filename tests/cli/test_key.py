"""``nbdsrv key``: passphrases come, go and change; nobody is locked out."""

import json
from pathlib import Path

import pytest

from nbdsrv.repository.native.config import RepositoryConfig
from nbdsrv.repository.native.sealing import CIPHER
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.directory import DirectoryStore
from tests.cli.program import nbdsrv, refusal

OLD = {"NBDSRV_PASSPHRASE": "old one"}
NEW = {"NBDSRV_NEW_PASSPHRASE": "new one"}


@pytest.fixture
def repository(tmp_path: Path) -> str:
    """An encrypted one."""
    path = str(tmp_path / "repository")
    Vault.create(DirectoryStore(path), RepositoryConfig(cipher=CIPHER), lambda: "old one")
    return f"repo:{path}"


def opens(repository: str, passphrase: str) -> bool:
    process = nbdsrv("ls", repository, env={"NBDSRV_PASSPHRASE": passphrase})
    assert process.returncode in {0, 1}
    return process.returncode == 0


def listed(repository: str) -> dict[str, str]:
    process = nbdsrv("key", "ls", "--json", repository)
    assert (0, "") == (process.returncode, process.stderr)
    said = json.loads(process.stdout)
    assert repository == said["repository"]
    assert all(row["usable"] and row["kdf"] == "argon2id" for row in said["slots"])
    return {row["slot"]: row["label"] for row in said["slots"]}


def test_add_and_remove(repository: str) -> None:
    (first,) = listed(repository)
    added = nbdsrv("key", "add", repository, "--label", "the vault's", env=OLD | NEW)
    assert (0, "") == (added.returncode, added.stderr)
    second = added.stdout.strip()
    assert {first: "", second: "the vault's"} == listed(repository)
    text = nbdsrv("key", "ls", repository).stdout
    assert [first, second] == [line.split()[0] for line in text.splitlines()]
    assert text.endswith("the vault's\n")
    assert opens(repository, "old one")
    assert opens(repository, "new one")
    removed = nbdsrv("key", "rm", repository, first, env={"NBDSRV_PASSPHRASE": "new one"})
    assert (0, "", "") == (removed.returncode, removed.stdout, removed.stderr)
    assert [second] == list(listed(repository))
    assert not opens(repository, "old one")


@pytest.mark.parametrize("word", ["change", "rotate"])
def test_change_keeps_the_label(repository: str, word: str, tmp_path: Path) -> None:
    (first,) = listed(repository)
    files = {}
    for name, text in (("PASSPHRASE", "old one"), ("NEW_PASSPHRASE", "new one\nignored")):
        path = tmp_path / name
        path.write_text(text)
        files[f"NBDSRV_{name}_FILE"] = str(path)
    changed = nbdsrv("key", word, repository, "--label", "mine", env=files)
    assert (0, "") == (changed.returncode, changed.stderr)
    assert {changed.stdout.strip(): "mine"} == listed(repository)
    assert first not in listed(repository)
    assert opens(repository, "new one")
    assert not opens(repository, "old one")
    back = {"NBDSRV_PASSPHRASE": "new one", "NBDSRV_NEW_PASSPHRASE": "x"}
    assert 0 == nbdsrv("key", word, repository, env=back).returncode
    assert ["mine"] == list(listed(repository).values())


def test_refusals(repository: str, tmp_path: Path) -> None:
    (slot,) = listed(repository)
    wrong = {"NBDSRV_PASSPHRASE": "wrong"}
    for command in (("add",), ("change",), ("rm", slot)):
        word, *more = command
        text = refusal(1, "key", word, repository, *more, env=wrong | NEW)
        assert "opens none of its 1 key slots" in text
        assert "set NBDSRV_PASSPHRASE" in refusal(2, "key", word, repository, *more, env=NEW)
    for word in ("add", "change"):
        assert "set NBDSRV_NEW_PASSPHRASE" in refusal(2, "key", word, repository, env=OLD)
    assert "give one that stays" in refusal(2, "key", "rm", repository, slot, env=OLD)
    assert "no key slot XYZ" in refusal(1, "key", "rm", repository, "XYZ", env=OLD)
    assert "printable" in refusal(2, "key", "add", repository, "--label", "a\nb", env=OLD | NEW)
    assert "no repository there" in refusal(1, "key", "ls", f"repo:{tmp_path}/none")
    assert "not one of nbdsrv's" in refusal(2, "key", "ls", "disk.img")
    assert "leave out the rest" in refusal(2, "key", "ls", f"{repository}#vm")
    assert [slot] == list(listed(repository))


def test_a_plain_repository_has_no_keys(tmp_path: Path) -> None:
    Vault.create(DirectoryStore(str(tmp_path / "r")), RepositoryConfig(), lambda: "")
    assert "not encrypted" in refusal(1, "key", "ls", f"repo:{tmp_path}/r")


def test_slots_of_others_are_shown_and_can_go(repository: str) -> None:
    path = Path(repository.removeprefix("repo:")) / "keys"
    (path / "0.json").write_text("{}")
    assert "cannot be read" in nbdsrv("key", "ls", repository).stdout
    assert 0 == nbdsrv("key", "rm", repository, "0", env=OLD).returncode
    assert 1 == len(listed(repository))
