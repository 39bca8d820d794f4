"""fio's nbd engine with --verify: random writes, read back and checked by CRC."""

import json

from conformance.context import Context
from conformance.image import MIB
from conformance.outcome import MissingPeerError
from conformance.process import find_program
from conformance.registry import check, expect


def _fio(context: Context, *options: str) -> dict[str, int]:
    """Run one job and return the bytes it moved, by direction."""
    find_program("fio")
    if "nbd" not in context.run("fio", "--enghelp").stdout.split():
        raise MissingPeerError("this fio was built without its nbd engine")
    image = context.image(size=32 * MIB, spans=())
    server = context.serve(image, write=True)
    words = (
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={server.uri()}",
        "--size=32m",
        "--randseed=7",
    )
    text = context.run("fio", *words, "--output-format=json", *options, timeout_s=120).stdout
    job = json.loads(text[text.index("{") :])["jobs"][0]
    expect(0, job["error"], "fio's error")
    # A verify that read nothing back would also end without an error.
    moved = {kind: int(job[kind]["io_bytes"]) for kind in ("read", "write", "trim")}
    expect((True, True), (moved["write"] > 0, moved["read"] > 0), "wrote and read back")
    return moved


@check("fio", "randrw 4k crc32c", needs=("fio",))
def random_small(context: Context) -> None:
    """4 KiB, 16 deep."""
    _fio(context, "--rw=randrw", "--bs=4k", "--iodepth=16", "--verify=crc32c")


@check("fio", "randrw mixed sizes", needs=("fio",))
def random_mixed(context: Context) -> None:
    """512 bytes to 256 KiB, unaligned to anything larger, 32 deep."""
    _fio(
        context,
        "--rw=randrw",
        "--bsrange=512-256k",
        "--iodepth=32",
        "--verify=crc32c",
        "--blockalign=512",
        "--serialize_overlap=1",
    )


@check("fio", "write 1m sha256", needs=("fio",))
def sequential(context: Context) -> None:
    """1 MiB in sequence with a flush every eight, 4 deep."""
    _fio(context, "--rw=write", "--bs=1m", "--iodepth=4", "--verify=sha256", "--fsync=8")


@check("fio", "trimwrite", needs=("fio",))
def trim_and_write(context: Context) -> None:
    """Trim, then write the same place, then verify; one at a time, for their order matters."""
    moved = _fio(context, "--rw=trimwrite", "--bs=64k", "--iodepth=1", "--verify=crc32c")
    expect(True, moved["trim"] > 0, "trimmed")
