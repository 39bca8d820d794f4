"""qcow2 of every shape that qemu-img makes is read and mapped as QEMU does it."""

import hashlib
import time
from pathlib import Path

import pytest

from nbdsrv.disk.runs import FileRun, Run
from nbdsrv.disk.workers import Workers
from tests.disk.check_disk import check_disk, extent_map
from tests.disk.reading import content
from tests.formats.images import Image
from tests.formats.qcow2.peer import (
    converted,
    create,
    opener,
    qemu_img,
    qemu_io,
    read_by_qemu,
    states_by_qemu,
)

MIB = 1 << 20
MIXED = Image(
    "mixed",
    3 * MIB + 512,
    ((0, 65536), (300_000, 70_000), (MIB, 512), (2 * MIB - 1, 2), (3 * MIB - 512, 1024)),
)
SMALL = Image("small", 262_144 + 1536, ((4096, 20_000), (100_000, 3), (262_144, 1536)))

SHAPES = [
    "",
    "compat=0.10",
    *(f"cluster_size={512 << n}" for n in range(13)),
    *(f"refcount_bits={1 << n}" for n in range(7)),
    "compat=0.10,cluster_size=512",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,cluster_size=2M",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full",
    "preallocation=metadata,cluster_size=512",
    "preallocation=metadata,extended_l2=on",
]
COMPRESSED = [
    *(
        f"compression_type={kind},cluster_size={size}"
        for kind in ("zlib", "zstd")
        for size in (512, 4096, 65536, 2 * MIB)
    ),
    "compat=0.10",
    "compression_type=zstd,extended_l2=on",
]


async def check_as_qemu(path: Path, golden: bytes, workers: Workers) -> None:
    """Content and map are QEMU's, and nothing is read wrong anywhere."""
    assert hashlib.sha256(read_by_qemu(path)).digest() == hashlib.sha256(golden).digest()
    disk = await opener(path, workers)()
    try:
        assert disk.size == len(golden)
        assert await content(disk, 0, disk.size) == golden
        assert await extent_map(disk) == states_by_qemu(path)
    finally:
        await disk.close()


@pytest.mark.parametrize("shape", SHAPES)
async def test_every_shape(tmp_path: Path, workers: Workers, shape: str) -> None:
    path, golden = converted(tmp_path, MIXED, *(["-o", shape] if shape else []))
    await check_as_qemu(path, golden, workers)


@pytest.mark.parametrize("shape", COMPRESSED)
async def test_compressed(tmp_path: Path, workers: Workers, shape: str) -> None:
    # Words, so that clusters shrink; random bytes, so that some do not.
    raw = tmp_path / "words.raw"
    golden = b"".join(hashlib.sha256(bytes([n % 251])).digest() for n in range(40_000))
    golden += MIXED.golden()
    raw.write_bytes(golden)
    path = tmp_path / "words.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", shape, raw, path)
    await check_as_qemu(path, golden, workers)


CONTRACT = [
    pytest.param(("-o", "cluster_size=65536"), id="plain"),
    pytest.param(("-o", "cluster_size=512,compat=0.10"), id="small clusters"),
    pytest.param(("-o", "extended_l2=on,cluster_size=16k"), id="subclusters"),
    pytest.param(("-c", "-o", "cluster_size=4096"), id="zlib"),
    pytest.param(("-c", "-o", "compression_type=zstd"), id="zstd"),
]


@pytest.mark.parametrize("options", CONTRACT)
async def test_contract(tmp_path: Path, workers: Workers, options: tuple[str, ...]) -> None:
    path, golden = converted(tmp_path, SMALL, *options)
    before = path.stat()
    await check_disk(opener(path, workers), golden, extents_granularity=512)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


async def test_changed_clusters(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "changed.qcow2", "2M")
    qemu_io(
        path,
        "write -P 1 0 320k",
        "write -z 64k 64k",  # allocated, reads as zeroes
        "write -z -u 128k 64k",  # given up, reads as zeroes
        "discard 192k 64k",
        "write -z 1M 64k",  # never allocated, but zero
        "write -c -P 2 512k 64k",
        "write -P 3 560k 1k",  # a compressed cluster, written again
    )
    await check_as_qemu(path, read_by_qemu(path), workers)
    await check_disk(opener(path, workers), read_by_qemu(path), extents_granularity=512)


