"""``nbdsrv map --json`` and ``info`` of formats and chains, beside ``qemu-img map``."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.program import nbdsrv
from tests.formats.images import Image
from tests.formats.written import qemu_img

MIB = 1 << 20
KEYS = ("start", "length", "depth", "present", "zero", "data", "offset")
SOURCE = Image("layout", 3 * MIB, ((0, 65536), (MIB + 131_072, 200_704), (3 * MIB - 4096, 4096)))
Row = tuple[object, ...]


def rows(text: str) -> list[Row]:
    return [tuple(row.get(key) for key in KEYS) for row in json.loads(text)]


def qemu_io(path: Path, *commands: str) -> None:
    options = [part for command in commands for part in ("-c", command)]
    subprocess.run(
        ["qemu-io", "-f", "qcow2", *options, str(path)],
        check=True,
        capture_output=True,
        timeout=60,
    )


def raw(directory: Path) -> Path:
    path = directory / "disk.img"
    SOURCE.make(str(path))
    return path


def converted(kind: str, *options: str) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        path = directory / f"disk.{kind}"
        qemu_img("convert", "-f", "raw", "-O", kind, *options, raw(directory), path)
        return path

    return make


def chain(directory: Path) -> Path:
    """Three images, each longer than the one below it, zeroes hiding data."""
    base, middle, top = (directory / f"{name}.qcow2" for name in ("base", "middle", "top"))
    qemu_img("create", "-f", "qcow2", base, "1M")
    qemu_io(base, "write -P 1 0 64k", "write -P 2 256k 64k", "write -z 512k 64k")
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", middle, "2M")
    qemu_io(middle, "write -P 3 128k 64k", "write -z 256k 64k")
    qemu_img("create", "-f", "qcow2", "-b", middle, "-F", "qcow2", top, "3M")
    qemu_io(top, "write -P 4 1M 64k", "write -P 5 2500k 64k")
    return top


def over_raw(directory: Path) -> Path:
    top = directory / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", raw(directory), "-F", "raw", top)
    qemu_io(top, "write -P 4 64k 64k", "write -z 1M 256k")
    return top


def scattered(directory: Path) -> Path:
    """Neighbours on the disk that are none in the file."""
    path = directory / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=4k", path, "1M")
    qemu_io(path, *(f"write -P {at + 1} {at * 4}k 4k" for at in (9, 8, 3, 4, 10)))
    return path


MADE = {
    "raw": raw,
    "qcow2": converted("qcow2"),
    "compressed": converted("qcow2", "-c"),
    "vhd": converted("vpc"),
    "vmdk": converted("vmdk"),
    "streamOptimized": converted("vmdk", "-o", "subformat=streamOptimized"),
    "vdi": converted("vdi"),
    "chain": chain,
    "over raw": over_raw,
    "scattered": scattered,
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_the_map_is_qemus_map(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    outcome = nbdsrv("map", "--json", path)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert rows(outcome.stdout) == rows(qemu_img("map", "--output=json", path))


def test_the_rows_say_it_in_nbdinfos_words_too(tmp_path: Path) -> None:
    path = chain(tmp_path)
    found = json.loads(nbdsrv("map", "--json", path).stdout)
    states = {(row["type"], row["description"]) for row in found}
    assert states == {(0, "data"), (2, "zero"), (3, "hole")}
    for row in found:
        assert row["data"] == (row["type"] == 0)
        assert row["zero"] == bool(row["type"] & 2)


def test_depths_are_a_context(tmp_path: Path) -> None:
    outcome = nbdsrv("map", "--json", "--context", "qemu:allocation-depth", chain(tmp_path))
    found = [(row["start"], row["type"]) for row in json.loads(outcome.stdout)]
    assert found[:4] == [(0, 3), (65536, 0), (131_072, 2), (196_608, 0)]


def test_info_tells_the_chain(tmp_path: Path) -> None:
    path = chain(tmp_path)
    facts = json.loads(nbdsrv("info", "--json", path).stdout)
    assert (facts["format"], facts["size"]) == ("qcow2", 3 * MIB)
    below = [(row["name"], row["format"], row["size"]) for row in facts["backing"]]
    assert below == [
        (str(tmp_path / "middle.qcow2"), "qcow2", 2 * MIB),
        (str(tmp_path / "base.qcow2"), "qcow2", MIB),
    ]
    assert facts["details"]["cluster_size"] == 65536
    assert facts["backing"][0]["details"]["cluster_size"] == 65536
    words = nbdsrv("info", path).stdout
    assert f"{tmp_path / 'base.qcow2'}: qcow2, 1048576 (1 MiB)" in words
    assert "  cluster size: 65536" in words.splitlines()
