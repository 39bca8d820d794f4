"""nbdcopy of libnbd: whole disks both ways, over one connection and over four."""

from pathlib import Path

from conformance.context import Context
from conformance.image import KIB, MIB, Image, file_digest
from conformance.outcome import CheckFailedError
from conformance.registry import check, expect, expect_in

NEEDS = ("nbdcopy",)

SIZE = 64 * MIB

FOUR = ("--connections=4", "--threads=4")
"""nbdcopy never uses more connections than threads, of which it takes one per core."""

SLACK = MIB
"""Bytes a file system may spend on its own bookkeeping of a sparse file."""


def _download(context: Context, *options: str, size: int = SIZE) -> None:
    image = context.image(size=size)
    server = context.serve(image)
    copy = context.directory / "copy"
    context.run("nbdcopy", *options, server.uri(), copy)
    expect(image.digest(), file_digest(copy), "sha256 of the download")
    _expect_sparse(copy, image)


def _upload(context: Context, *options: str, size: int = SIZE) -> None:
    image = context.image(size=size)
    target = context.image("target", size, spans=())
    _fill(target)
    server = context.serve(target, write=True)
    context.run("nbdcopy", "--flush", *options, image.path, server.uri())
    expect(image.digest(), target.digest(), "sha256 of the upload")
    _expect_sparse(target.path, image)


def _fill(target: Image) -> None:
    """Old content everywhere: what is not overwritten or punched out shows."""
    with target.path.open("r+b") as file:
        for _ in range(0, target.size, MIB):
            file.write(b"\xa5" * min(MIB, target.size - file.tell()))


def _expect_sparse(copy: Path, image: Image) -> None:
    allocated = copy.stat().st_blocks * 512
    data = sum(length for _, length, is_data in image.extents() if is_data)
    if allocated > data + SLACK:
        raise CheckFailedError(f"the copy occupies {allocated} bytes for {data} bytes of data")


@check("nbdcopy", "download", needs=NEEDS)
def download_one(context: Context) -> None:
    """One connection; content equal, holes kept."""
    _download(context, "--connections=1")


@check("nbdcopy", "download x4", needs=NEEDS)
def download_four(context: Context) -> None:
    """Four connections; content equal, holes kept."""
    _download(context, *FOUR)


@check("nbdcopy", "download x4 is x4", needs=NEEDS)
def four_connections(context: Context) -> None:
    """CAN_MULTI_CONN makes nbdcopy really open the four connections."""
    server = context.serve(context.image())
    text = context.run("nbdcopy", "-v", *FOUR, server.uri(), "null:").stderr
    expect_in("src3", text, "verbose output: the fourth handle")


@check("nbdcopy", "download no extents", needs=NEEDS)
def download_without_extents(context: Context) -> None:
    """Every byte is read, holes as well: 2 MiB requests, 32 deep."""
    _download(context, "--no-extents", "--request-size=2097152", "--requests=32")


@check("nbdcopy", "download odd size", needs=NEEDS)
def download_odd(context: Context) -> None:
    """The last bytes of a size that is no multiple of 512."""
    _download(context, size=16 * MIB + 64 * KIB + 333)


@check("nbdcopy", "upload", needs=NEEDS)
def upload_one(context: Context) -> None:
    """One connection over old content; content equal, holes punched."""
    _upload(context, "--connections=1")


@check("nbdcopy", "upload x4", needs=NEEDS)
def upload_four(context: Context) -> None:
    """Four connections over old content; content equal, holes punched."""
    _upload(context, *FOUR)


@check("nbdcopy", "upload allocated", needs=NEEDS)
def upload_allocated(context: Context) -> None:
    """--allocated asks for zeroes that stay allocated (NO_HOLE)."""
    image = context.image()
    target = context.image("target", spans=())
    server = context.serve(target, write=True)
    context.run("nbdcopy", "--flush", "--allocated", image.path, server.uri())
    expect(image.digest(), target.digest(), "sha256 of the upload")
    if target.allocated() < target.size:
        raise CheckFailedError(f"only {target.allocated()} of {target.size} bytes are allocated")


@check("nbdcopy", "upload odd size", needs=NEEDS)
def upload_odd(context: Context) -> None:
    """The last bytes of a size that is no multiple of 512."""
    _upload(context, size=16 * MIB + 64 * KIB + 333)


@check("nbdcopy", "server to server", needs=NEEDS)
def server_to_server(context: Context) -> None:
    """From one of our servers to another, four connections each."""
    image = context.image(size=SIZE)
    target = context.image("target", SIZE, spans=())
    source, sink = context.serve(image), context.serve(target, write=True)
    context.run("nbdcopy", "--flush", *FOUR, source.uri(), sink.uri())
    expect(image.digest(), target.digest(), "sha256 of the copy")


@check("nbdcopy", "upload refused", needs=NEEDS)
def upload_refused(context: Context) -> None:
    """A read-only export takes nothing, and keeps its content."""
    target = context.image("target")
    _fill(target)
    before = target.digest()
    server = context.serve(target)
    source = context.image()
    finished = context.run("nbdcopy", source.path, server.uri(), code=None)
    expect(1, finished.code, "exit code of an upload to a read-only export")
    expect(before, target.digest(), "sha256 of the read-only image")