async def test_subclusters_of_every_kind(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "sub.qcow2", "1M", "-o", "extended_l2=on")
    qemu_io(
        path,
        "write -P 1 0 6k",
        "write -z 10k 10k",
        "write -P 2 62k 4k",
        "write -z -u 128k 64k",
        "write -c -P 3 256k 64k",
        "write -P 4 400k 300k",
        "write -z 500k 20k",
        "discard 600k 6k",
    )
    golden = read_by_qemu(path)
    await check_as_qemu(path, golden, workers)
    await check_disk(opener(path, workers), golden, extents_granularity=2048)


@pytest.mark.parametrize("raw", ["off", "on"])
@pytest.mark.parametrize("extended", ["off", "on"])
async def test_external_data_file(
    tmp_path: Path, workers: Workers, raw: str, extended: str
) -> None:
    data = tmp_path / "data.raw"
    path = tmp_path / "outside.qcow2"
    options = f"data_file={data.name},data_file_raw={raw},extended_l2={extended}"
    create(path, "1536k", "-o", options.replace(data.name, str(data)))
    qemu_io(path, "write -P 1 0 70k", "write -z 128k 64k", "write -P 2 1000k 1k")
    golden = read_by_qemu(path)
    await check_as_qemu(path, golden, workers)
    disk = await opener(path, workers)()
    run = (await disk.runs(0, 512))[0]
    assert isinstance(run, FileRun)
    assert run.fd != getattr(disk, "file").fd  # noqa: B009
    await disk.close()
    await check_disk(opener(path, workers), golden)


async def test_zero_subclusters_that_the_data_file_has_no_cluster_for(
    tmp_path: Path, workers: Workers
) -> None:
    data = tmp_path / "data.raw"
    path = create(tmp_path / "outside.qcow2", "1M", "-o", f"data_file={data},extended_l2=on")
    qemu_io(path, "write -P 1 0 64k", "write -z 128k 4k", "write -z 192k 64k")
    golden = read_by_qemu(path)
    await check_as_qemu(path, golden, workers)
    await check_disk(opener(path, workers), golden, extents_granularity=2048)


async def test_a_missing_data_file_is_named_with_its_image(
    tmp_path: Path, workers: Workers
) -> None:
    data = tmp_path / "data.raw"
    path = create(tmp_path / "outside.qcow2", "1M", "-o", f"data_file={data}")
    data.unlink()
    with pytest.raises(Exception, match=r"data\.raw: .*outside\.qcow2"):
        await opener(path, workers)()


async def test_a_contiguous_image_is_one_run_per_page(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "whole.qcow2", "64M", "-o", "preallocation=metadata")
    disk = await opener(path, workers)()
    runs: tuple[Run, ...] = tuple(await disk.runs(0, disk.size))
    assert [run.length for run in runs] == [64 * MIB]
    await disk.close()


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ("16T", ""),
        ("16G", "cluster_size=512"),
        ("63T", "cluster_size=2M"),
        ("8T", "cluster_size=4k"),
    ],
)
async def test_huge_sparse_images_open_at_once(
    tmp_path: Path, workers: Workers, size: str, shape: str
) -> None:
    path = create(tmp_path / "huge.qcow2", size, *(["-o", shape] if shape else []))
    end = f"{int(size[:-1]) - 1}{size[-1]}"
    qemu_io(path, f"write -P 7 {end} 4k")
    started = time.monotonic()
    disk = await opener(path, workers)()
    assert await content(disk, disk.size // int(size[:-1]) * (int(size[:-1]) - 1), 2) == b"\7\7"
    assert await content(disk, disk.size - 2, 2) == b"\0\0"
    assert time.monotonic() - started < 20  # a few milliseconds on a quiet machine
    await disk.close()


async def test_facts(tmp_path: Path, workers: Workers) -> None:
    path = create(
        tmp_path / "facts.qcow2",
        "1M",
        "-o",
        "cluster_size=4096,refcount_bits=1,compression_type=zstd,lazy_refcounts=on",
    )
    disk = await opener(path, workers)()
    assert dict(disk.facts) == {
        "version": 3,
        "cluster_size": 4096,
        "refcount_bits": 1,
        "compression": "zstd",
        "extended_l2": False,
        "lazy_refcounts": True,
        "dirty": False,
        "corrupt": False,
        "snapshots": [],
        "bitmaps": [],
    }
    assert disk.block_sizes.preferred == 4096
    await disk.close()
