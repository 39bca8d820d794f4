"""``nbdsrv compare``, beside what qemu-img says."""

import json
from pathlib import Path

import pytest

from tests.cli.program import nbdsrv, refusal
from tests.formats.written import qemu_img

DIFFERENT = 3
MIB = 1 << 20


@pytest.fixture
def pair(disk: Path) -> tuple[Path, Path]:
    """The same content as raw and as qcow2."""
    other = disk.with_suffix(".qcow2")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, other)
    return disk, other


def test_the_same_content(pair: tuple[Path, Path]) -> None:
    outcome = nbdsrv("compare", *pair)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout == "the content is the same\n"
    said = json.loads(nbdsrv("compare", "--json", *pair).stdout)
    assert said.pop("duration_s") >= 0
    # qcow2 has whole sectors only.
    assert said == {
        "sources": [str(path) for path in pair],
        "sizes": [100_001, 100_352],
        "equal": True,
        "first_difference": None,
    }


def test_the_first_byte_that_differs(pair: tuple[Path, Path]) -> None:
    with open(pair[0], "r+b") as file:
        for offset in (99_999, 65_537):
            file.seek(offset)
            file.write(bytes([pair[0].read_bytes()[offset] ^ 1]))
            file.flush()
    outcome = nbdsrv("compare", *pair)
    assert (outcome.returncode, outcome.stderr) == (DIFFERENT, "")
    assert outcome.stdout.startswith("the first difference is at byte 65537 ")
    outcome = nbdsrv("compare", "--json", *pair)
    assert outcome.returncode == DIFFERENT
    assert json.loads(outcome.stdout)["first_difference"] == 65_537
    outcome = nbdsrv("compare", "--quiet", *pair)
    assert (outcome.returncode, outcome.stdout) == (DIFFERENT, "")


def test_strictly_sizes_count(pair: tuple[Path, Path]) -> None:
    outcome = nbdsrv("compare", "--strict", *pair)
    assert outcome.returncode == DIFFERENT
    assert "100001 and 100352" in outcome.stdout


def test_what_cannot_be_read_is_no_difference(disk: Path) -> None:
    assert "No such file" in refusal(1, "compare", disk, disk.with_name("missing"))
    assert "Missing argument" in refusal(2, "compare", disk)
