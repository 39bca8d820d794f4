"""Xen Orchestra's NBD client, @vates/nbd-client from npm, run by node as its backups run it.

It speaks the oldest dialect we serve: EXPORT_NAME, 124 zeroes, simple replies. The modules are
installed once, by ``npm ci`` from the committed lock file, below ``$XDG_CACHE_HOME/nbdsrv``.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from conformance import process
from conformance.certificates import Authority
from conformance.context import Context
from conformance.download import cached
from conformance.image import KIB, MIB, Image
from conformance.outcome import CheckFailedError
from conformance.process import PROJECT
from conformance.registry import check, expect
from conformance.server import Server, server_command, server_environment

NEEDS = ("node", "npm")

SOURCES = PROJECT / "conformance" / "xo"

NPM_TIMEOUT_S = 180.0


def _modules() -> Path:
    """The node_modules directory for the committed lock file, installed at first use."""

    def install(home: Path) -> None:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCES / name, home / name)
        words = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
        process.run(words, directory=home, timeout_s=NPM_TIMEOUT_S)

    lock = (SOURCES / "package-lock.json").read_bytes()
    return cached(f"xo-{hashlib.sha256(lock).hexdigest()[:16]}", install) / "node_modules"


def drive(
    context: Context, client: str, settings: dict[str, Any], block_size: int
) -> dict[str, Any]:
    modules = _modules()
    job = json.dumps({"client": client, "settings": settings, "blockSize": block_size})
    finished = context.run("node", SOURCES / "client.mjs", modules, job, timeout_s=60, code=None)
    if finished.code != 0:
        raise CheckFailedError(process.tail(finished.stderr, lines=8))
    # The client logs to stdout as well; our line is the last.
    result: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return result


def _settings(server: Server, name: str = "") -> dict[str, Any]:
    return {"address": server.host.strip("[]"), "port": server.port, "exportname": name}


def _expect_content(image: Image, result: dict[str, Any]) -> None:
    expect(image.size, result["size"], "size")
    expect(image.digest(), result["digest"], "sha256 of all blocks")


def _expect_map(image: Image, result: dict[str, Any]) -> None:
    found = [(e["offset"], e["length"], e["type"] == 0) for e in result["map"]]
    expect(image.extents(), found, "map")


@check("xen-orchestra", "NbdClient", needs=(*NEEDS, "nbdinfo"))
def single(context: Context) -> None:
    """64 KiB blocks over one connection; size and map."""
    image = context.image()
    server = context.serve(image, listen=("tcp",))
    result = drive(context, "single", _settings(server), 64 * KIB)
    _expect_content(image, result)
    _expect_map(image, result)


@check("xen-orchestra", "MultiNbdClient", needs=(*NEEDS, "nbdinfo"))
def multi(context: Context) -> None:
    """2 MiB blocks, as its backups read, over four connections; size and map."""
    image = context.image(size=64 * MIB)
    server = context.serve(image, listen=("tcp",))
    result = drive(context, "multi", _settings(server), 2 * MIB)
    _expect_content(image, result)
    _expect_map(image, result)


@check("xen-orchestra", "NbdDisk", needs=(*NEEDS, "nbdinfo"))
def disk(context: Context) -> None:
    """The wrapper its backup engine uses: only blocks that the map calls data are read."""
    image = context.image()
    server = context.serve(image, listen=("tcp",))
    result = drive(context, "disk", _settings(server), 2 * MIB)
    _expect_content(image, result)
    expect(4, result["blocks"], "blocks of 2 MiB with data: 0, 4, 5 and the last")


@check("xen-orchestra", "odd size", needs=(*NEEDS, "nbdinfo"))
def odd_size(context: Context) -> None:
    """The last, shorter block, down to its last byte."""
    image = context.image(size=16 * MIB + 64 * KIB + 333)
    server = context.serve(image, listen=("tcp",))
    _expect_content(image, drive(context, "single", _settings(server), 64 * KIB))


@check("xen-orchestra", "named export", needs=(*NEEDS, "nbdinfo"))
def named(context: Context) -> None:
    """An export by its name, with what a URI has to quote."""
    first, second = context.image("a"), context.image("b", 16 * MIB)
    server = context.serve(exports={"a": first, "vm/disk 2": second}, listen=("tcp",))
    result = drive(context, "single", _settings(server, "vm/disk 2"), 64 * KIB)
    _expect_content(second, result)
    _expect_map(second, result)


@check("xen-orchestra", "unknown export", needs=NEEDS)
def unknown(context: Context) -> None:
    """EXPORT_NAME has no error reply: the connection is closed, and the client says so."""
    server = context.serve(context.image(), listen=("tcp",))
    try:
        drive(context, "single", _settings(server, "no such export"), 64 * KIB)
    except CheckFailedError:
        return
    raise CheckFailedError("an export that does not exist was opened")


def _over_tls(context: Context, client: str, block_size: int) -> None:
    authority = Authority(context.directory / "pki")
    image = context.image()
    server = context.serve(image, listen=("tcp",), tls=authority.server())
    settings = {**_settings(server), "cert": authority.server_certificate.read_text()}
    _expect_content(image, drive(context, client, settings, block_size))


@check("xen-orchestra", "NbdClient TLS", needs=(*NEEDS, "openssl"))
def single_tls(context: Context) -> None:
    """STARTTLS, with the server's certificate given as XAPI hands it out."""
    _over_tls(context, "single", 64 * KIB)


@check("xen-orchestra", "MultiNbdClient TLS", needs=(*NEEDS, "openssl"))
def multi_tls(context: Context) -> None:
    """The same over four connections."""
    _over_tls(context, "multi", 2 * MIB)


@check("xen-orchestra", "NbdStdioClient", needs=NEEDS)
def stdio(context: Context) -> None:
    """Our server as its child, by stdin and stdout, which are not one socket but two."""
    image = context.image()
    command, *arguments = server_command(image.path, "--listen", "stdio")
    settings = {
        "command": command,
        "args": arguments,
        "env": {**os.environ, **server_environment()},
        "cwd": str(context.directory),
    }
    _expect_content(image, drive(context, "stdio", settings, 64 * KIB))
