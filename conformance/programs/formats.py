"""Images of every format that qemu-img creates, served and mapped as qemu-img reads them.

One check per sub-format: nbdcopy's download over our server has the SHA-256 of
``qemu-img convert``, ``qemu-img compare`` finds our export identical to the image, ``qemu-img map``
and ``nbdsrv map`` call the same bytes data.
"""

import json

from conformance.context import Context
from conformance.golden import (
    Golden,
    expect_refused,
    expect_same_content,
    expect_same_map,
    read_back,
    served,
)
from conformance.outcome import CheckFailedError
from conformance.registry import Part, check, expect, expect_in

NEEDS = ("qemu-img", "nbdcopy")
CALIBRATIONS = 8
"""Times QEMU may try to make an encrypted image."""

KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "qcow2": {
        "v3": ("",),
        "v2": ("compat=0.10",),
        "clusters of 512": ("cluster_size=512",),
        "clusters of 2M": ("cluster_size=2M",),
        "refcounts of 1 bit": ("refcount_bits=1",),
        "subclusters": ("extended_l2=on,cluster_size=128k",),
        "zlib": ("", "-c"),
        "zstd": ("compression_type=zstd", "-c"),
        "zlib 4k": ("cluster_size=4k", "-c"),
        "data file": ("data_file=outside.bin",),
        "data file raw": ("data_file=outside.raw,data_file_raw=on",),
        "preallocated": ("preallocation=metadata",),
    },
    "qcow": {"v1": ("",)},
    "vhd": {
        "dynamic": ("subformat=dynamic,force_size=on",),
        "fixed": ("subformat=fixed,force_size=on",),
        "by geometry": ("subformat=dynamic",),
    },
    "vhdx": {
        "dynamic": ("subformat=dynamic",),
        "fixed": ("subformat=fixed",),
        "blocks of 1M": ("subformat=dynamic,block_size=1M",),
        "blocks of 256M": ("subformat=dynamic,block_size=256M",),
    },
    "vmdk": {
        kind: (f"subformat={kind}",)
        for kind in (
            *("monolithicSparse", "monolithicFlat", "streamOptimized"),
            *("twoGbMaxExtentSparse", "twoGbMaxExtentFlat"),
        )
    },
    "vdi": {"dynamic": ("",), "static": ("static=on",)},
    "parallels": {"expanding": ("",)},
}
"""Format, feature, and what ``qemu-img convert`` is told: options, then flags."""

QEMU_NAMES = {"vhd": "vpc"}

WITHOUT_MAP = {"vhdx"}
"""Formats of which qemu-img 7.2 says no more than that all of it is data."""

LOOKED_THROUGH = {"preallocated", "static"}
"""Of what these have allocated, QEMU asks the host's file system for holes; we call it data."""


def _image(context: Context, form: str, feature: str, options: str, *flags: str) -> None:
    qemu = QEMU_NAMES.get(form, form)
    path = Golden(context).convert(qemu, f"disk.{form}", options, *flags)
    server = served(context, path)
    expect_same_content(context, server, read_back(context, path, qemu))
    words = ("-f", "raw", "-F", qemu, server.uri(), path)
    expect_in("identical", context.run("qemu-img", "compare", *words).stdout, "compare")
    if form not in WITHOUT_MAP and feature not in LOOKED_THROUGH:
        expect_same_map(context, path, qemu)


def _register() -> None:
    for form, kinds in KINDS.items():
        for index, (feature, (options, *flags)) in enumerate(kinds.items()):

            def run(
                context: Context,
                form: str = form,
                feature: str = feature,
                options: str = options,
                flags: tuple[str, ...] = tuple(flags),
            ) -> None:
                _image(context, form, feature, options, *flags)

            # One of each format is seen to by whoever runs the quick part.
            part = Part.FORMATS if index else Part.QUICK
            check(form, feature, needs=NEEDS, part=part)(run)


_register()


