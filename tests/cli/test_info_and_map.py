"""``nbdsrv info`` and ``nbdsrv map``, beside what qemu-img says of the same file."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import COMMAND, environment, nbdsrv, serving
from tests.formats.images import IMAGES, Image
from tests.source.peers import listening, unix_uri

MIB = 1 << 20
SPARSE = Image("sparse", 4 * MIB, ((0, 65536), (MIB, MIB), (4 * MIB - 4096, 4096)))


def output(*arguments: str | Path) -> str:
    done = nbdsrv(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def made(tmp_path: Path, image: Image) -> Path:
    path = tmp_path / f"{image.name}.img"
    image.make(str(path))
    return path


def data_bytes(image: Image) -> int:
    """Allocated bytes: data reaches to the next multiple of the file system's block."""
    blocks = set()
    for offset, length in image.data:
        blocks |= set(range(offset // 4096, (offset + length + 4095) // 4096))
    return sum(min(4096, image.size - block * 4096) for block in blocks)


def test_info(tmp_path: Path) -> None:
    facts = json.loads(output("info", "--json", made(tmp_path, SPARSE)))
    assert facts == {
        "source": str(tmp_path / "sparse.img"),
        "format": "raw",
        "size": 4 * MIB,
        "data_bytes": 65536 + MIB + 4096,
        "zero_bytes": 0,
        "hole_bytes": 4 * MIB - 65536 - MIB - 4096,
        "block_size": {"minimum": 1, "preferred": 4096, "maximum": 32 * MIB},
        "contexts": ["base:allocation", "qemu:allocation-depth"],
    }


def test_info_in_words(tmp_path: Path) -> None:
    lines = output("info", made(tmp_path, SPARSE)).splitlines()
    found = {line[:12].strip(): line[12:].strip() for line in lines}
    assert found["source"] == str(tmp_path / "sparse.img")
    assert found["format"] == "raw"
    assert found["size"] == "4194304 (4 MiB)"
    assert found["data bytes"].startswith(f"{65536 + MIB + 4096} ")


def test_info_of_the_largest_export_there_is_ends(tmp_path: Path) -> None:
    size = 2**63 - 1
    with listening(tmp_path / "sock", "nbdkit", "null", str(size)):
        facts = json.loads(output("info", "--json", unix_uri(tmp_path / "sock")))
    assert facts["size"] == size
    assert facts["hole_bytes"] == 128 << 40
    assert facts["unknown_bytes"] == size - (128 << 40)


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_every_size_to_the_byte(tmp_path: Path, image: Image) -> None:
    path = made(tmp_path, image)
    facts = json.loads(output("info", "--json", path))
    assert facts["size"] == image.size
    assert facts["data_bytes"] + facts["zero_bytes"] + facts["hole_bytes"] == image.size
    assert facts["data_bytes"] == data_bytes(image)
    rows = json.loads(output("map", "--json", path))
    assert sum(row["length"] for row in rows) == image.size
    assert sum(row["length"] for row in rows if row["data"]) == data_bytes(image)
    golden = image.golden()
    for row in rows:
        start, end = row["start"], row["start"] + row["length"]
        assert row["data"] or not any(golden[start:end])


def qemu_map(path: Path) -> list[dict[str, Any]]:
    if shutil.which("qemu-img") is None and not os.environ.get("CI"):
        pytest.skip("qemu-img is not installed")
    command = ["qemu-img", "map", "-f", "raw", "--output=json", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    rows = json.loads(found.stdout)
    assert isinstance(rows, list)
    return rows


def shown(rows: list[dict[str, Any]]) -> list[tuple[int, int, bool, bool]]:
    return [(row["start"], row["length"], row["data"], row["zero"]) for row in rows]


@pytest.mark.parametrize(
    "image",
    [SPARSE, *(image for image in IMAGES if image.size and image.size % 512 == 0)],
    ids=lambda image: image.name,
)
def test_map_is_qemus_map(tmp_path: Path, image: Image) -> None:
    path = made(tmp_path, image)
    assert shown(json.loads(output("map", "--json", path))) == shown(qemu_map(path))


@pytest.mark.parametrize("name", ["1MiB+3", "1MiB+3-hole-tail", "4097-hole-then-byte"])
def test_map_is_qemus_map_but_for_its_rounding_of_odd_sizes(tmp_path: Path, name: str) -> None:
    (image,) = (image for image in IMAGES if image.name == name)
    path = made(tmp_path, image)
    ours = shown(json.loads(output("map", "--json", path)))
    # qemu-img 7.2 counts in sectors and adds the rest of the last one.
    theirs = [
        (start, min(length, image.size - start), data, zero)
        for start, length, data, zero in shown(qemu_map(path))
        if start < image.size
    ]
    assert ours == theirs


def test_map_in_words(tmp_path: Path) -> None:
    rows = [line.split() for line in output("map", made(tmp_path, SPARSE)).splitlines()]
    assert rows == [
        ["0", "65536", "data"],
        ["65536", str(MIB - 65536), "hole"],
        [str(MIB), str(MIB), "data"],
        [str(2 * MIB), str(2 * MIB - 4096), "hole"],
        [str(4 * MIB - 4096), "4096", "data"],
    ]


def test_map_of_nothing(tmp_path: Path) -> None:
    path = made(tmp_path, IMAGES[0])
    assert path.stat().st_size == 0
    assert output("map", path) == ""
    assert json.loads(output("map", "--json", path)) == []


def test_map_of_another_context(tmp_path: Path) -> None:
    path = made(tmp_path, SPARSE)
    context = ("--context", "qemu:allocation-depth")
    rows = json.loads(output("map", "--json", path, *context))
    assert [row["type"] for row in rows] == [1, 0, 1, 0, 1]
    assert output("map", path, *context).splitlines()[0].split() == ["0", "65536", "1"]


def test_map_of_any_context_of_a_server(tmp_path: Path) -> None:
    path, bitmap = tmp_path / "disk.qcow2", "qemu:dirty-bitmap:since"
    qemu_img = shutil.which("qemu-img")
    if qemu_img is None:
        pytest.skip("qemu-img is not installed")
    for words in (["create", "-f", "qcow2", path, "1M"], ["bitmap", "--add", path, "since"]):
        subprocess.run([qemu_img, *words], check=True, capture_output=True)
    with serving(path, "--listen", f"unix:{tmp_path}/sock") as served:
        uri = str(served.uris[0])
        assert output("map", uri, "--context", bitmap).split() == ["0", str(MIB), "0"]
        rows = json.loads(output("map", uri, "--json", "--context", bitmap))
        assert [(row["start"], row["length"], row["type"]) for row in rows] == [(0, MIB, 0)]
        done = nbdsrv("map", uri, "--context", "x-none:such")
        assert (done.returncode, done.stdout) == (2, "")
        assert "has no context x-none:such" in done.stderr
        assert served.stop() == (0, "")


def test_a_disk_larger_than_anything(tmp_path: Path) -> None:
    path = tmp_path / "huge.img"
    with open(path, "wb") as file:
        try:
            file.truncate(15 << 40)
        except OSError as error:
            pytest.skip(f"this file system's files are smaller: {error}")
        file.seek(12 << 40)
        file.write(b"x" * 4096)
    rows = shown(json.loads(output("map", "--json", path)))
    assert rows == [
        (0, 12 << 40, False, True),
        (12 << 40, 4096, True, False),
        ((12 << 40) + 4096, (3 << 40) - 4096, False, True),
    ]


def test_whoever_reads_only_the_first_line(tmp_path: Path) -> None:
    stripes = Image("many", 64 * MIB, tuple((at, 4096) for at in range(0, 64 * MIB, 8192)))
    path = made(tmp_path, stripes)
    for options in ((), ("--json",)):
        command = [*COMMAND, "map", str(path), *options]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.read(10)
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(20) in {0, 1}
