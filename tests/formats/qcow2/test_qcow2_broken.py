"""Images that contradict themselves, or want what we do not have: one line, no wrong bytes."""

import struct
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.formats.qcow2.compression import decompressor, inflate
from nbdsrv.formats.qcow2.structs import Compression
from tests.disk.check_disk import extent_map
from tests.disk.reading import content
from tests.formats.mutants import Mutation, mutations, outcome, threads
from tests.formats.qcow2.peer import create, opener, qemu_img, qemu_io, refusal

KIB = 1 << 10
CLUSTER = 64 * KIB
COPIED, COMPRESSED = 1 << 63, 1 << 62
INCOMPATIBLE = 72


class Specimen:
    """An image whose words can be overwritten.

    Clusters 0 and 1 hold data, 2 is zero, 3 is compressed; the rest is not there.
    """

    def __init__(self, path: Path, *options: str) -> None:
        self.path = create(path, "1M", *options)
        qemu_io(self.path, "write -P 1 0 128k", "write -z 128k 64k", "write -c -P 2 192k 64k")
        self.data = bytearray(self.path.read_bytes())
        (self.l1,) = struct.unpack_from(">Q", self.data, 40)
        self.l2 = self.word(self.l1) & (1 << 56) - 512

    def word(self, at: int) -> int:
        (value,) = struct.unpack_from(">Q", self.data, at)
        assert isinstance(value, int)
        return value

    def put(self, at: int, value: int, size: int = 8) -> Path:
        self.data[at : at + size] = value.to_bytes(size, "big")
        self.path.write_bytes(self.data)
        return self.path

    def entry(self, index: int, value: int) -> Path:
        return self.put(self.l2 + index * 8, value)


@pytest.fixture
def specimen(tmp_path: Path) -> Specimen:
    return Specimen(tmp_path / "disk.qcow2")


# --- what we do not have -----------------------------------------------------------------------


@pytest.mark.parametrize(("method", "name"), [(1, "AES"), (2, "LUKS")])
async def test_encrypted_images_are_refused(
    specimen: Specimen, workers: Workers, method: int, name: str
) -> None:
    error = await refusal(specimen.put(32, method, 4), workers)
    assert isinstance(error, UnsupportedImage)
    assert f"encrypted ({name})" in str(error)


async def test_unknown_features_are_named_as_the_image_names_them(
    specimen: Specimen, workers: Workers
) -> None:
    name = specimen.data.index(b"lazy refcounts")
    specimen.data[name - 2 : name] = bytes([0, 40])  # an incompatible feature now
    error = await refusal(specimen.put(INCOMPATIBLE, 1 << 40 | 1 << 41), workers)
    assert isinstance(error, UnsupportedImage)
    assert "lazy refcounts (bit 40), unnamed (bit 41)" in str(error)


async def test_unknown_compression_is_refused(specimen: Specimen, workers: Workers) -> None:
    specimen.put(INCOMPATIBLE, 8)
    assert isinstance(await refusal(specimen.put(104, 2, 1), workers), UnsupportedImage)


@pytest.mark.parametrize(("bit", "name"), [(1, "dirty"), (2, "corrupt")])
async def test_dirty_and_corrupt_images_are_read_and_told(
    specimen: Specimen, workers: Workers, bit: int, name: str
) -> None:
    path = specimen.put(INCOMPATIBLE, bit)
    disk = await opener(path, workers)()
    assert disk.facts[name] is True
    assert await content(disk, 0, 64 * KIB) == b"\1" * CLUSTER
    await disk.close()
    assert path.read_bytes() == bytes(specimen.data)


# --- headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "value", "size"),
    [
        (4, 4, 4),  # version
        (8, 1 << 63, 8),  # the backing file's name
        (8, 90, 8),
        (16, 1 << 31, 4),
        (20, 8, 4),  # cluster size
        (20, 22, 4),
        (24, (1 << 64) - 1, 8),  # size
        (24, 1 << 62, 8),
        (32, 3, 4),  # encryption
        (36, 0, 4),  # L1 entries
        (36, (1 << 32) - 1, 4),
        (40, 0, 8),  # L1 table
        (40, 513, 8),
        (40, 1 << 60, 8),
        (48, 7, 8),  # refcount table
        (48, 1 << 60, 8),
        (56, 0, 4),
        (56, 1 << 31, 4),
        (60, 1 << 20, 4),  # snapshots
        (60, 3, 4),
        (72, 16 | 8, 8),  # compression said, none given
        (88, 2, 8),  # a raw data file without a data file
        (88, 1, 8),  # bitmaps without bitmaps
        (96, 7, 4),  # refcount width
        (100, 64, 4),  # header length
        (100, 1 << 30, 4),
        (100, 105, 4),
        (116, 1 << 31, 4),  # an extension without end
    ],
)
async def test_a_broken_header_is_refused_at_open(
    specimen: Specimen, workers: Workers, at: int, value: int, size: int
) -> None:
    if at == 16:
        specimen.put(8, 512)
    path = specimen.put(at, value, size)
    with pytest.raises((CorruptImage, UnsupportedImage)) as raised:
        await opener(path, workers, kind="qcow2")()
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("size", [0, 3, 71, 90, 103, 65536, 196608, 200000])
async def test_truncated_tables(specimen: Specimen, workers: Workers, size: int) -> None:
    specimen.path.write_bytes(specimen.data[:size])
    error = await refusal(specimen.path, workers, kind="qcow2")
    assert isinstance(error, CorruptImage)


