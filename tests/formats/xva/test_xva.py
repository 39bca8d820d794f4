"""XVA: each disk is served from where it lies in the archive."""

import gzip
import os
import random
from pathlib import Path

import pytest
from hypothesis import given

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.formats.opening import Opening, open_image
from protocol.extents import DATA, HOLE
from tests.disk.check_disk import OpenDisk, check_disk
from tests.disk.reading import content
from tests.formats.compressed.streams import piped
from tests.formats.mutants import Mutation, mutations, outcome, threads
from tests.formats.xva.archive import CHUNK, Vdi, chunk_members, manifest, packed, xva

KINDS = [
    pytest.param({}, id="xen-orchestra"),
    pytest.param({"short_tail": True}, id="xapi"),
    pytest.param({"checksums": False}, id="without-checksums"),
    pytest.param({"keep_alive": True}, id="keep-alive"),
]


def sparse(size: int, *chunks: int) -> bytes:
    """A disk with data in some chunks only."""
    chance, data = random.Random(size), bytearray(size)
    for number in chunks:
        at = number * CHUNK
        length = min(CHUNK, size - at)
        data[at : at + length] = chance.randbytes(length)
    return bytes(data)


ROOT = Vdi(
    "Ref:2", "root", sparse(6 * CHUNK + 1536, 0, 1, 4, 6), "0c4ca262-0000-0000-0000-00000000000a"
)
DATA_DISK = Vdi("Ref:12", "data", sparse(3 * CHUNK, 1), "0c4ca262-0000-0000-0000-00000000000b")


def opener(path: Path, workers: Workers, member: str = "") -> OpenDisk:
    async def open_disk() -> Disk:
        return await open_image(str(path), "", Opening(workers, member=member))

    return open_disk


async def refusal(path: Path, workers: Workers, member: str = "") -> DiskError:
    with pytest.raises(DiskError) as raised:
        await open_image(str(path), "xva", Opening(workers, member=member))
    return raised.value


@pytest.mark.parametrize("kind", KINDS)
async def test_contract(tmp_path: Path, workers: Workers, kind: dict[str, bool]) -> None:
    path = tmp_path / "vm.xva"
    path.write_bytes(xva(DATA_DISK, ROOT, **kind))
    await check_disk(opener(path, workers, "root"), ROOT.content, extents_granularity=CHUNK)


@pytest.mark.parametrize("member", ["Ref:12", "data", DATA_DISK.uuid])
async def test_one_of_several(tmp_path: Path, workers: Workers, member: str) -> None:
    path = tmp_path / "vm.xva"
    path.write_bytes(xva(ROOT, DATA_DISK))
    disk = await opener(path, workers, member)()
    assert await content(disk, 0, disk.size) == DATA_DISK.content
    assert disk.name == f"{path}#Ref:12"
    await disk.close()


