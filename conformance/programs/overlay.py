"""``serve --overlay`` with other people's clients: written, killed, restarted, committed.

::

    base, read-only ── nbdsrv serve --overlay ── qemu-io, libnbd, fio, nbdcopy
         │                       │
    as before, by SHA-256     overlay commit ──> restore point ── qemu-img compare ── the same
"""

import json
from pathlib import Path

from conformance.context import Context
from conformance.golden import Golden, expect_same_content, nbdsrv
from conformance.image import MIB, Image, file_digest
from conformance.programs.nbdsh import libnbd_python
from conformance.registry import check, expect, expect_in
from conformance.server import Server

NEEDS = ("qemu-img", "qemu-io", "nbdcopy")

WORK = (
    *("write -P 1 100k 300k", "write -P 2 9M 2M", "write -z 1M 64k", "write -z -u 4M 1M"),
    *(
        "discard 12M 512k",
        "write -P 7 12M 4k",
        "write -P 5 20M 512",
        "write -P 6 777 3000",
        "flush",
    ),
)


def _commands(*commands: str) -> list[str]:
    return [word for command in commands for word in ("-c", command)]


def _served(context: Context, source: str) -> Server:
    variables = {"NBDSRV_OVERLAY": str(context.directory / "ov")}
    return context.serve(source=source, environment=variables)


def _qemu_io(context: Context, target: str | Path, *commands: str) -> None:
    context.run("qemu-io", "-f", "raw", *_commands(*commands), target)


@check("overlay", "over a raw image", needs=NEEDS)
def over_raw(context: Context) -> None:
    """What QEMU writes is there, also after a restart; the base is as it was."""
    golden = Golden(context)
    twin = _copy(context, golden.raw.path)
    server = _served(context, str(golden.raw.path))
    _qemu_io(context, server.uri(), *WORK)
    _qemu_io(context, twin.path, *WORK)
    expect_same_content(context, server, twin.digest())
    server.stop()
    server = _served(context, str(golden.raw.path))
    expect_same_content(context, server, twin.digest())
    server.stop()
    expect(golden.digest, file_digest(golden.raw.path), "sha256 of the base")


@check("overlay", "over a compressed qcow2", needs=NEEDS)
def over_qcow2(context: Context) -> None:
    """A base whose blocks are decoded, read in part around what is written."""
    golden = Golden(context)
    base = golden.convert("qcow2", "base.qcow2", "", "-c")
    before = file_digest(base)
    server = _served(context, str(base))
    _qemu_io(context, server.uri(), *WORK)
    _qemu_io(context, golden.raw.path, *WORK)
    context.run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri(), golden.raw.path)
    server.stop()
    expect(before, file_digest(base), "sha256 of the base")


@check("overlay", "killed", needs=NEEDS)
def killed(context: Context) -> None:
    """SIGKILL behind a flush: everything flushed is there."""
    golden = Golden(context)
    twin = _copy(context, golden.raw.path)
    server = _served(context, str(golden.raw.path))
    _qemu_io(context, server.uri(), *WORK)
    _qemu_io(context, twin.path, *WORK)
    server.kill()
    server = _served(context, str(golden.raw.path))
    expect_same_content(context, server, twin.digest())
    server.stop()


@check("overlay", "what has changed", needs=("nbdinfo", *NEEDS))
def changed(context: Context) -> None:
    """nbdinfo reads the dirty bitmap: blocks of 4 KiB, zeroes included."""
    golden = Golden(context)
    server = _served(context, str(golden.raw.path))
    _qemu_io(context, server.uri(), "write 1M 6k", "discard 12M 64k", "flush")
    words = ("--map=qemu:dirty-bitmap:overlay", "--json", server.uri())
    rows = json.loads(context.run("nbdinfo", *words).stdout)
    dirty = [(row["offset"], row["length"]) for row in rows if row["type"]]
    expect([(MIB, 8192), (12 * MIB, 65536)], dirty, "dirty ranges")
    server.stop()