async def test_truncated_data_costs_what_was_lost(specimen: Specimen, workers: Workers) -> None:
    second = specimen.word(specimen.l2 + 8) & (1 << 56) - 512
    assert second > specimen.l2
    specimen.path.write_bytes(specimen.data[: second + 4096])
    disk = await opener(specimen.path, workers)()
    assert await content(disk, 0, CLUSTER) == b"\1" * CLUSTER
    with pytest.raises(CorruptImage, match=f"at {specimen.l2 + 8}: .* outside the file") as raised:
        await content(disk, 0, 2 * CLUSTER)
    assert raised.value.offset == CLUSTER
    await disk.close()


# --- entries -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (COPIED | 5 * CLUSTER + 512, "unaligned"),
        (COPIED | 1 << 40, "outside the file"),
        (COPIED, "outside the file"),
        (COPIED | 5 * CLUSTER | 2, "reserved"),
        (COPIED | 5 * CLUSTER | 1 << 56, "reserved"),
        (512 | 1, "unaligned"),
        (COMPRESSED | COPIED | 6 * CLUSTER, "reserved"),
        (COMPRESSED | 100, "outside the file"),
        (COMPRESSED | 1 << 40, "outside the file"),
        (COMPRESSED | 5 * CLUSTER, "compressed cluster"),
    ],
)
async def test_a_broken_entry_costs_only_its_cluster(
    specimen: Specimen, workers: Workers, value: int, why: str
) -> None:
    path = specimen.entry(1, value)
    disk = await opener(path, workers)()
    assert await content(disk, 0, CLUSTER) == b"\1" * CLUSTER
    assert await content(disk, 2 * CLUSTER, CLUSTER) == bytes(CLUSTER)
    assert await content(disk, 3 * CLUSTER, CLUSTER) == b"\2" * CLUSTER
    with pytest.raises(CorruptImage, match=why) as raised:
        await content(disk, 0, disk.size)
    assert raised.value.offset == CLUSTER
    assert f"corrupt image: {path} at " in str(raised.value)
    assert len(await extent_map(disk)) == disk.size
    await disk.close()


@pytest.mark.parametrize(
    ("value", "why"),
    [(1 << 60, "reserved"), (CLUSTER * 4 + 512, "unaligned"), (1 << 50, "outside"), (512, "unal")],
)
async def test_a_broken_l1_entry(
    specimen: Specimen, workers: Workers, value: int, why: str
) -> None:
    error = await refusal(specimen.put(specimen.l1, value), workers)
    assert isinstance(error, CorruptImage)
    assert f"at {specimen.l1}: an L1 entry" in str(error)
    assert why in str(error)


@pytest.mark.parametrize("where", ["header", "refcounts", "l1", "l2", "sibling"])
async def test_a_cluster_that_belongs_to_somebody_else(
    specimen: Specimen, workers: Workers, where: str
) -> None:
    position = {
        "header": 0,
        "refcounts": specimen.word(48),
        "l1": specimen.l1,
        "l2": specimen.l2,
        "sibling": specimen.word(specimen.l2) & ~COPIED,
    }[where]
    disk = await opener(specimen.entry(1, COPIED | position), workers)()
    with pytest.raises(CorruptImage):
        await content(disk, CLUSTER, CLUSTER)
    assert await content(disk, 3 * CLUSTER, CLUSTER) == b"\2" * CLUSTER
    await disk.close()


async def test_clusters_may_be_shared_by_those_who_say_so(
    specimen: Specimen, workers: Workers
) -> None:
    first = specimen.word(specimen.l2) & ~COPIED
    specimen.entry(0, first)
    disk = await opener(specimen.entry(5, first), workers)()
    assert await content(disk, 5 * CLUSTER, CLUSTER) == b"\1" * CLUSTER
    await disk.close()


async def test_version_2_has_no_zero_clusters(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "old.qcow2", "1M", "-o", "compat=0.10")
    qemu_io(path, "write -P 1 0 64k")
    data = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", data, 40)
    (l2,) = struct.unpack_from(">Q", data, l1)
    struct.pack_into(">Q", data, l2 & ~COPIED, 1)
    path.write_bytes(data)
    assert "version 2" in str(await refusal(path, workers))


