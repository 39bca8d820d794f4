"""Chains of images: who may be below whom, and what is said when that cannot be."""

import os
import subprocess
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.formats.image_file import open_image_file
from nbdsrv.formats.opening import MAX_CHAIN, Opening, open_image
from tests.disk.reading import content

MIB = 1 << 20


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, timeout=20)


def overlay(path: Path, backing: str, kind: str = "qcow2") -> None:
    """A qcow2 over ``backing``, which need not exist."""
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-F", kind, "-b", backing, path, str(MIB))


async def test_a_parent_is_found_beside_the_image_that_names_it(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(MIB)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.img").write_bytes(data)
    overlay(tmp_path / "below" / "middle.qcow2", "base.img", "raw")
    overlay(tmp_path / "top.qcow2", "below/middle.qcow2")
    monkeypatch.chdir("/")
    disk = await open_image(str(tmp_path / "top.qcow2"), "", Opening(workers))
    assert data == await content(disk, 0, MIB)
    assert disk.backing is not None
    assert disk.backing.backing is not None
    assert "raw" == disk.backing.backing.format
    await disk.close()


async def test_an_image_that_is_its_own_ancestor_is_a_loop(
    workers: Workers, tmp_path: Path
) -> None:
    for name, below in (("a", "b"), ("b", "c"), ("c", "./../" + tmp_path.name + "/a")):
        overlay(tmp_path / name, below)
    with pytest.raises(CorruptImage, match="is above it: a loop"):
        await open_image(str(tmp_path / "a"), "", Opening(workers))


async def test_a_chain_has_a_depth_it_may_not_exceed(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(bytes(MIB))
    for number in range(1, MAX_CHAIN + 1):
        overlay(tmp_path / str(number), str(number - 1), "raw" if number == 1 else "qcow2")
    deepest = await open_image(str(tmp_path / str(MAX_CHAIN - 1)), "", Opening(workers))
    await deepest.close()
    with pytest.raises(CorruptImage, match=f"more than {MAX_CHAIN} images in a chain"):
        await open_image(str(tmp_path / str(MAX_CHAIN)), "", Opening(workers))


async def test_a_missing_parent_is_an_error_that_names_both(
    workers: Workers, tmp_path: Path
) -> None:
    overlay(tmp_path / "top.qcow2", "gone.img", "raw")
    with pytest.raises(DiskError, match=r"gone\.img: No such file .*parent of .*top\.qcow2"):
        await open_image(str(tmp_path / "top.qcow2"), "", Opening(workers))


@pytest.mark.parametrize(
    "name", ["nbd://127.0.0.1/x", "json:{}", "https://example.org/x.img", "rbd:pool/image"]
)
async def test_a_parent_that_is_not_a_file_is_not_followed(
    workers: Workers, tmp_path: Path, name: str
) -> None:
    (tmp_path / "child").write_bytes(b"")
    child = open_image_file(str(tmp_path / "child"))
    with pytest.raises(UnsupportedImage, match="not a plain file name"):
        await Opening(workers).below(child, name)
    child.close()


ODD_NAMES = ["disk\u00a0 1.img", "\u3000.img", "a\u200d\U0001f4be.img", "\udcff\udcfe.img"]
"""Spaces of other widths, a joiner in an emoji, bytes that are no UTF-8."""


@pytest.mark.parametrize("name", ODD_NAMES)
async def test_a_parent_may_be_called_as_files_are(
    workers: Workers, tmp_path: Path, name: str
) -> None:
    data = os.urandom(MIB)
    (tmp_path / name).write_bytes(data)
    overlay(tmp_path / "top.qcow2", name, "raw")
    disk = await open_image(str(tmp_path / "top.qcow2"), "", Opening(workers))
    assert data == await content(disk, 0, MIB)
    await disk.close()


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "a\x1b[2Jb", "a\u2028b", "a\ud800b"])
async def test_a_name_that_is_none_is_corrupt(workers: Workers, tmp_path: Path, name: str) -> None:
    (tmp_path / "child").write_bytes(b"")
    child = open_image_file(str(tmp_path / "child"))
    with pytest.raises(CorruptImage, match="its parent's name is"):
        await Opening(workers).below(child, name)
    child.close()


async def test_a_parent_is_opened_read_only(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "base.img").write_bytes(bytes(MIB))
    os.chmod(tmp_path / "base.img", 0o444)
    overlay(tmp_path / "top.qcow2", "base.img", "raw")
    disk = await open_image(str(tmp_path / "top.qcow2"), "", Opening(workers, writable=True))
    assert disk.backing is not None
    assert not disk.backing.abilities & disk.backing.abilities.WRITE
    await disk.close()


@pytest.mark.parametrize(
    ("kind", "opening", "said"),
    [
        ("luks", {}, "luks images are not served; raw:"),
        ("", {"snapshot": "s"}, "raw images have no internal snapshots"),
        ("", {"member": "m"}, "raw images have no members"),
        ("vhd", {"writable": True}, "vhd images are served read-only"),
        ("a b\n", {}, "'a b\\\\n' images are not served"),
    ],
)
async def test_what_a_format_cannot_do_is_said_in_one_line(
    workers: Workers, tmp_path: Path, kind: str, opening: dict[str, object], said: str
) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"LUKS\xba\xbe" + bytes(1000) if kind == "luks" else bytes(1000))
    asked = "" if kind == "luks" else kind
    with pytest.raises(UnsupportedImage, match=said) as caught:
        await open_image(str(path), asked, Opening(workers, **opening))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


async def test_descriptors_are_closed_when_opening_fails(workers: Workers, tmp_path: Path) -> None:
    overlay(tmp_path / "top.qcow2", "middle.qcow2")
    overlay(tmp_path / "middle.qcow2", "gone.img", "raw")
    with pytest.raises(DiskError):
        await open_image(str(tmp_path / "top.qcow2"), "", Opening(workers))
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(DiskError):
            await open_image(str(tmp_path / "top.qcow2"), "", Opening(workers))
    assert before == set(os.listdir("/proc/self/fd"))