@check("qcow", "compressed", needs=(*NEEDS, "qemu-io"), part=Part.FORMATS)
def qcow_compressed(context: Context) -> None:
    """Written by qemu-io; ``qemu-img convert -c`` of 7.2 cannot."""
    path = context.directory / "disk.qcow"
    context.run("qemu-img", "create", "-f", "qcow", path, "1M")
    packed = [word for at in (0, 4, 12, 200) for word in ("-c", f"write -c -P {at + 1} {at}k 4k")]
    context.run("qemu-io", "-f", "qcow", *packed, path)
    expect_same_content(context, served(context, path), read_back(context, path, "qcow"))
    expect_same_map(context, path, "qcow")


@check("qcow2", "snapshots", needs=(*NEEDS, "qemu-io"))
def snapshots(context: Context) -> None:
    """disk@NAME is what the disk was when the snapshot was taken."""
    golden = Golden(context)
    path = golden.convert("qcow2", "disk.qcow2")
    context.run("qemu-img", "snapshot", "-c", "before", path)
    changes = ("-c", "write -P 9 0 3M", "-c", "write -z 12M 64k", "-c", "discard 13M 64k")
    context.run("qemu-io", "-f", "qcow2", *changes, path)
    expect_same_content(context, served(context, f"{path}@before"), golden.digest)
    expect_same_content(context, served(context, path), read_back(context, path, "qcow2"))
    expect_same_map(context, path, "qcow2")


@check("qcow2", "dirty bitmap", needs=("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo"))
def dirty_bitmap(context: Context) -> None:
    """nbdinfo sees in qemu:dirty-bitmap:b0 what it sees of qemu-nbd -B b0."""
    path = Golden(context).convert("qcow2", "disk.qcow2")
    context.run("qemu-img", "bitmap", "--add", "-g", "64k", path, "b0")
    writes = ("-c", "write -P 1 100k 70k", "-c", "write -P 2 9M 1M", "-c", "write -P 2 20M 1k")
    context.run("qemu-io", "-f", "qcow2", *writes, path)
    # qemu-nbd in inetd style: nbdinfo starts it, and both end together.
    theirs = context.run(
        *("nbdinfo", "--map=qemu:dirty-bitmap:b0", "--json", "--"),
        *("[", "qemu-nbd", "-r", "-f", "qcow2", "-B", "b0", path, "]"),
    ).stdout
    server = served(context, path)
    ours = context.run("nbdinfo", "--map=qemu:dirty-bitmap:b0", "--json", server.uri()).stdout
    expect(_dirty(theirs), _dirty(ours), "dirty ranges")


def _dirty(text: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for row in json.loads(text):
        if row["type"] & 1:
            start, end = row["offset"], row["offset"] + row["length"]
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, end))
    return found


@check("qcow2", "16 TiB", needs=("qemu-img", "qemu-io", "nbdinfo"), part=Part.FORMATS)
def sixteen_tebibytes(context: Context) -> None:
    """Opens and maps although its L1 table alone is 256 KiB."""
    path = context.directory / "huge.qcow2"
    context.run("qemu-img", "create", "-f", "qcow2", path, "16T")
    context.run("qemu-io", "-f", "qcow2", "-c", "write 9T 1M", path)
    server = served(context, path)
    expect(16 << 40, int(context.run("nbdinfo", "--size", server.uri()).stdout), "size")
    expect_same_map(context, path, "qcow2")


@check("qcow2", "LUKS refused", needs=("qemu-img",), part=Part.FORMATS)
def encrypted(context: Context) -> None:
    """An encrypted image is not served as noise; the message says what it is."""
    secret = "secret,id=s,data=abc"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    create = ("create", "--object", secret, "-f", "qcow2", "-o", options)
    for attempt in range(CALIBRATIONS):
        try:
            context.run("qemu-img", *create, "disk.qcow2", "1M")
            break
        except CheckFailedError as error:
            # QEMU measures how fast it hashes, and gives up where the machine is busy.
            if "accurate CPU usage" not in str(error) or attempt + 1 == CALIBRATIONS:
                raise
    expect_refused(context, "disk.qcow2", "LUKS")


@check("raw", "a guest's header", needs=("qemu-img",), part=Part.FORMATS)
def disguised(context: Context) -> None:
    """raw:disk serves a file that begins like a qcow2 as the bytes it has."""
    path = Golden(context).convert("qcow2", "disk.qcow2")
    expect_same_content(context, served(context, f"raw:{path}"), read_back(context, path, "raw"))
