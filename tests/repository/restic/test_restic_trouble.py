"""Damage, and repositories that lie: clear errors, nothing wrong served, the rest exact."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, RepositoryError
from nbdsrv.repository.pieces import ID_SIZE
from nbdsrv.store.directory_tree import DirectoryTree
from nbdsrv.store.store import StoreError
from nbdsrv.store.tree import MAX_FILE, Node
from tests.disk.reading import content
from tests.formats.mutants import INTERESTING, threads
from tests.repository.restic.forged import Forge
from tests.repository.restic.made import Made
from tests.repository.restic.opened import everything, opened, point_of

DISK = "vm1/disk.raw"
MIB = 1 << 20


# --- real repositories, damaged ------------------------------------------------------------------


async def test_one_flipped_bit_spoils_one_blob(made: Made, workers: Workers) -> None:
    """Everything but its range is served; verify says which ranges of which disks."""
    async with opened(made.path, workers) as repository:
        points = await repository.points("alpha")
        golden = made.states[points[0].id][DISK]
        disk = await repository.open_disk(points[0], DISK)
        victim = disk.pieces.id(0)
        place = disk._blobs.places(victim)[0]
        path = made.path / "data" / place.pack[:2] / place.pack
        data = bytearray(path.read_bytes())
        data[place.offset + place.length // 2] ^= 1
        path.write_bytes(data)
        length = disk.pieces.length(0)
        for offset in (0, length - 1):
            with pytest.raises(CorruptImage, match=f"{place.pack} at {place.offset}: blob"):
                await content(disk, offset, 1)
        assert golden[length:] == await content(disk, length, disk.size - length)
        await disk.close()
        check = await repository.verify("structure")
        assert [] == check.findings
        for level in ("packs", "chunks"):
            check = await repository.verify(level)
            (finding,) = check.findings
            assert f"data/{place.pack[:2]}/{place.pack}" == finding.key
            assert place.offset == finding.offset
            hurt = {(each.point, each.disk): each.ranges for each in finding.hurts}
            ids = {point.id for point in points} | {made.beta}
            assert {each.partition("/")[2] for each, _ in hurt} == ids
            assert all(ranges == [(0, length)] for ranges in hurt.values())
        check = await repository.verify("chunks", [points[0]], "vm1/other.img")
        assert ([], 1, 1) == (check.findings, check.points, check.disks)


async def test_a_lost_pack(made: Made, workers: Workers) -> None:
    async with opened(made.path, workers) as repository:
        point = await point_of(repository, made.points[2])
        disk = await repository.open_disk(point, DISK)
        place = disk._blobs.places(disk.pieces.id(0))[0]
        await disk.close()
    (made.path / "data" / place.pack[:2] / place.pack).unlink()
    async with opened(made.path, workers) as repository:
        point = await point_of(repository, made.points[2])
        disk = await repository.open_disk(point, DISK)
        with pytest.raises(DiskError, match=f"{place.pack}: no such file; was it pruned"):
            await content(disk, 0, 1)
        await disk.close()
        check = await repository.verify("structure")
        assert any("the pack is missing" in finding.text for finding in check.findings)
        assert all(finding.hurts for finding in check.findings)


@pytest.mark.parametrize("how", ["gone", "garbage", "truncated"])
async def test_without_an_index_the_packs_tell(made: Made, workers: Workers, how: str) -> None:
    for path in (made.path / "index").iterdir():
        if how == "gone":
            path.unlink()
        elif how == "garbage":
            path.write_bytes(os.urandom(path.stat().st_size))
        else:
            path.write_bytes(path.read_bytes()[:-1])
    async with opened(made.path, workers) as repository:
        for point in await repository.points():
            assert made.states[point.id][DISK] == await everything(repository, point, DISK)
        check = await repository.verify("chunks")
        assert all(finding.key.startswith("index/") for finding in check.findings)
        assert (how == "gone") == (not check.findings)


async def test_files_of_the_index_that_cannot_be_read(
    made: Made, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The medium fails below one, another has grown: the packs tell, and verify says so."""
    bad, long, *_ = sorted(path.name for path in (made.path / "index").iterdir())
    os.truncate(made.path / "index" / long, 65 * MIB)
    read, failing = DirectoryTree.read, True

    def faulty(tree: DirectoryTree, path: str, limit: int = MAX_FILE) -> bytes:
        if failing and path.endswith(bad):
            raise StoreError(f"{path}: Input/output error")
        return read(tree, path, limit)

    monkeypatch.setattr(DirectoryTree, "read", faulty)
    async with opened(made.path, workers) as repository:
        for point in await repository.points():
            assert made.states[point.id][DISK] == await everything(repository, point, DISK)
        check = await repository.verify("chunks")
        assert [] == check.findings
        assert [f"index/{bad}: Input/output error"] == check.unread[:1]
        assert "more than" in check.unread[1]
        failing = False  # it is tried again
        assert 1 == len((await repository.verify("structure")).unread)


