"""``nbdsrv copy`` and ``compare``: every target, judged by qemu-img; NBD on both sides; pipes.

::

    image or NBD ── nbdsrv copy ──> image, pipe or NBD ── qemu-img check, compare ──> the same
"""

import json
import subprocess
from pathlib import Path

from conformance.context import Context
from conformance.golden import Golden, nbdsrv, read_back, served
from conformance.image import MIB, Span, file_digest
from conformance.outcome import CheckFailedError
from conformance.process import find_program
from conformance.registry import Part, check, expect, expect_in
from conformance.server import server_command, server_environment

NEEDS = ("qemu-img",)

TARGETS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "raw": ("copy.img", "raw", ()),
    "qcow2": ("copy.qcow2", "qcow2", ()),
    "qcow2 zlib": ("copy.qcow2", "qcow2", ("--compress", "zlib")),
    "qcow2 zstd": ("copy.qcow2", "qcow2", ("--compress", "zstd")),
    "vhd": ("copy.vhd", "vpc", ()),
    "vmdk": ("copy.vmdk", "vmdk", ()),
}
"""Feature to target, qemu's name of its format, options of ours."""

CHECKED = {"qcow2", "vmdk"}
"""Formats ``qemu-img check`` knows."""

SLACK = MIB


def _judge(context: Context, golden: Golden, target: Path, qemu: str) -> None:
    if qemu in CHECKED:
        context.run("qemu-img", "check", "-f", qemu, target)
    words = ("-f", "raw", "-F", qemu, golden.raw.path, target)
    expect_in("identical", context.run("qemu-img", "compare", *words).stdout, "compare")


def _register() -> None:
    for feature, (name, qemu, options) in TARGETS.items():

        def run(
            context: Context, name: str = name, qemu: str = qemu, options: tuple[str, ...] = options
        ) -> None:
            golden = Golden(context)
            nbdsrv(context, "copy", "--quiet", *options, golden.raw.path, name)
            _judge(context, golden, context.directory / name, qemu)

        part = Part.QUICK if feature in {"qcow2 zstd", "vhd", "vmdk"} else Part.FORMATS
        check("copy", f"to {feature}", needs=NEEDS, part=part)(run)

    for feature in ("vhd", "vmdk", "raw", "qcow2"):
        _, qemu, _ = TARGETS[feature]

        def pipe(context: Context, feature: str = feature, qemu: str = qemu) -> None:
            golden = Golden(context)
            target = context.directory / f"piped.{feature}"
            _piped(context, golden.raw.path, f"{feature}:-", target)
            _judge(context, golden, target, qemu)

        check("copy", f"{feature} to a pipe", needs=NEEDS, part=Part.FORMATS)(pipe)


def _piped(context: Context, source: Path, target: str, file: Path) -> None:
    """Through ``cat``: a pipe, not a file somebody could seek in."""
    command = [server_command()[0], "-m", "nbdsrv", "copy", "--quiet", str(source), target]
    script = f'"$@" | {find_program("cat")} > "$0"'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script, str(file), *command],
        cwd=context.directory,
        capture_output=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin", **server_environment()},
    )
    expect(0, done.returncode, f"exit code of a copy to a pipe: {done.stderr.decode()[-300:]}")


_register()


@check("copy", "size is kept by vhd", needs=NEEDS, part=Part.FORMATS)
def vhd_size(context: Context) -> None:
    """qemu-img opens our VHD without options at its exact size, not a geometry's."""
    golden = Golden(context)
    nbdsrv(context, "copy", "--quiet", golden.raw.path, "copy.vhd")
    text = context.run("qemu-img", "info", "--output=json", "copy.vhd").stdout
    expect(golden.raw.size, json.loads(text)["virtual-size"], "virtual size")


SOURCES = {
    "vmdk stream": ("vmdk", "subformat=streamOptimized", ()),
    "qcow2 zstd": ("qcow2", "compression_type=zstd", ("-c",)),
    "vhdx": ("vhdx", "", ()),
    "vhd": ("vpc", "force_size=on", ()),
}


def _register_sources() -> None:
    for feature, (qemu, options, flags) in SOURCES.items():

        def run(
            context: Context,
            qemu: str = qemu,
            options: str = options,
            flags: tuple[str, ...] = flags,
        ) -> None:
            source = Golden(context).convert(qemu, "source.image", options, *flags)
            nbdsrv(context, "copy", "--quiet", source, "copy.img")
            copy = context.directory / "copy.img"
            expect(read_back(context, source, qemu), file_digest(copy), "sha256 of the copy")
            if copy.stat().st_blocks * 512 > 5 * MIB + SLACK:
                raise CheckFailedError(f"the copy occupies {copy.stat().st_blocks * 512} bytes")

        check("copy", f"from {feature}", needs=NEEDS, part=Part.FORMATS)(run)


_register_sources()


