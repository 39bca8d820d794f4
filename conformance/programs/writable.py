"""A qcow2 served with --write: what clients wrote is there, and ``qemu-img check`` is content."""

import subprocess

from conformance.context import Context
from conformance.golden import Golden, expect_same_content, read_back, served
from conformance.image import file_digest
from conformance.process import find_program
from conformance.registry import Part, check, expect, expect_in

NEEDS = ("qemu-img", "qemu-io")

WORK = (
    *("write -P 1 100k 300k", "write -P 2 9M 2M", "write -z 1M 64k", "write -z -u 4M 1M"),
    *("discard 12M 512k", "write -P 7 12M 4k", "write -P 5 20M 512", "flush"),
)
"""Allocated, absent and zeroed clusters are hit, whole and in part."""

KINDS = {"v3": "", "v2": "compat=0.10", "clusters of 4k": "cluster_size=4k"}


def _commands(*commands: str) -> list[str]:
    return [word for command in commands for word in ("-c", command)]


def _register() -> None:
    for feature, options in KINDS.items():

        def run(context: Context, options: str = options) -> None:
            golden = Golden(context)
            path = golden.convert("qcow2", "disk.qcow2", options)
            server = served(context, path, write=True)
            context.run("qemu-io", "-f", "raw", *_commands(*WORK), server.uri())
            context.run("qemu-io", "-f", "raw", *_commands(*WORK), golden.raw.path)
            server.stop()
            context.run("qemu-img", "check", "-f", "qcow2", path)
            expect(golden.raw.digest(), read_back(context, path, "qcow2"), "sha256 afterwards")

        part = Part.FORMATS if options else Part.QUICK
        check("qcow2 --write", feature, needs=NEEDS, part=part)(run)


_register()


@check("qcow2 --write", "over a base", needs=(*NEEDS, "nbdcopy"))
def over_base(context: Context) -> None:
    """Parts of clusters are completed from below; the base stays as it was."""
    golden = Golden(context)
    base = golden.convert("qcow2", "base.qcow2")
    before = file_digest(base)
    words = ("-f", "qcow2", "-F", "qcow2", "-b", base.name, "top.qcow2")
    context.run("qemu-img", "create", *words)
    path = context.directory / "top.qcow2"
    server = served(context, path, write=True)
    # No discard: over a base it may uncover what lies below.
    work = [command for command in WORK if not command.startswith("discard")]
    context.run("qemu-io", "-f", "raw", *_commands(*work), server.uri())
    context.run("qemu-io", "-f", "raw", *_commands(*work), golden.raw.path)
    expect_same_content(context, server, golden.raw.digest())
    server.stop()
    context.run("qemu-img", "check", "-f", "qcow2", path)
    expect(golden.raw.digest(), read_back(context, path, "qcow2"), "sha256 afterwards")
    expect(before, file_digest(base), "sha256 of the base")


@check("qcow2 --write", "killed", needs=NEEDS)
def killed(context: Context) -> None:
    """SIGKILL behind a flush: consistent, and everything flushed is there."""
    golden = Golden(context)
    path = golden.convert("qcow2", "disk.qcow2")
    server = served(context, path, write=True)
    context.run("qemu-io", "-f", "raw", *_commands(*WORK), server.uri())
    context.run("qemu-io", "-f", "raw", *_commands(*WORK), golden.raw.path)
    server.kill()
    finished = context.run("qemu-img", "check", "-f", "qcow2", path, code=None)
    # 3 is leaked clusters: lost space, not lost data.
    expect(True, finished.code in (0, 3), f"qemu-img check: {finished.describe()}")
    expect(golden.raw.digest(), read_back(context, path, "qcow2"), "sha256 afterwards")


@check("qcow2 --write", "locked", needs=(*NEEDS, "nbdcopy"), part=Part.FORMATS)
def locked(context: Context) -> None:
    """While a client has it open, QEMU does not write to the image; afterwards it may."""
    path = Golden(context).convert("qcow2", "disk.qcow2")
    server = served(context, path, write=True)
    write = ("qemu-io", "-f", "qcow2", "-c", "write 0 4k", path)
    # A client that stays: nbdcopy into a pipe nobody reads from.
    with subprocess.Popen(
        [find_program("nbdcopy"), server.uri(), "-"], stdout=subprocess.PIPE
    ) as client:
        assert client.stdout is not None
        client.stdout.read(1)
        finished = context.run(*write, code=None)
        client.kill()
    expect_in("lock", finished.stderr, "qemu-io's error")
    server.stop()
    context.run(*write)
