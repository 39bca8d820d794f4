"""nbdinfo and nbddump of libnbd: what a client is told about an export, and its bytes in hex."""

import json
import re
from collections.abc import Mapping
from typing import Any

from conformance.context import Context
from conformance.image import KIB, MIB, Image, Span
from conformance.registry import check, expect
from conformance.server import Server

NEEDS = ("nbdinfo",)

TIB = 1 << 40


def _export(context: Context, server: Server, name: str = "") -> Mapping[str, Any]:
    report = json.loads(context.run("nbdinfo", "--json", server.uri(name)).stdout)
    expect("newstyle-fixed", report["protocol"], "protocol")
    expect(True, report["structured"], "structured replies")
    export: Mapping[str, Any] = report["exports"][0]
    return export


def _extents(context: Context, uri: str) -> list[tuple[int, int, bool]]:
    """The map as (offset, length, is data), merged: clients may be told it in pieces."""
    merged: list[tuple[int, int, bool]] = []
    for piece in json.loads(context.run("nbdinfo", "--map", "--json", uri).stdout):
        expect(True, piece["type"] in (0, 3), f"type {piece['type']} is data or hole,zero")
        is_data = piece["type"] == 0
        if merged and merged[-1][2] == is_data:
            offset, length, _ = merged.pop()
            merged.append((offset, length + piece["length"], is_data))
        else:
            merged.append((piece["offset"], piece["length"], is_data))
    return merged


@check("nbdinfo", "json read-only", needs=NEEDS)
def json_read_only(context: Context) -> None:
    """Size, flags, block sizes and contexts of a read-only export."""
    image = context.image()
    export = _export(context, context.serve(image))
    wanted = {
        "export-size": image.size,
        "is_read_only": True,
        "is_rotational": False,
        "can_df": True,
        "can_multi_conn": True,
        "can_trim": False,
        "can_zero": False,
        "can_fast_zero": False,
    }
    expect(wanted, {key: export.get(key) for key in wanted}, "export")
    expect(True, "base:allocation" in export["contexts"], "base:allocation is offered")


@check("nbdinfo", "json writable", needs=NEEDS)
def json_writable(context: Context) -> None:
    """A writable export offers every write command."""
    image = context.image()
    export = _export(context, context.serve(image, write=True))
    wanted = {
        "export-size": image.size,
        "is_read_only": False,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
    }
    expect(wanted, {key: export.get(key) for key in wanted}, "export")


@check("nbdinfo", "block sizes", needs=NEEDS)
def block_sizes(context: Context) -> None:
    """Byte-granular minimum, a preferred power of two, and a payload of at least 1 MiB."""
    export = _export(context, context.serve(context.image()))
    minimum, preferred, maximum = (
        export[f"block_size_{kind}"] for kind in ("minimum", "preferred", "maximum")
    )
    expect(1, minimum, "minimum block size of a raw file")
    expect((True, True), (preferred >= 512, preferred & (preferred - 1) == 0), "preferred size")
    expect((True, True), (maximum >= MIB, maximum % preferred == 0), "maximum payload")


@check("nbdinfo", "content sniffing", needs=NEEDS)
def content(context: Context) -> None:
    """The first bytes reach libmagic as they are."""
    image = context.image()
    with image.path.open("r+b") as file:
        file.seek(510)
        file.write(b"\x55\xaa")
    export = _export(context, context.serve(image))
    expect(True, "boot sector" in export["content"], f"boot sector in {export['content']!r}")


@check("nbdinfo", "list", needs=NEEDS)
def list_exports(context: Context) -> None:
    """NBD_OPT_LIST names every export; each can then be asked about."""
    images = {"first": context.image("a"), "söcond disk": context.image("b", 16 * MIB)}
    server = context.serve(exports=images)
    report = json.loads(context.run("nbdinfo", "--list", "--json", server.uri()).stdout)
    found = {export["export-name"]: export["export-size"] for export in report["exports"]}
    expect({name: image.size for name, image in images.items()}, found, "exports")


@check("nbdinfo", "default export", needs=NEEDS)
def default_export(context: Context) -> None:
    """A single source is the export "" and the URI printed at start opens it."""
    image = context.image()
    server = context.serve(image)
    for uri in (server.uri(), server.printed[0]):
        size = context.run("nbdinfo", "--size", uri).stdout
        expect(image.size, int(size), f"size by {uri}")