async def test_left_out_chunks_are_holes(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "vm.xva"
    path.write_bytes(xva(ROOT))
    disk = await opener(path, workers)()
    found = [(e.length, e.flags) for e in await disk.extents(0, disk.size)]
    assert found == [
        (2 * CHUNK, DATA), (2 * CHUNK, HOLE), (CHUNK, DATA), (CHUNK, HOLE), (1536, DATA)
    ]  # fmt: skip
    await disk.close()


async def test_facts(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "vm.xva"
    path.write_bytes(xva(ROOT, DATA_DISK))
    disk = await opener(path, workers, "root")()
    assert disk.format == "xva"
    assert disk.facts == {
        "machine": "the <b>vm</b>",
        "creator": "XCP-ng 8.3",
        "disk": "Ref:2",
        "name": "root",
        "uuid": ROOT.uuid,
        "chunks": 4,
        "checksums": "checksum",
        "members": ["Ref:2", "Ref:12"],
    }
    await disk.close()


async def test_which_disk(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "vm.xva"
    path.write_bytes(xva(ROOT, DATA_DISK))
    have = "it has #Ref:2 (root), #Ref:12 (data)"
    assert str(await refusal(path, workers)) == f"{path}: which disk? {have}"
    assert str(await refusal(path, workers, "swap")) == (
        f"{path}: 'swap' is not one of its disks; {have}"
    )


async def test_two_disks_of_one_name_need_their_reference(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "vm.xva"
    path.write_bytes(xva(ROOT, Vdi("Ref:3", "root", sparse(CHUNK, 0), "another")))
    assert "'root' is not one of its disks" in str(await refusal(path, workers, "root"))
    disk = await opener(path, workers, "another")()
    assert disk.size == CHUNK
    await disk.close()


@pytest.mark.parametrize("command", [("gzip", "-c"), ("zstd", "-c")])
async def test_compressed(tmp_path: Path, workers: Workers, command: tuple[str, ...]) -> None:
    path = tmp_path / "vm.xva.z"
    path.write_bytes(piped(xva(ROOT), *command))
    await check_disk(opener(path, workers), ROOT.content, extents_granularity=CHUNK)


async def test_disk_of_tebibytes_with_two_chunks(tmp_path: Path, workers: Workers) -> None:
    path, size = tmp_path / "vm.xva", (16 << 40) - 512
    record = manifest([Vdi("Ref:2", "huge", b"")]).replace(b">0<", f">{size}<".encode())
    last = b"\7" * CHUNK
    path.write_bytes(
        packed([("ova.xml", record), ("Ref:2/00000000", last), ("Ref:2/16777215", last)])
    )
    disk = await opener(path, workers)()
    assert disk.size == size
    assert await content(disk, size - 3, 3) == b"\7\7\7"
    found = await disk.extents(size - 2 * CHUNK, 2 * CHUNK)
    assert [(e.length, e.flags) for e in found] == [(CHUNK + 512, HOLE), (CHUNK - 512, DATA)]
    await disk.close()


# --- damage ----------------------------------------------------------------------------------


async def test_cut_short(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "vm.xva"
    path.write_bytes(xva(ROOT))
    for left in (4 * CHUNK, 3 * CHUNK, CHUNK, 3 * 512, 512, 100, 0):
        os.truncate(path, left)
        assert isinstance(await refusal(path, workers), CorruptImage), left


async def test_last_chunk_is_missing(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "vm.xva"
    members = [("ova.xml", manifest([ROOT])), *chunk_members(ROOT)[:-2]]
    path.write_bytes(packed(members))
    error = await refusal(path, workers)
    assert isinstance(error, CorruptImage)
    assert "Ref:2 of 6292992 bytes ends with chunk 4, was the file cut short?" in str(error)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: [m[0], m[2], m[1], *m[3:]], "chunk 1 comes after chunk 4"),
        (lambda m: [m[0], m[1], *m[1:]], "chunk 1 comes after chunk 1"),
        (lambda m: [(m[0][0], m[0][1][:-1]), *m[1:]], "is not 1 MiB long"),
        (lambda m: [(m[0][0], m[0][1] + b"!"), *m[1:]], "is not 1 MiB long"),
        (lambda m: [*m, ("Ref:2/00000007", b"!")], "ends with chunk 7"),
        (lambda m: [*m, ("Ref:2/9999999999999", b"!")], "chunk 9999999999999 of Ref:2"),
        (lambda m: [*m[:-1], (m[-1][0], m[-1][1][:1535])], "the last chunk of Ref:2 is too short"),
    ],
)
async def test_chunks_that_do_not_fit(
    tmp_path: Path, workers: Workers, change, expected: str
) -> None:
    path = tmp_path / "vm.xva"
    chunks = change(chunk_members(ROOT, checksums=False))
    path.write_bytes(packed([("ova.xml", manifest([ROOT])), *chunks]))
    error = await refusal(path, workers)
    assert isinstance(error, CorruptImage)
    assert expected in str(error)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (b"", CorruptImage),
        (b"<value>", CorruptImage),
        (b"<value/>", UnsupportedImage),
        (b"<!DOCTYPE x [<!ENTITY a 'b'>]><value>&a;</value>", CorruptImage),
        (b"<a>" * 100 + b"</a>" * 100, CorruptImage),
        (manifest([ROOT]).replace(b">6292992<", b">-1<"), CorruptImage),
        (manifest([ROOT]).replace(b">6292992<", b">1e9<"), CorruptImage),
        (manifest([ROOT]).replace(b">6292992<", b">9223372036854775808<"), CorruptImage),
        (manifest([ROOT]).replace(b"virtual_size", b"size"), CorruptImage),
        (manifest([]), UnsupportedImage),
    ],
)
async def test_broken_manifest(
    tmp_path: Path, workers: Workers, record: bytes, expected: type[DiskError]
) -> None:
    path = tmp_path / "vm.xva"
    path.write_bytes(packed([("ova.xml", record), *chunk_members(ROOT)]))
    assert type(await refusal(path, workers)) is expected


async def test_archive_that_does_not_begin_with_its_manifest(
    tmp_path: Path, workers: Workers
) -> None:
    path = tmp_path / "vm.xva"
    path.write_bytes(packed(chunk_members(ROOT)))
    assert "an XVA begins with ova.xml" in str(await refusal(path, workers))


async def test_compressed_and_broken(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "vm.xva.gz"
    path.write_bytes(gzip.compress(xva(ROOT)[: 3 * CHUNK]))
    with pytest.raises(CorruptImage):
        await opener(path, workers)()


def test_mutants(tmp_path: Path) -> None:
    small = Vdi("Ref:2", "root", sparse(2 * CHUNK, 0, 1), "u")
    good = xva(small)
    mutant = tmp_path / "mutant.xva"
    with threads() as (runner, workers):

        @given(mutations(4096))
        def search(changes: list[Mutation]) -> None:
            runner.run(outcome(mutant, good, changes, "xva", workers))

        search()
