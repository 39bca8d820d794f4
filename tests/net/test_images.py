"""Images whose bytes lie scattered or packed: every way a READ of them can go, in every dialect.

qcow2, compressed or over a raw image: decoded blocks, plain clusters, holes, and what lies below.
"""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from served_images import MIB, Serve
from serving import ServerProcess

from protocol.constants import Command, CommandFlag, Dialect, Errno, ReplyType

CLUSTER = 1 << 16
CLUSTERS = 48
SIZE = CLUSTERS * CLUSTER + 777


def qemu_img(*words: str | Path) -> None:
    if shutil.which("qemu-img") is None:
        assert os.environ.get("CI") != "true", "CI is expected to have qemu-img"
        pytest.skip("qemu-img is not installed")
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, timeout=60)


def content() -> bytes:
    """Compressible, random and empty clusters in turn; a tail that is no whole sector."""
    rng = random.Random(11)
    words = [rng.randbytes(3).hex().encode() for _ in range(400)]
    parts = []
    for number in range(CLUSTERS + 1):
        text = b" ".join(rng.choice(words) for _ in range(10_000))[:CLUSTER]
        parts.append((text, rng.randbytes(CLUSTER), bytes(CLUSTER))[number % 3])
    return b"".join(parts)[:SIZE]


@pytest.fixture(scope="module")
def golden() -> bytes:
    return content()


@pytest.fixture(scope="module", params=["zlib", "zstd", "scattered"])
def image(
    request: pytest.FixtureRequest, golden: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    raw, path = folder / "raw", folder / "disk.qcow2"
    raw.write_bytes(golden)
    if request.param == "scattered":
        size = str(SIZE + 511 & ~511)
        qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", raw, path, size)
        order = list(range(0, CLUSTERS, 2))
        random.Random(12).shuffle(order)
        for number in order:
            data = golden[number * CLUSTER : (number + 1) * CLUSTER]
            (folder / "piece").write_bytes(data)
            write = f"write -s {folder}/piece {number * CLUSTER} {CLUSTER}"
            subprocess.run(["qemu-io", "-c", write, path], check=True, capture_output=True)
    else:
        kind = f"compression_type={request.param}"
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", kind, raw, path)
    return path


@pytest.fixture
def server(serve: Serve, image: Path, tmp_path: Path) -> ServerProcess:
    return serve(image, "--listen", f"unix:{tmp_path}/sock")


def shapes(rng: random.Random, count: int) -> list[tuple[int, int]]:
    lengths = (1, 512, 4096, 4096, 4096, 65536, 70_000, 300_000)
    found = [(0, SIZE), (SIZE - 1, 1), (CLUSTER - 1, 2), (5 * CLUSTER - 10, 3 * CLUSTER + 20)]
    while len(found) < count:
        offset = rng.randrange(SIZE)
        found.append((offset, min(rng.choice(lengths), SIZE - offset)))
    return found


def test_one_at_a_time(server: ServerProcess, golden: bytes, dialect: Dialect) -> None:
    """What is decoded for the first read is found decoded by later ones."""
    wire = server.connect().enter("", dialect)
    for offset, length in shapes(random.Random(1), 150) * 2:
        assert golden[offset : offset + length] == wire.read(offset, length)


def test_many_at_once(server: ServerProcess, golden: bytes, dialect: Dialect) -> None:
    wires = [server.connect().enter("", dialect) for _ in range(3)]
    rng = random.Random(2)
    for _ in range(4):
        asked = {wire: shapes(rng, 60) for wire in wires}
        for wire in wires:
            wire.send(b"".join(wire.prepare(Command.READ, *each) for each in asked[wire]))
        for wire in wires:
            for _ in asked[wire]:
                answer = wire.answer()
                begin = answer.asked.offset
                assert golden[begin : begin + answer.asked.length] == answer.data()


def test_in_one_chunk(server: ServerProcess, golden: bytes, chunked: Dialect) -> None:
    wire = server.connect().enter("", chunked)
    for offset, length in shapes(random.Random(3), 60):
        answer = wire.call(Command.READ, offset, length, CommandFlag.DF)
        assert golden[offset : offset + length] == answer.data()
        assert [ReplyType.OFFSET_DATA] == answer.kinds


def test_over_tcp_with_a_client_that_reads_slowly(serve: Serve, image: Path, golden: bytes) -> None:
    server = serve(image, "--listen", "127.0.0.1:0")
    wire = server.connect(receive_buffer=4096).enter("", Dialect.STRUCTURED)
    asked = shapes(random.Random(4), 100)
    wire.send(b"".join(wire.prepare(Command.READ, *each) for each in asked))
    for _ in asked:
        answer = wire.answer()
        begin = answer.asked.offset
        assert golden[begin : begin + answer.asked.length] == answer.data()


def test_a_broken_block_spoils_its_own_range(
    serve: Serve, tmp_path: Path, golden: bytes, chunked: Dialect
) -> None:
    """EIO with the good part and the place; the text names no path; all else is served."""
    raw, path = tmp_path / "raw", tmp_path / "disk.qcow2"
    raw.write_bytes(golden)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
    with path.open("r+b") as file:
        file.seek(40)
        file.seek(int.from_bytes(file.read(8), "big"))
        table = int.from_bytes(file.read(8), "big") & 0xFFFFFFFFFFFE00
        file.seek(table + 3 * 8)  # the second cluster of text
        entry = int.from_bytes(file.read(8), "big")
        assert entry >> 62 & 1, "a compressed cluster"
        file.seek(entry & (1 << 54) - 1)
        file.write(b"\xff")  # a deflate block of a type there is not
    server = serve(path, "--listen", f"unix:{tmp_path}/sock")
    wire = server.connect().enter("", chunked)
    bad = 3 * CLUSTER
    for offset, length in ((bad, 4096), (bad + 100, 1), (bad - 50, 100), (CLUSTER, 3 * CLUSTER)):
        for flags in (0, CommandFlag.DF):
            answer = wire.call(Command.READ, offset, length, flags)
            assert Errno.EIO == answer.error
            assert "corrupt image: disk.qcow2 at" in answer.text
            assert str(tmp_path) not in answer.text
            assert max(bad, offset) == answer.error_offset
            assert golden[offset : max(bad, offset)] == answer.good()
    assert golden[:bad] == wire.read(0, bad)
    assert golden[bad + CLUSTER : SIZE] == wire.read(bad + CLUSTER, SIZE - bad - CLUSTER)


def test_memory_of_decoded_blocks_is_bounded(serve: Serve, tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "disk.qcow2"
    raw.write_bytes(b"compressible " * (64 * MIB // 13))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
    server = serve(path, "--listen", f"unix:{tmp_path}/sock", "--cache", "8")
    wire = server.connect().enter("", Dialect.STRUCTURED)
    wire.read(0, 4096)
    before = server.resident()
    golden = raw.read_bytes()
    for offset in range(0, len(golden) - 4096, CLUSTER // 2):
        assert golden[offset : offset + 4096] == wire.read(offset, 4096)
    assert server.resident() - before < 24 * MIB