@check("overlay", "fio --verify", needs=("fio",))
def verified(context: Context) -> None:
    """Random writes of mixed sizes over a base, read back by CRC; flushes in between."""
    golden = Golden(context)
    server = _served(context, str(golden.raw.path))
    words = (
        *("--name=verify", "--ioengine=nbd", f"--uri={server.uri()}", "--size=20m"),
        *("--randseed=7", "--rw=randrw", "--bsrange=512-128k", "--iodepth=32", "--fsync=16"),
        *("--verify=crc32c", "--blockalign=512", "--serialize_overlap=1", "--output-format=json"),
    )
    text = context.run("fio", *words, timeout_s=120).stdout
    job = json.loads(text[text.index("{") :])["jobs"][0]
    expect(0, job["error"], "fio's error")
    expect(True, job["write"]["io_bytes"] > 0 and job["read"]["io_bytes"] > 0, "moved anything")
    server.stop()
    expect(golden.digest, file_digest(golden.raw.path), "sha256 of the base")


@check("overlay", "several connections", needs=NEEDS)
def several_connections(context: Context) -> None:
    """libnbd: FLUSH on one connection makes durable what another wrote; a kill proves it."""
    golden = Golden(context)
    server = _served(context, str(golden.raw.path))
    script = (
        "import nbd\n"
        "a=nbd.NBD(); b=nbd.NBD()\n"
        f"a.connect_uri({server.uri()!r}); b.connect_uri({server.uri()!r})\n"
        "assert a.can_multi_conn() and a.can_fua() and a.can_fast_zero()\n"
        "for n in range(300):\n"
        "    (a, b)[n % 2].pwrite(bytes([n % 255 + 1]) * 4096, n * 8192 + n % 3 * 100)\n"
        "b.flush()\n"
        "a.pwrite(b'F' * 512, 15 << 20, nbd.CMD_FLAG_FUA)\n"
    )
    context.run(libnbd_python(context), "-c", script)
    server.kill()
    with golden.raw.path.open("rb") as file:
        expected = bytearray(file.read())
    for n in range(300):
        at = n * 8192 + n % 3 * 100
        expected[at : at + 4096] = bytes([n % 255 + 1]) * 4096
    expected[15 << 20 : (15 << 20) + 512] = b"F" * 512
    twin = context.directory / "twin"
    twin.write_bytes(expected)
    server = _served(context, str(golden.raw.path))
    expect_same_content(context, server, file_digest(twin))
    server.stop()


@check("overlay", "commit", needs=NEEDS)
def committed(context: Context) -> None:
    """A point over the served one, made while a client is attached; only what changed is read."""
    golden = Golden(context)
    twin = _copy(context, golden.raw.path)
    repository = f"repo:{context.directory}/repo"
    nbdsrv(context, "init", repository, "--quiet")
    words = (golden.raw.path, "--to", repository, "--group", "vm1", "--quiet")
    nbdsrv(context, "backup", *words)
    before = _digests(context.directory / "repo")
    server = _served(context, repository)
    _qemu_io(context, server.uri("vm1/golden@latest"), *WORK)
    _qemu_io(context, twin.path, *WORK)
    overlay = "ov/vm1/golden@latest"
    text = nbdsrv(context, "overlay", "commit", overlay, "--to", repository, "--json").stdout
    (row,) = json.loads(text)
    expect("incremental", row["mode"], "mode")
    expect(True, row["read_bytes"] < 8 * MIB, f"{row['read_bytes']} bytes read")
    nbdsrv(context, "compare", f"{repository}#vm1/golden@{row['point']}", twin.path)
    point = server.uri(f"vm1/golden@{row['point']}")
    context.run("qemu-img", "compare", "-f", "raw", "-F", "raw", point, twin.path)
    server.stop()
    after = _digests(context.directory / "repo")
    expect(before, {name: after.get(name) for name in before}, "what was in the repository")


@check("overlay", "not the same base", needs=("qemu-io",))
def another_base(context: Context) -> None:
    """A base that was written to is refused in one line, and never served."""
    golden = Golden(context)
    server = _served(context, str(golden.raw.path))
    _qemu_io(context, server.uri(), "write 0 4k", "flush")
    server.stop()
    _qemu_io(context, golden.raw.path, "write -P 9 8M 4k")
    words = ("serve", golden.raw.path, "--overlay", "ov", "--listen", "unix:refused")
    finished = nbdsrv(context, *words, code=1)
    expect(1, len(finished.stderr.splitlines()), f"lines of {finished.stderr!r}")
    expect_in("has been written to since", finished.stderr, "the error")


def _copy(context: Context, path: Path) -> Image:
    twin = context.directory / "twin.img"
    twin.write_bytes(path.read_bytes())
    return Image(twin, path.stat().st_size, ())


def _digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): file_digest(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "leases" not in path.parts
    }