@check("nbdinfo", "unknown export", needs=NEEDS)
def unknown_export(context: Context) -> None:
    """A name that is not served is refused, not served as something else."""
    server = context.serve(context.image())
    finished = context.run("nbdinfo", server.uri("no such export"), code=None)
    expect(1, finished.code, "exit code for an unknown export")


@check("nbdinfo", "map", needs=NEEDS)
def map_sparse(context: Context) -> None:
    """The map is the image's holes and data, byte for byte."""
    image = context.image()
    server = context.serve(image)
    expect(image.extents(), _extents(context, server.uri()), "map")


@check("nbdinfo", "map totals", needs=NEEDS)
def map_totals(context: Context) -> None:
    """Totals by type add up to the size."""
    image = context.image()
    server = context.serve(image)
    text = context.run("nbdinfo", "--map", "--totals", server.uri()).stdout
    totals = {line.split()[2]: int(line.split()[0]) for line in text.splitlines()}
    data = sum(length for _, length, is_data in image.extents() if is_data)
    expect({"0": data, "3": image.size - data}, totals, "totals")


@check("nbdinfo", "can and is", needs=NEEDS)
def can_and_is(context: Context) -> None:
    """The yes-or-no questions, by exit code 0 or 2."""
    image = context.image()
    read_only, writable = context.serve(image), context.serve(image, write=True)
    questions = {
        ("--is", "read-only"): (0, 2),
        ("--is", "rotational"): (2, 2),
        ("--can", "connect"): (0, 0),
        ("--can", "structured-reply"): (0, 0),
        ("--can", "df"): (0, 0),
        ("--can", "multi-conn"): (0, 0),
        ("--can", "write"): (2, 0),
        ("--can", "trim"): (2, 0),
        ("--can", "zero"): (2, 0),
        ("--can", "fua"): (None, 0),
        ("--can", "flush"): (None, 0),
    }
    for question, codes in questions.items():
        for server, code in zip((read_only, writable), codes, strict=True):
            finished = context.run("nbdinfo", *question, server.uri(), code=None)
            if code is not None and finished.code != code:
                expect(code, finished.code, f"exit code of {' '.join(question)}")


@check("nbdinfo", "odd size", needs=NEEDS)
def odd_size(context: Context) -> None:
    """A size that is no multiple of 512 is given and mapped to the last byte."""
    image = context.image(size=16 * MIB + 64 * KIB + 333)
    server = context.serve(image)
    expect(image.size, _export(context, server)["export-size"], "size")
    expect(image.extents(), _extents(context, server.uri()), "map")


@check("nbdinfo", "empty disk", needs=NEEDS)
def empty_disk(context: Context) -> None:
    """A file of zero bytes is an export of zero bytes."""
    image = context.image(size=0, spans=())
    server = context.serve(image)
    expect("0", context.run("nbdinfo", "--size", server.uri()).stdout.strip(), "size")


@check("nbdinfo", "4 TiB disk", needs=NEEDS)
def four_tebibytes(context: Context) -> None:
    """Nothing ends at 2 or 4 GiB or at 2 TiB: size and map of a huge sparse file."""
    spans = (Span(0, MIB), Span(3 * TIB, MIB), Span(4 * TIB - MIB, MIB))
    image = context.image(size=4 * TIB, spans=spans)
    server = context.serve(image)
    expect(image.size, _export(context, server)["export-size"], "size")
    expect(image.extents(), _extents(context, server.uri()), "map")


@check("nbddump", "hex of an odd disk", needs=("nbddump",))
def hex_dump(context: Context) -> None:
    """The dump, read back, is the image."""
    image = context.image(size=256 * KIB + 77, spans=(Span(0, 64 * KIB), Span(256 * KIB, 77)))
    server = context.serve(image)
    text = context.run("nbddump", server.uri()).stdout
    expect(_undump(text, image), image.read(), "content")


def _undump(text: str, image: Image) -> bytes:
    """Bytes of a dump; a line ``*`` stands for repetitions of the line before it."""
    result, row = bytearray(), b""
    for line in text.splitlines():
        match = re.match(r"([0-9a-f]{10}): ([0-9a-f ]*)", line)
        if match is None:
            continue
        offset = int(match[1], 16)
        result += row * ((offset - len(result)) // 16)
        row = bytes.fromhex(match[2])
        result += row
    return bytes(result + row * ((image.size - len(result)) // 16))
