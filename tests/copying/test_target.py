"""The grammar of TARGET."""

import os
from pathlib import Path

import pytest

from nbdsrv.copying.target import Place, Target, parse_target
from nbdsrv.copying.writers import Compression, Making, check_making
from nbdsrv.errors import ConfigError
from tests.formats.places import loop_device


@pytest.mark.parametrize(
    ("text", "location", "kind"),
    [
        ("qcow2:/d/x", "/d/x", "qcow2"),
        ("raw:x.qcow2", "x.qcow2", "raw"),
        ("vhd:x", "x", "vhd"),
        ("vmdk:a b", "a b", "vmdk"),
        ("x.qcow2", "x.qcow2", "qcow2"),
        ("x.QCOW2", "x.QCOW2", "qcow2"),
        ("x.img", "x.img", "raw"),
        ("x.raw", "x.raw", "raw"),
        ("x.vhd", "x.vhd", "vhd"),
        ("x.vpc", "x.vpc", "vhd"),
        ("x.vmdk", "x.vmdk", "vmdk"),
        ("x", "x", "raw"),
        ("a.b/c", "a.b/c", "raw"),
        ("odd:name.vhd", "odd:name.vhd", "vhd"),
        ("./-", "./-", "raw"),
    ],
)
def test_files(text: str, location: str, kind: str) -> None:
    assert parse_target(text) == Target(text, Place.FILE, location, kind)


def test_the_format_asked_for_goes_before_the_extension() -> None:
    assert parse_target("x.img", "qcow2").format == "qcow2"
    assert parse_target("qcow2:x", "qcow2").format == "qcow2"
    assert parse_target("x.vdi", "raw").format == "raw"


@pytest.mark.parametrize(("text", "kind"), [("-", "raw"), ("raw:-", "raw"), ("vhd:-", "vhd")])
def test_standard_output(text: str, kind: str) -> None:
    assert parse_target(text) == Target(text, Place.PIPE, "-", kind)


def test_standard_output_in_a_format_asked_for() -> None:
    assert parse_target("-", "vmdk").format == "vmdk"


@pytest.mark.parametrize(
    "text", ["nbd://host/x", "nbds://host", "nbd+unix:///?socket=/s", "nbds+unix:///x?socket=/s"]
)
def test_nbd(text: str) -> None:
    target = parse_target(text)
    assert (target.place, target.location, target.format) == (Place.NBD, text, "raw")
    assert target.in_place


def test_a_block_device_is_overwritten_in_place(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    with loop_device(str(path)) as device:
        for text in (device, f"raw:{device}"):
            assert parse_target(text) == Target(text, Place.DEVICE, device, "raw")
        with pytest.raises(ConfigError, match="qcow2 image goes into a file"):
            parse_target(f"qcow2:{device}")


@pytest.mark.parametrize(
    ("text", "to", "said"),
    [
        ("", None, "empty"),
        ("qcow2:", None, "empty"),
        ("vhdx:/x", None, "vhdx images are not written"),
        ("x.vhdx", None, "vhdx images are not written"),
        ("x.vdi", None, "vdi images are not written"),
        ("x.img.gz", None, "gzip images are not written"),
        ("x.ova", None, "ova images are not written"),
        ("repo:/x", None, "neither"),
        ("qemu:/s#d", None, "neither"),
        ("qcow2:x", "raw", "contradicts"),
        ("nbd://host/x", "qcow2", "overwritten"),
    ],
)
def test_what_cannot_be_a_target(text: str, to: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_target(text, to)


@pytest.mark.parametrize(
    ("text", "compression"),
    [
        ("zlib", Compression("zlib")),
        ("zstd", Compression("zstd")),
        ("none", Compression("none")),
        ("zlib:9", Compression("zlib", 9)),
        ("zstd:19", Compression("zstd", 19)),
    ],
)
def test_compression(text: str, compression: Compression) -> None:
    assert Compression.parse(text) == compression


@pytest.mark.parametrize(
    "text", ["", "gzip", "zlib:", "zlib:0", "zlib:10", "zstd:20", "none:1", "zstd:-1", "zlib:²"]
)
def test_no_such_compression(text: str) -> None:
    with pytest.raises(ConfigError, match="--compress"):
        Compression.parse(text)


@pytest.mark.parametrize(
    ("text", "making", "said"),
    [
        ("x.img", Making(Compression("zlib")), "not compressed"),
        ("x.vhd", Making(Compression("zstd")), "not compressed"),
        ("x.vmdk", Making(Compression("zstd")), "only with zlib"),
        ("x.vmdk", Making(Compression("none")), "leave out"),
        ("x.img", Making(backing="b"), "no backing file"),
        ("qcow2:-", Making(Compression("zlib")), "pipe"),
        ("qcow2:-", Making(backing="b"), "pipe"),
        ("nbd://h/x", Making(backing="b"), "new images"),
        ("nbd://h/x", Making(Compression("none")), "new images"),
    ],
)
def test_what_does_not_go_together(text: str, making: Making, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_making(parse_target(text), making)


@pytest.mark.parametrize(
    ("text", "making"),
    [
        ("x.qcow2", Making(Compression("zstd", 3), "b", replace=True)),
        ("x.vmdk", Making(Compression("zlib", 9))),
        ("x.img", Making(Compression("none"))),
        ("qcow2:-", Making(Compression("none"))),
        ("nbd://h/x", Making()),
    ],
)
def test_what_does(text: str, making: Making) -> None:
    check_making(parse_target(text), making)
    assert not os.path.exists("x.qcow2")
