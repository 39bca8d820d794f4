"""Valid images of every format: by qemu-img where it can, by small builders where no tool here can.

::

    hypervisors  qcow2 qcow vhd vhdx vmdk vdi parallels as qemu-img writes them, with chains
    vmware       COWD and seSparse, which only ESXi writes
    differencing VHD, VHDX, VDI and Parallels children, which only hypervisors of their own write
    vhdx_log     VHDX with changes that only its log knows
    archives     OVA, XVA
    compressed   gzip, xz, zstd: plain, in members or blocks, and bombs
    bombs        compressed clusters and grains, XML, that unpack to more than there is memory
    partitioned  MBR with logical partitions, GPT with both sector sizes
    raw          no metadata: what the harness itself is tried with
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import cast

from conformance.fuzz.specimen import Specimen

__all__ = ["FORMATS", "specimens"]

Make = Callable[[Path], Sequence[Specimen]]

_HERE = "conformance.fuzz.specimens."

FORMATS = {
    "raw": ("hypervisors:raw",),
    "qcow2": ("hypervisors:qcow2", "hypervisors:qcow2_features", "bombs:qcow2"),
    "qcow2-write": ("hypervisors:qcow2_writable",),
    "qcow": ("hypervisors:qcow",),
    "vhd": ("hypervisors:vhd", "differencing:vhd"),
    "vhdx": ("hypervisors:vhdx", "differencing:vhdx", "vhdx_log:vhdx"),
    "vmdk": ("hypervisors:vmdk", "vmware:vmdk", "bombs:vmdk"),
    "vdi": ("hypervisors:vdi", "differencing:vdi"),
    "parallels": ("hypervisors:parallels", "differencing:parallels"),
    "ova": ("archives:ova", "bombs:ova"),
    "xva": ("archives:xva", "bombs:xva"),
    "gzip": ("compressed:gzip_images",),
    "xz": ("compressed:xz_images",),
    "zstd": ("compressed:zstd_images",),
    "partition": ("partitioned:partition",),
}
"""Format to the functions, ``module:name``, that make its specimens in a directory."""


def specimens(name: str, directory: Path) -> list[Specimen]:
    """All specimens of a format, made below ``directory``.

    Raises:
        MissingPeerError: a tool is not installed.
        CheckFailedError: it failed.
    """
    made: list[Specimen] = []
    for index, where in enumerate(FORMATS[name]):
        module, _, function = where.partition(":")
        make = cast("Make", getattr(import_module(_HERE + module), function))
        place = directory / f"{name}{index}"
        place.mkdir()
        made += make(place)
    return made
