"""Images over other images: served as qemu-img reads them, or refused with both names.

::

    top.qcow2 ──> middle.vmdk ──> ...        every pair that qemu-img can make
"""

from pathlib import Path

from conformance.context import Context
from conformance.golden import (
    Golden,
    expect_refused,
    expect_same_content,
    expect_same_map,
    read_back,
    served,
)
from conformance.registry import Part, check

NEEDS = ("qemu-img", "qemu-io", "nbdcopy")

CHANGES = ("write -P 9 100k 3M", "write -z 12M 128k", "write -P 4 20M 2k")


def _above(context: Context, base: Path, base_form: str, form: str = "qcow2") -> Path:
    """A child of ``base`` in which some of it is overwritten."""
    top = context.directory / f"top.{form}"
    words = ("-f", form, "-F", base_form, "-b", base.name, top)
    context.run("qemu-img", "create", *words)
    commands = [word for change in CHANGES for word in ("-c", change)]
    context.run("qemu-io", "-f", form, *commands, top)
    return top


def _same(context: Context, top: Path, form: str = "qcow2") -> None:
    expect_same_content(context, served(context, top), read_back(context, top, form))
    expect_same_map(context, top, form)


BASES = {"raw": "raw", "qcow2": "qcow2", "vmdk": "vmdk", "vdi": "vdi", "vhd": "vpc", "vhdx": "vhdx"}


def _register() -> None:
    for name, qemu in BASES.items():

        def run(context: Context, name: str = name, qemu: str = qemu) -> None:
            base = Golden(context).convert(qemu, f"base.{name}")
            _same(context, _above(context, base, qemu))

        part = Part.QUICK if name == "vmdk" else Part.FORMATS
        check("chains", f"qcow2 over {name}", needs=NEEDS, part=part)(run)


_register()


@check("chains", "vmdk over vmdk", needs=NEEDS, part=Part.FORMATS)
def vmdk(context: Context) -> None:
    """The parent's CID is the one the child was made over."""
    base = Golden(context).convert("vmdk", "base.vmdk")
    _same(context, _above(context, base, "vmdk", "vmdk"), "vmdk")


@check("chains", "qcow over raw", needs=NEEDS, part=Part.FORMATS)
def qcow(context: Context) -> None:
    """Version 1 has backing files, too."""
    base = Golden(context).raw.path
    _same(context, _above(context, base, "raw", "qcow"), "qcow")


@check("chains", "four deep", needs=NEEDS, part=Part.FORMATS)
def four(context: Context) -> None:
    """Each image over the one before, each with changes of its own."""
    base, form = Golden(context).convert("qcow2", "0.qcow2"), "qcow2"
    for number in range(1, 5):
        top = context.directory / f"{number}.qcow2"
        context.run("qemu-img", "create", "-f", form, "-F", form, "-b", base.name, top)
        change = f"write -P {number} {number * 2}M 1M"
        context.run("qemu-io", "-f", form, "-c", change, top)
        base = top
    _same(context, base)


@check("chains", "shorter base", needs=NEEDS, part=Part.FORMATS)
def shorter(context: Context) -> None:
    """What lies beyond the base's end reads as zeroes."""
    base = Golden(context).convert("qcow2", "base.qcow2")
    top = context.directory / "top.qcow2"
    words = ("-f", "qcow2", "-F", "qcow2", "-b", base.name, top, "40M")
    context.run("qemu-img", "create", *words)
    context.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 30M 64k", top)
    _same(context, top)


@check("chains", "missing parent", needs=NEEDS)
def missing(context: Context) -> None:
    """The error names both files."""
    base = Golden(context).convert("qcow2", "base.qcow2")
    top = _above(context, base, "qcow2")
    base.unlink()
    expect_refused(context, top, "base.qcow2", "top.qcow2")


@check("chains", "wrong parent", needs=NEEDS)
def wrong(context: Context) -> None:
    """A VMDK parent that was written to afterwards has another CID; it is never served."""
    base = Golden(context).convert("vmdk", "base.vmdk")
    top = _above(context, base, "vmdk", "vmdk")
    context.run("qemu-io", "-f", "vmdk", "-c", "write -P 1 0 64k", base)
    expect_refused(context, top, "base.vmdk", "top.vmdk")


@check("chains", "a loop", needs=NEEDS, part=Part.FORMATS)
def loop(context: Context) -> None:
    """An image that is its own ancestor."""
    base = Golden(context).convert("qcow2", "base.qcow2")
    top = _above(context, base, "qcow2")
    rebase = ("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", top.name, base)
    context.run("qemu-img", *rebase)
    expect_refused(context, top, "loop")


@check("chains", "json: and nbd: parents", needs=("qemu-img",), part=Part.FORMATS)
def elsewhere(context: Context) -> None:
    """An image cannot make us open what is not a file."""
    context.run("qemu-img", "create", "-f", "qcow2", "disk.qcow2", "1M")
    for name in ('json:{"driver":"nbd","host":"127.0.0.1"}', "nbd://127.0.0.1:1/x"):
        rebase = ("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", name, "disk.qcow2")
        context.run("qemu-img", *rebase)
        expect_refused(context, "disk.qcow2", "not followed")