@pytest.mark.parametrize("where", ["snapshots/", "data/"])
async def test_what_could_not_be_read_is_tried_again(
    made: Made, workers: Workers, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    read, read_range, failing = DirectoryTree.read, DirectoryTree.read_range, True

    def file(tree: DirectoryTree, path: str, limit: int = MAX_FILE) -> bytes:
        if failing and path.startswith(where):
            raise StoreError(f"{path}: Stale file handle")
        return read(tree, path, limit)

    def part(tree: DirectoryTree, path: str, offset: int, length: int) -> bytes:
        if failing and path.startswith(where):
            raise StoreError(f"{path}: Stale file handle")
        return read_range(tree, path, offset, length)

    monkeypatch.setattr(DirectoryTree, "read", file)
    monkeypatch.setattr(DirectoryTree, "read_range", part)
    async with opened(made.path, workers) as repository:
        assert {("damaged",)} == {point.flags for point in await repository.points()}
        if where == "snapshots/":
            check = await repository.verify("structure")
            assert ([], 4) == (check.findings, len(check.unread))
        failing = False
        for point in await repository.points():
            assert made.states[point.id][DISK] == await everything(repository, point, DISK)


async def test_packs_that_cannot_be_searched(
    made: Made, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but what lies in them is lost, and they are named."""
    async with opened(made.path, workers) as repository:
        point = await point_of(repository, made.points[0])
        disk = await repository.open_disk(point, "vm1/other.img")
        place = disk._blobs.places(disk.pieces.id(0))[0]
        await disk.close()
    shutil.rmtree(made.path / "index")
    entries = DirectoryTree.entries

    def faulty(tree: DirectoryTree, path: str = "") -> Sequence[Node]:
        if path == f"data/{place.pack[:2]}":
            raise StoreError(f"{path}: Permission denied")
        return entries(tree, path)

    monkeypatch.setattr(DirectoryTree, "entries", faulty)
    async with opened(made.path, workers) as repository:
        unread = 0
        for point in await repository.points():
            for name in (each.name for each in point.disks):
                try:
                    data = await everything(repository, point, name)
                except CorruptImage:
                    unread += 1
                else:
                    assert made.states[point.id][name] == data
        assert unread
        with pytest.raises(CorruptImage, match=f"not read: data/{place.pack[:2]}: Permission"):
            repository._blobs.blob(bytes(32))


async def test_a_blob_that_is_nowhere(made: Made, workers: Workers) -> None:
    """Its size is lost with it; what lies before and behind is found from either end."""
    forge = Forge(made.path.parent / "forged")
    chance = random.Random(1)
    pieces = [chance.randbytes(MIB // 2 + n) for n in range(6)]
    forge.file(pieces)
    for path in (forge.path / "index").iterdir():
        path.unlink()
    kept = [*pieces[:2], *pieces[4:]]
    packs = list((forge.path / "data").rglob("*"))
    tree = max((path for path in packs if path.is_file()), key=lambda path: -path.stat().st_size)
    for path in packs:
        if path.is_file() and path != tree:
            path.unlink()
    name, rows = forge.pack([("data", piece) for piece in kept])
    forge.index({name: rows})
    golden = b"".join(pieces)
    begin, end = len(b"".join(pieces[:2])), len(golden) - len(b"".join(pieces[4:]))
    async with opened(forge.path, workers) as repository:
        (point,) = await repository.points()
        disk = await repository.open_disk(point, "disk.raw")
        assert (begin, end) == disk.pieces.gap
        assert end - begin == disk.facts["lost_bytes"]
        assert golden[:begin] == await content(disk, 0, begin)
        assert golden[end:] == await content(disk, end, disk.size - end)
        for offset in (begin, end - 1):
            with pytest.raises(CorruptImage, match="is nowhere to be found"):
                await content(disk, offset, 1)
        await disk.close()
        (finding,) = (await repository.verify("chunks")).findings
        assert [[(begin, end - begin)]] == [hurt.ranges for hurt in finding.hurts]


async def test_a_damaged_snapshot_hides_no_other(made: Made, workers: Workers) -> None:
    path = next((made.path / "snapshots").glob(f"{made.points[0]}*"))
    sealed = bytearray(path.read_bytes())
    sealed[0] ^= 1
    path.write_bytes(sealed)
    async with opened(made.path, workers) as repository:
        points = {point.id: point for point in await repository.points()}
        bad = points.pop(made.points[0])
        assert (("damaged",), ()) == (bad.flags, bad.disks)
        assert path.name in bad.facts["reason"]
        assert {*made.points[1:], made.beta} == set(points)
        with pytest.raises(CorruptImage, match=r"SHA-256 is not its name"):
            await repository.open_disk(bad, DISK)
        check = await repository.verify("structure")
        assert [f"snapshots/{path.name}"] == [finding.key for finding in check.findings]


async def test_a_blob_that_is_intact_elsewhere(tmp_path: Path, workers: Workers) -> None:
    forge = Forge(tmp_path / "r")
    piece = random.Random(2).randbytes(MIB)
    forge.file([piece])
    name, rows = forge.pack([("data", piece), ("data", b"more")])
    forge.index({name: rows})
    path = forge.path / "data" / name[:2] / name
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    async with opened(forge.path, workers) as repository:
        (point,) = await repository.points()
        assert piece == await everything(repository, point, "disk.raw")
        (finding,) = (await repository.verify("chunks")).findings
        assert [] == finding.hurts
        assert 1 == len(finding.copies)


# --- repositories that lie -----------------------------------------------------------------------


async def test_superseded_files_of_the_index_do_no_harm(tmp_path: Path, workers: Workers) -> None:
    forge = Forge(tmp_path / "r")
    piece = random.Random(2).randbytes(MIB)
    forge.file([piece])
    old = next((forge.path / "index").iterdir())
    document = {"packs": [], "supersedes": [old.name]}
    forge.document("index", document)  # and it says nothing itself: the packs tell
    async with opened(forge.path, workers) as repository:
        (point,) = await repository.points()
        assert piece == await everything(repository, point, "disk.raw")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"uncompressed_length": 1 << 31}, None),
        ({"length": 31}, None),
        ({"offset": -1}, None),
        ({"offset": 1 << 40}, None),
        ({"offset": (1 << 32) - 1}, None),
        ({"id": "zz" * 32}, None),
        ({"id": "../../../etc/passwd"}, None),
        ({"uncompressed_length": MIB - 1}, "its pieces have 1048575 bytes"),
        ({"uncompressed_length": 0}, "its pieces have"),
        ({"length": 1 << 31}, "but it has"),
        ({"length": 64}, "its authentication code does not fit"),
    ],
)
async def test_an_index_that_lies(
    tmp_path: Path, workers: Workers, change: dict[str, object], error: str | None
) -> None:
    """What cannot be is not believed; what could be is found out when it is read."""
    forge = Forge(tmp_path / "r")
    piece = random.Random(2).randbytes(MIB)
    snapshot = forge.file([piece])
    packs = list((forge.path / "data").rglob("?" * 64))
    data = max(packs, key=lambda path: path.stat().st_size)
    for path in (forge.path / "index").iterdir():
        path.unlink()
    _, rows = Forge(tmp_path / "other").pack([("data", piece)])
    forge.index({data.name: [rows[0] | change]})
    async with opened(forge.path, workers) as repository:
        (point,) = await repository.points()
        assert snapshot == point.facts["snapshot"]
        if error is None:
            assert piece == await everything(repository, point, "disk.raw")
            return
        with pytest.raises(DiskError, match=error):
            await everything(repository, point, "disk.raw")
        assert (await repository.verify("chunks")).findings


@pytest.mark.parametrize(
    "node",
    [
        {"size": MIB + 1},
        {"size": MIB - 1, "name": "x"},
        {"content": ["00" * 32]},
        {"content": ["00" * 31]},
        {"content": "no list"},
        {"content": [1]},
        {"content": None},
        {"size": -1},
        {"size": 1 << 70},
        {"name": 5},
    ],
)
async def test_a_file_that_is_not_made_of_its_pieces(
    tmp_path: Path, workers: Workers, node: dict[str, object]
) -> None:
    forge = Forge(tmp_path / "r")
    forge.file([random.Random(2).randbytes(MIB)], **{"size": MIB, **node})
    async with opened(forge.path, workers, f"{node.get('name', 'disk.raw')}") as repository:
        (point,) = await repository.points()
        for disk in point.disks:
            with pytest.raises(DiskError):
                await everything(repository, point, disk.name)
        assert (await repository.verify("chunks")).findings


async def test_names_and_depths(tmp_path: Path, workers: Workers) -> None:
    """A tree that contains itself under many names; names that lead out; quotes."""
    forge = Forge(tmp_path / "r")
    piece = random.Random(2).randbytes(MIB)
    ids = [hashlib.sha256(piece).hexdigest()]
    file = {"type": "file", "size": MIB, "content": ids}
    names = ["..", "a/b", "", "\\x00", 'q\\"uo\\\\te', "\\xff\\u00e9", "ö"]
    leaf = json.dumps({"nodes": [file | {"name": name} for name in names]}).encode()
    blobs, tree = [("data", piece), ("tree", leaf)], leaf
    for _ in range(40):
        id_ = hashlib.sha256(tree).hexdigest()
        nodes = [{"name": f"d{n}", "type": "dir", "subtree": id_} for n in range(3)]
        tree = json.dumps({"nodes": nodes}).encode()
        blobs.append(("tree", tree))
    top = json.dumps(
        {
            "nodes": [
                {"name": "deep", "type": "dir", "subtree": hashlib.sha256(tree).hexdigest()},
                {"name": "flat", "type": "dir", "subtree": hashlib.sha256(leaf).hexdigest()},
                {"name": "gone", "type": "dir", "subtree": "11" * 32},
            ]
        }
    ).encode()
    name, rows = forge.pack([*blobs, ("tree", top)])
    forge.index({name: rows})
    forge.snapshot(hashlib.sha256(top).hexdigest())
    async with opened(forge.path, workers) as repository:
        (point,) = await repository.points()
        expected = {"flat/..", 'flat/q"uo\\te', "flat/\\xffé", "flat/ö"}
        assert expected == {disk.name for disk in point.disks}
        assert ("partial",) == point.flags
        assert "not_listed" in point.facts
        for disk in point.disks:
            assert piece == await everything(repository, point, disk.name)


async def test_bombs(tmp_path: Path, workers: Workers) -> None:
    """What expands to more than it says, or may, is refused before it has."""
    forge = Forge(tmp_path / "r")
    zeroes = zstandard.compress(bytes(600 << 20))
    forge.document("index", None, raw=b"\x02" + zeroes)
    forge.document("snapshots", None, raw=b"\x02" + zeroes)
    forge.document("snapshots", None, raw=b"[" * 1_000_000)
    forge.document("snapshots", None, raw=b'{"time":' + b"[" * 200_000)
    forge.snapshot("00" * 32, time="yesterday")
    forge.snapshot("00" * 32, time="0001-01-01T00:00:00Z")
    forge.snapshot(None)
    (forge.path / "snapshots" / ("00" * 32)).touch()
    os.truncate(forge.path / "snapshots" / ("00" * 32), 1 << 30)
    (forge.path / "snapshots" / "somebody's file").write_text("")
    async with opened(forge.path, workers) as repository:
        points = await repository.points()
        assert 7 == len(points)
        assert all(point.flags == ("damaged",) for point in points)
        said = " ".join(point.facts["reason"] for point in points)
        for part in ("more than 16777216", "1073741824 bytes", "its time", "has no tree"):
            assert part in said
        assert (await repository.verify("structure")).findings


@pytest.mark.parametrize(
    ("key", "error"),
    [
        ({"N": 1 << 30}, "takes more than"),
        ({"N": 3}, "makes no sense"),
        ({"p": 1 << 20}, "makes no sense"),
        ({"kdf": "argon2"}, "not by scrypt"),
    ],
)
async def test_keys_that_cost_too_much(
    tmp_path: Path, workers: Workers, key: dict[str, object], error: str
) -> None:
    forge = Forge(tmp_path / "r")
    path = next((forge.path / "keys").iterdir())
    path.write_text(json.dumps(json.loads(path.read_text()) | key))
    with pytest.raises(CorruptImage, match=error):
        async with opened(forge.path, workers):
            pass


async def test_configs(tmp_path: Path, workers: Workers) -> None:
    forge = Forge(tmp_path / "r")
    for document, error in (
        ({"version": 3, "id": "ab" * 32}, "of version 3; this nbdsrv reads 1 and 2"),
        ({"version": 2}, "corrupt repository"),
        ([], "corrupt repository"),
    ):
        forge.config(document)
        with pytest.raises(DiskError, match=error):
            async with opened(forge.path, workers):
                pass
    shutil.rmtree(forge.path / "keys")
    with pytest.raises(RepositoryError, match="no key"):
        async with opened(forge.path, workers):
            pass


async def test_links_that_lead_out(tmp_path: Path, workers: Workers) -> None:
    forge = Forge(tmp_path / "r")
    forge.file([random.Random(2).randbytes(MIB)])
    outside = tmp_path / "outside"
    shutil.move(forge.path / "data", outside)
    (forge.path / "data").symlink_to(outside)
    async with opened(forge.path, workers) as repository:
        (point,) = await repository.points()
        assert ("damaged",) == point.flags
        assert "leads out" in point.facts["reason"]


# --- mutations -----------------------------------------------------------------------------------


def test_any_change_to_any_file(original: Made, tmp_path: Path) -> None:
    """Bytes of real files are changed: what is read is right, or an error."""
    forge = Forge(tmp_path / "good")
    chance = random.Random(3)
    pieces = [chance.randbytes(70_000), bytes(512 << 10), chance.randbytes(MIB)]
    forge.file(pieces)
    forge.snapshot("00" * 32)
    golden = b"".join(pieces)
    files = sorted(path for path in forge.path.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    change = st.sampled_from(INTERESTING) | st.binary(min_size=1, max_size=4)
    place = st.integers(0, len(files) - 1).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, sizes[n] - 1), change)
    )
    cut = st.integers(0, len(files) - 1).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, sizes[n] - 1), st.none())
    )

    with threads() as (runner, workers):

        @settings(max_examples=60)
        @given(st.lists(place | cut, min_size=1, max_size=3))
        def mutate(changes: "list[tuple[int, int, bytes | None]]") -> None:
            kept = {}
            for number, at, new in changes:
                data = bytearray(files[number].read_bytes())
                kept.setdefault(number, bytes(data))
                data = data[:at] if new is None else data[:at] + new + data[at + len(new) :]
                files[number].write_bytes(data)
            try:
                runner.run(_attempt(forge.path, workers, golden))
            finally:
                for number, data in kept.items():
                    files[number].write_bytes(data)

        mutate()


async def _attempt(path: Path, workers: Workers, golden: bytes) -> None:
    with suppress(DiskError):
        async with opened(path, workers) as repository:
            for point in await repository.points():
                for disk in point.disks:
                    assert golden == await everything(repository, point, disk.name)
            await repository.verify("chunks")


documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 64), 1 << 64)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["ab" * 32, "data", "tree", "file", "dir"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "packs",
                    "id",
                    "blobs",
                    "type",
                    "offset",
                    "length",
                    "nodes",
                    "name",
                    "size",
                    "content",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


def test_any_document_in_any_place(tmp_path: Path) -> None:
    """Sealed properly, whatever it says: an index, a snapshot, a tree, a pack's header."""
    with threads() as (runner, workers):

        @settings(max_examples=40)
        @given(documents, documents, documents, st.binary(max_size=100))
        def fill(index: object, snapshot: object, tree: object, header: bytes) -> None:
            path = tmp_path / "r"
            if path.exists():
                shutil.rmtree(path)
            forge = Forge(path)
            piece = b"piece" * 300_000
            forge.file([piece])
            forge.document("index", index)
            forge.document("snapshots", snapshot)
            forge.pack([("data", b"x" * ID_SIZE)], header=header)
            data = json.dumps(tree).encode()
            name, rows = forge.pack([("tree", data)])
            forge.index({name: rows})
            forge.snapshot(hashlib.sha256(data).hexdigest())

            async def read() -> None:
                async with opened(path, workers) as repository:
                    good = [p for p in await repository.points() if p.disk("disk.raw")]
                    assert good
                    for point in good:
                        if point.disk("disk.raw").size == len(piece):
                            assert piece == await everything(repository, point, "disk.raw")
                    await repository.verify("chunks")

            runner.run(read())

        fill()