@check("copy", "a chain into one", needs=(*NEEDS, "qemu-io"), part=Part.FORMATS)
def chain(context: Context) -> None:
    """The chain's content in one compressed image."""
    golden = Golden(context)
    golden.convert("qcow2", "base.qcow2")
    words = ("-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "top.qcow2")
    context.run("qemu-img", "create", *words)
    context.run("qemu-io", "-f", "qcow2", "-c", "write -z 0 512k", "top.qcow2")
    nbdsrv(context, "copy", "--quiet", "--compress", "zstd", "top.qcow2", "flat.qcow2")
    context.run("qemu-img", "check", "flat.qcow2")
    context.run("qemu-img", "compare", "top.qcow2", "flat.qcow2")


@check("copy", "with a backing file", needs=(*NEEDS, "qemu-io"))
def thin(context: Context) -> None:
    """Only what differs is stored, and the chain reads as the source."""
    golden = Golden(context)
    base = golden.convert("qcow2", "base.qcow2")
    with golden.raw.path.open("r+b") as file:
        file.seek(MIB // 2)
        file.write(b"changed" * 1000)
        file.seek(12 * MIB)
        file.write(bytes(128 << 10))
    backing = ("--backing", base.name)
    nbdsrv(context, "copy", "--quiet", *backing, golden.raw.path, "thin.qcow2")
    _judge(context, golden, context.directory / "thin.qcow2", "qcow2")
    size = (context.directory / "thin.qcow2").stat().st_blocks * 512
    if size > SLACK:
        raise CheckFailedError(f"{size} bytes for one changed block")


@check("copy", "qemu-nbd to qemu-nbd", needs=(*NEEDS, "qemu-nbd"), part=Part.FORMATS)
def nbd_both(context: Context) -> None:
    """From one foreign server into another, over old content: zeroes overwrite it."""
    golden = Golden(context)
    target = context.image("target", golden.raw.size, spans=(Span(0, golden.raw.size),))
    source = _qemu_nbd(context, golden.raw.path, "-r")
    sink = _qemu_nbd(context, target.path)
    nbdsrv(context, "copy", "--quiet", source, sink)
    expect(golden.digest, target.digest(), "sha256 of the target")


def _qemu_nbd(context: Context, path: Path, *options: str) -> str:
    """A qemu-nbd for one check; its URI."""
    socket = context.directory / f"{path.name}.sock"
    common = ("-f", "raw", "-t", "-e", "8", "-k", str(socket), "--fork")
    pid = context.directory / f"{path.name}.pid"
    context.run("qemu-nbd", *common, "--pid-file", str(pid), *options, path)
    context.at_end(context.run, "kill", pid.read_text().strip())
    return f"nbd+unix:///?socket={socket}"


@check("copy", "into our own server", needs=NEEDS)
def nbd_ours(context: Context) -> None:
    """Over old content; then compare through NBD says the same."""
    golden = Golden(context)
    target = context.image("target", golden.raw.size, spans=(Span(0, golden.raw.size),))
    server = served(context, target.path, write=True)
    nbdsrv(context, "copy", "--quiet", golden.raw.path, server.uri())
    expect(golden.digest, target.digest(), "sha256 of the target")
    nbdsrv(context, "compare", golden.raw.path, server.uri())


@check("compare", "as qemu-img", needs=NEEDS)
def compare(context: Context) -> None:
    """Equal over formats is 0; one changed byte is 3, and its offset is printed."""
    golden = Golden(context)
    other = golden.convert("vhdx", "other.vhdx")
    nbdsrv(context, "compare", golden.raw.path, other)
    where = 12 * MIB + 12_345
    with golden.raw.path.open("r+b") as file:
        file.seek(where)
        byte = file.read(1)
        file.seek(where)
        file.write(bytes([byte[0] ^ 1]))
    finished = nbdsrv(context, "compare", golden.raw.path, other, code=3)
    expect_in(str(where), finished.stdout + finished.stderr, "the first difference")
    context.run("qemu-img", "compare", "-f", "raw", "-F", "vhdx", golden.raw.path, other, code=1)


@check("copy", "refusals", needs=NEEDS)
def refusals(context: Context) -> None:
    """What exists is not replaced without --force; a broken source leaves no target."""
    golden = Golden(context)
    (context.directory / "there.img").write_bytes(b"precious")
    nbdsrv(context, "copy", "--quiet", golden.raw.path, "there.img", code=1)
    expect(b"precious", (context.directory / "there.img").read_bytes(), "the file that was there")
    broken = golden.convert("qcow2", "broken.qcow2", "", "-c")
    with broken.open("r+b") as file:
        file.truncate(broken.stat().st_size // 2)
    nbdsrv(context, "copy", "--quiet", broken, "never.img", code=1)
    left = [path.name for path in context.directory.iterdir() if "never" in path.name]
    expect([], left, "files a failed copy leaves")