@pytest.mark.parametrize(
    ("word", "bitmap"),
    [
        (COPIED | 5 * CLUSTER, 1 << 32 | 1),  # allocated and zero
        (0, 1),  # allocated nowhere
        (COPIED | 5 * CLUSTER | 1, 1),  # the zero flag of standard entries
        (COPIED | 5 * CLUSTER + 4096, 1),
        (COMPRESSED | 6 * CLUSTER, 1),
        (COPIED | 1 << 40, 3),
        (COPIED | 1 << 40, (1 << 32) - 1),
    ],
)
async def test_broken_subclusters(tmp_path: Path, workers: Workers, word: int, bitmap: int) -> None:
    specimen = Specimen(tmp_path / "sub.qcow2", "-o", "extended_l2=on")
    struct.pack_into(">QQ", specimen.data, specimen.l2 + 16, word, bitmap)
    specimen.path.write_bytes(specimen.data)
    disk = await opener(specimen.path, workers)()
    with pytest.raises(CorruptImage):
        await content(disk, CLUSTER, CLUSTER)
    assert await content(disk, 0, CLUSTER) == b"\1" * CLUSTER
    await disk.close()


async def test_compressed_clusters_beside_a_data_file(tmp_path: Path, workers: Workers) -> None:
    data = tmp_path / "data.raw"
    path = create(tmp_path / "disk.qcow2", "1M", "-o", f"data_file={data}")
    qemu_io(path, "write -P 1 0 128k")
    image = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", image, 40)
    (l2,) = struct.unpack_from(">Q", image, l1)
    l2 &= ~COPIED
    for value in (COMPRESSED | 5 * CLUSTER, COPIED | 2 * CLUSTER):
        struct.pack_into(">Q", image, l2, value)
        path.write_bytes(image)
        assert "external data file" in str(await refusal(path, workers))


# --- compressed clusters -----------------------------------------------------------------------


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-12)
    return packer.compress(data) + packer.flush()


@given(st.binary(max_size=5000), st.binary(max_size=600))
@settings(max_examples=150)
def test_inflate_is_zlib_whatever_follows(data: bytes, padding: bytes) -> None:
    assert inflate(deflated(data) + padding, len(data)) == data


@given(st.binary(max_size=3000), st.integers(1, 4096))
@settings(max_examples=150)
def test_garbage_is_an_error_or_as_long_as_it_should_be(data: bytes, size: int) -> None:
    for kind in Compression:
        try:
            assert len(decompressor(kind)(data, size)) == size
        except ValueError:
            continue


@pytest.mark.parametrize("kind", list(Compression))
@pytest.mark.parametrize("named", [True, False])
def test_a_bomb_gets_no_more_than_its_cluster(kind: Compression, named: bool) -> None:
    bomb = bytes(100 << 20)
    if kind is Compression.ZLIB:
        packed = deflated(bomb)
        assert decompressor(kind)(packed, CLUSTER) == bytes(CLUSTER)
        return
    packed = zstandard.ZstdCompressor(write_content_size=named).compress(bomb)
    with pytest.raises(ValueError, match=r"bytes|full frame"):
        decompressor(kind)(packed, CLUSTER)


@pytest.mark.parametrize("kind", list(Compression))
def test_too_short_is_an_error(kind: Compression) -> None:
    short = b"x" * 1000
    packed = deflated(short) if kind is Compression.ZLIB else zstandard.compress(short)
    with pytest.raises(ValueError, match="bytes"):
        decompressor(kind)(packed, CLUSTER)


# --- anything ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "extended_l2=on", "cluster_size=512"])
def test_mutants(tmp_path: Path, options: str) -> None:
    path = create(tmp_path / "good.qcow2", "600k", *(["-o", options] if options else []))
    qemu_img("bitmap", "--add", "-g", "4096", path, "b0")
    qemu_io(path, "write -P 1 0 70k", "write -z 128k 64k", "write -P 2 200k 4k")
    qemu_img("snapshot", "-c", "then", path)
    qemu_io(path, "write -P 3 68k 3k")
    if options != "extended_l2=on":
        length = options.removeprefix("cluster_size=") or "64k"
        qemu_io(path, f"write -c -P 4 320k {length}")
    good = path.read_bytes()
    places = [at for at in range(0, len(good), 8) if any(good[at : at + 8])]
    tables = [at for at in places if at < 512 or good[at : at + 8] not in _CONTENT]
    with threads() as (runner, workers):
        seen = set()

        @given(st.lists(_changes(tables), min_size=1, max_size=3))
        @settings(max_examples=150, derandomize=True)
        def run(changes: list[Mutation]) -> None:
            found = runner.run(outcome(tmp_path / "mutant", good, changes, "qcow2", workers))
            seen.add(found.partition(" at ")[0] if found != "fine" else found)

        run()
        assert len(seen) > 1


_CONTENT = {bytes([n]) * 8 for n in range(1, 5)}


def _changes(places: list[int]) -> st.SearchStrategy[Mutation]:
    value = mutations(1).map(lambda found: found[0][1])
    return st.tuples(st.sampled_from(places).flatmap(lambda at: st.integers(at, at + 7)), value)


async def test_a_data_file_that_is_the_image_itself(tmp_path: Path, workers: Workers) -> None:
    data = tmp_path / "data.raw"
    path = create(tmp_path / "disk.qcow2", "1M", "-o", f"data_file={data}")
    data.unlink()
    data.symlink_to(path)
    with pytest.raises(DiskError, match="its own data file"):
        await opener(path, workers)()
