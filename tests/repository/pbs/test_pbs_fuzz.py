"""Flipped bytes anywhere in a datastore: a DiskError of one line, or the right bytes."""

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import NbdsrvError
from tests.disk.reading import content
from tests.formats.mutants import Mutation, mutations, threads
from tests.repository.pbs.encoder import CHUNK, Datastore, blob
from tests.repository.pbs.opened import T0, golden, opened

PATIENCE_S = 20


def _one_line(error: Exception) -> None:
    assert "\n" not in str(error)


async def _attempt(root: Path, golden: bytes, workers: Workers) -> None:
    """List, read, verify."""
    try:
        async with asyncio.timeout(PATIENCE_S), opened(root, workers) as repository:
            for point in await repository.points():
                for facts in point.disks:
                    try:
                        disk = await repository.open_disk(point, facts.name)
                    except NbdsrvError as error:
                        _one_line(error)
                        continue
                    assert disk.size == len(golden)
                    for offset in range(0, disk.size, CHUNK):
                        length = min(CHUNK, disk.size - offset)
                        try:
                            found = await content(disk, offset, length)
                        except NbdsrvError as error:
                            _one_line(error)
                            continue
                        assert found == golden[offset : offset + length]
                    await disk.close()
            await repository.verify("chunks")
    except NbdsrvError as error:
        _one_line(error)


@pytest.mark.parametrize("which", ["index.json.blob", "d.img.fidx", "chunk"])
def test_flipped_bytes(tmp_path: Path, which: str) -> None:
    store = Datastore(tmp_path / "store")
    disk = golden(1, 4, 512)
    snapshot = store.snapshot("vm/1", T0, {"d": disk})
    if which == "chunk":
        files = (store.root / ".chunks").rglob("*")
        path = min((each for each in files if each.is_file()), key=lambda each: each.stat().st_size)
    else:
        path = snapshot / which
    good = path.read_bytes()
    with threads() as (runner, workers):

        @settings(max_examples=60)
        @given(mutations(len(good)), st.integers(0, len(good)) | st.none())
        def change(changes: list[Mutation], cut: int | None) -> None:
            mutant = bytearray(good)
            for position, data in changes:
                mutant[position : position + len(data)] = data
            path.write_bytes(mutant[:cut])
            runner.run(_attempt(store.root, disk, workers))

        change()


def test_manifests_of_any_shape(tmp_path: Path) -> None:
    """Their CRC is right: what is inside is not trusted either."""
    store = Datastore(tmp_path / "store")
    disk = golden(1, 2, 512)
    snapshot = store.snapshot("vm/1", T0, {"d": disk})
    document = store.manifest(snapshot)
    values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 70), 1 << 70)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.sampled_from(["", "..", "/etc/passwd", "a/b", "\0", "d.img.fidx", "x" * 300, "\ud800"])
        | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=4,
    )
    places = [(name,) for name in document] + [
        ("files", 0, name) for name in ("filename", "crypt-mode", "size", "csum")
    ]
    with threads() as (runner, workers):

        @settings(max_examples=80)
        @given(st.sampled_from(places), values)
        def change(place: tuple[str | int, ...], value: object) -> None:
            changed = copy.deepcopy(document)
            at: Any = changed
            for step in place[:-1]:
                at = at[step]
            at[place[-1]] = value
            store.put_manifest(snapshot, changed)
            runner.run(_attempt(store.root, disk, workers))

        change()


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b"{}",
        b"null",
        b'{"backup-type": "vm", "backup-id": "1", "backup-time": 1, "files": ['
        + b",".join([b'{"filename": "%d.fidx", "size": 0, "csum": ""}' % n for n in range(5000)])
        + b"]}",
        b" " * (5 << 20),
    ],
)
def test_hostile_manifests(tmp_path: Path, text: bytes) -> None:
    store = Datastore(tmp_path / "store")
    snapshot = store.snapshot("vm/1", T0, {"d": b"x"})
    (snapshot / "index.json.blob").write_bytes(blob(text))
    with threads() as (runner, workers):

        async def reasons() -> list[str]:
            async with opened(store.root, workers) as repository:
                return [point.facts["reason"] for point in await repository.points()]

        (reason,) = runner.run(reasons())
        assert "corrupt repository" in reason
        assert len(reason) < 1100


def test_a_manifest_of_a_gibibyte_is_not_read(tmp_path: Path) -> None:
    store = Datastore(tmp_path / "store")
    snapshot = store.snapshot("vm/1", T0, {"d": b"x"})
    (snapshot / "index.json.blob").unlink()
    with (snapshot / "index.json.blob").open("wb") as file:
        file.truncate(1 << 30)
    with threads() as (runner, workers):

        async def reasons() -> list[str]:
            async with opened(store.root, workers) as repository:
                return [point.facts["reason"] for point in await repository.points()]

        (reason,) = runner.run(reasons())
        assert "more than 4194304" in reason
