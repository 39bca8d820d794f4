"""A directory that cannot be read hides nothing but what is in it, whatever the kind."""

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from nbdsrv.disk.workers import Workers
from nbdsrv.store.directory_tree import DirectoryTree
from nbdsrv.store.store import StoreError
from nbdsrv.store.tree import Node
from tests.cli.program import hidden_from, nbdsrv
from tests.disk.threads import running_workers
from tests.repository.benji.storage import Storage
from tests.repository.casync.encoder import written
from tests.repository.pbs.encoder import Datastore
from tests.repository.pbs.opened import T0
from tests.repository.restic.opened import opened
from tests.repository.virtnbdbackup.backups import Backups, random_disk

DISK = bytes(random_disk(1 << 20, 7))


@pytest_asyncio.fixture
async def workers() -> AsyncIterator[Workers]:
    async with running_workers() as running:
        yield running


def _pbs(root: Path) -> None:
    store = Datastore(root)
    for group in ("vm/1", "ns/vm/1", "vm/2"):
        store.snapshot(group, T0, {"drive-scsi0": DISK})


def _casync(root: Path) -> None:
    for name in ("one", "two"):
        (root / name).mkdir(parents=True)
        sizes = (1024, len(DISK), len(DISK))
        written(root / name / "vm-2026-01-01.caibx", DISK, [len(DISK)], sizes=sizes)


def _benji(root: Path) -> None:
    storage = Storage(root)
    for number in (1, 2):
        storage.version(f"V{number:010d}", DISK)


def _virtnbdbackup(root: Path) -> None:
    for name in ("one", "two"):
        (root / name).mkdir(parents=True)
        Backups(root / name, bytearray(DISK), packed=1).full()


KINDS: dict[str, tuple[Callable[[Path], None], Sequence[str], int]] = {
    "pbs": (_pbs, ["vm/1", "ns/ns", "vm/2/2026-01-01T00:00:00Z"], 3),
    "casync": (_casync, ["two"], 2),
    "benji": (_benji, ["versions/"], 2),
    "virtnbdbackup": (_virtnbdbackup, ["two"], 2),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_the_others_are_listed(
    kind: str, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, places, count = KINDS[kind]
    root = tmp_path / "root"
    make(root)
    (root / "lost+found").mkdir()
    entries, unreadable = DirectoryTree.entries, ""

    def refusing(tree: DirectoryTree, path: str = "") -> Sequence[Node]:
        if path == "lost+found" or (unreadable and path == unreadable):
            raise StoreError(f"{path}: Permission denied")
        return entries(tree, path)

    monkeypatch.setattr(DirectoryTree, "entries", refusing)
    async with opened(root, workers, scheme=kind) as repository:
        assert count == len(await repository.points())
        assert [] == (await repository.verify("structure")).unread
    for place in places:
        unreadable = place
        if place.endswith("/"):
            unreadable += min(path.name for path in (root / place).iterdir())
        async with opened(root, workers, scheme=kind) as repository:
            points = await repository.points()
            check = await repository.verify("structure")
        sound = [point for point in points if not point.flags]
        assert count - 1 == len(sound), unreadable
        assert [f"{unreadable}: Permission denied"] == check.unread
        assert [] == check.findings


def test_a_migration_that_passes_over_one_is_not_complete(tmp_path: Path) -> None:
    root, target = tmp_path / "root", f"repo:{tmp_path / 'ours'}"
    _virtnbdbackup(root)
    assert nbdsrv("init", target).returncode == 0
    (root / "two").chmod(0)
    try:
        whole = nbdsrv("copy", f"virtnbdbackup:{root}", target, prefix=hidden_from())
        part = nbdsrv("copy", f"virtnbdbackup:{root}#one", target, prefix=hidden_from())
    finally:
        (root / "two").chmod(0o755)
    assert (3, 0) == (whole.returncode, part.returncode)
    assert f"not copied: {root}/two: Permission denied" in whole.stderr
    assert "one@" in whole.stdout
