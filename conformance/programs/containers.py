"""Disks inside something else: archives, compressed files, partitions."""

import os
import subprocess
from pathlib import Path

from conformance.context import Context
from conformance.golden import Golden, expect_refused, expect_same_content, served
from conformance.image import MIB, file_digest
from conformance.outcome import MissingPeerError
from conformance.process import find_program
from conformance.programs.nbdfuse import fuse_mount, loop_mount
from conformance.registry import Part, check, expect

NEEDS = ("qemu-img", "nbdcopy")

_OVF = """<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
<References><File ovf:id="f1" ovf:href="a.vmdk"/><File ovf:id="f2" ovf:href="b.vmdk"/></References>
<DiskSection><Info/><Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="{size}"/>
<Disk ovf:diskId="d2" ovf:fileRef="f2" ovf:capacity="{size}"/></DiskSection>
</Envelope>
"""


@check("archives", "ova", needs=(*NEEDS, "tar"))
def ova(context: Context) -> None:
    """Two disks in an archive GNU tar made; each is served by its name, none without one."""
    golden = Golden(context)
    golden.convert("vmdk", "a.vmdk", "subformat=streamOptimized")
    golden.convert("vmdk", "b.vmdk", "subformat=monolithicSparse")
    size = golden.raw.size
    (context.directory / "vm.ovf").write_text(_OVF.format(size=size))
    members = ("vm.ovf", "a.vmdk", "b.vmdk")
    context.run("tar", "--format=ustar", "-cf", "vm.ova", *members)
    path = context.directory / "vm.ova"
    expect_refused(context, path, "a.vmdk", "b.vmdk")
    for name in ("a.vmdk", "b.vmdk"):
        expect_same_content(context, served(context, f"{path}#{name}"), golden.digest)


def _packed(context: Context, suffix: str, *command: str) -> None:
    golden = Golden(context)
    context.run(*command, golden.raw.path)
    path = golden.raw.path.with_name(f"{golden.raw.path.name}.{suffix}")
    expect_same_content(context, served(context, path), golden.digest)


@check("compressed raw", "gzip", needs=(*NEEDS, "gzip"))
def gzip(context: Context) -> None:
    """One member, as gzip makes it."""
    _packed(context, "gz", "gzip", "-k")


@check("compressed raw", "xz", needs=(*NEEDS, "xz"), part=Part.FORMATS)
def xz(context: Context) -> None:
    """One block."""
    _packed(context, "xz", "xz", "-k", "-1")


@check("compressed raw", "xz, blocks", needs=(*NEEDS, "xz"), part=Part.FORMATS)
def xz_blocks(context: Context) -> None:
    """Many blocks, as ``xz -T`` makes them."""
    _packed(context, "xz", "xz", "-k", "-1", "--block-size=1MiB")


@check("compressed raw", "zstd", needs=(*NEEDS, "zstd"), part=Part.FORMATS)
def zstd(context: Context) -> None:
    """One frame."""
    _packed(context, "zst", "zstd", "-q")


_TABLES = {
    "mbr": ("label: dos\nstart=2048,size=8192,type=83\nstart=10240,size=26624,type=83\n", 2),
    "logical": ("label: dos\nstart=2048,size=40000,type=5\nstart=10240,size=26624,type=83\n", 5),
    "gpt": ("label: gpt\nstart=2048,size=8192\nstart=10240,size=26624\n", 2),
}
"""sfdisk's script, and the number of the partition at sector 10240."""


def _partitioned(context: Context, table: str) -> tuple[Path, Path]:
    """A disk with an ext4 file system in a partition, and that partition as a file."""
    disk, inside = context.directory / "disk.img", context.directory / "inside.img"
    tree = context.directory / "tree"
    tree.mkdir()
    for number in range(20):
        (tree / f"file{number}").write_bytes(os.urandom(1000 * number))
    with inside.open("wb") as file:
        file.truncate(26624 * 512)
    context.run("mkfs.ext4", "-q", "-F", "-d", tree, inside)
    with disk.open("wb") as file:
        file.truncate(24 * MIB)
        file.seek(10240 * 512)
        file.write(inside.read_bytes())
    words = (find_program("sfdisk"), "--quiet", "--wipe", "never", str(disk))
    subprocess.run(words, input=table.encode(), check=True, capture_output=True, timeout=30)
    return disk, inside


def _register() -> None:
    for name, (table, number) in _TABLES.items():

        def run(context: Context, table: str = table, number: int = number) -> None:
            disk, inside = _partitioned(context, table)
            server = served(context, f"{disk}~p{number}")
            expect_same_content(context, server, file_digest(inside))
            expect_refused(context, f"{disk}~p9", "9")

        part = Part.QUICK if name == "gpt" else Part.FORMATS
        needs = (*NEEDS, "sfdisk", "mkfs.ext4")
        check("partitions", name, needs=needs, part=part)(run)


_register()


@check("partitions", "mounted", needs=(*NEEDS, "sfdisk", "mkfs.ext4", "nbdfuse", "mount", "umount"))
def mounted(context: Context) -> None:
    """A partition of a compressed qcow2, as a file of nbdfuse, as a mounted file system."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        raise MissingPeerError("loop mounts need root and /dev/loop-control")
    disk, _ = _partitioned(context, _TABLES["gpt"][0])
    context.run("qemu-img", "convert", "-c", "-O", "qcow2", disk, "disk.qcow2")
    server = served(context, context.directory / "disk.qcow2~p2")
    path, unmount = fuse_mount(context, server, "-r")
    where = loop_mount(context, path, "ro")
    for file in sorted((context.directory / "tree").iterdir()):
        expect(file_digest(file), file_digest(where / file.name), f"sha256 of {file.name}")
    context.run("umount", where)
    unmount()
