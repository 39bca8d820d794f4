"""The descriptor: the text that says what a VMDK is made of.

::

    # Disk DescriptorFile
    version=1                                 keys
    CID=fffffffe                              changes with the content
    parentCID=ffffffff                        the parent's CID when it was snapshotted; none
    createType="twoGbMaxExtentSparse"
    parentFileNameHint="base.vmdk"
    RW 4192256 SPARSE "disk-s001.vmdk"        extents: access, sectors, type, file,
    RW 2097152 FLAT "disk-f002.vmdk" 0        and for flat ones the first sector in it
    RW 63 ZERO
    ddb.adapterType = "lsilogic"              the disk data base

It is a file of its own, or lies within a sparse extent, padded with NULs. Lines end in LF or CR LF;
keys are the same in capitals and small letters; text is in the charset that ``encoding`` names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.vmdk.structs import NO_PARENT

__all__ = ["MAX_DESCRIPTOR", "Descriptor", "ExtentLine", "parse", "read_descriptor", "render"]

MAX_DESCRIPTOR = 1 << 20
"""Bytes. VMware reserves 10 KiB; a line for each of MAX_EXTENTS takes some 200 KiB."""
MAX_EXTENTS = 4096
"""Files a disk may be split into: 8 TiB in pieces of 2 GiB. Each costs a descriptor when open."""
MAX_SECTORS = 1 << 54
"""Of an extent or a disk: sizes in bytes stay below 2**63."""

_EXTENT = re.compile(
    r"""(?P<access>RW|RDONLY|NOACCESS) \s+ (?P<sectors>[0-9]{1,19}) \s+ (?P<kind>[A-Z]+)
        (?: \s+ "(?P<name>[^"]+)" (?: \s+ (?P<first>[0-9]{1,19}) )? (?: \s .*)? )?""",
    re.VERBOSE | re.ASCII,
)
_LOOKS_LIKE_EXTENT = re.compile(r"(RW|RDONLY|NOACCESS)\s", re.ASCII | re.IGNORECASE)
_KEY = re.compile(r"""([\w.:-]+) \s* = \s* (?: "([^"]*)" | ([^"]*) )""", re.VERBOSE)
_HEX = re.compile(r"[0-9a-f]{1,8}", re.IGNORECASE | re.ASCII)

_CHARSETS = {
    "utf-8": "utf-8",
    "windows-1250": "cp1250",
    "windows-1251": "cp1251",
    "windows-1252": "cp1252",
    "windows-932": "cp932",
    "windows-936": "gbk",
    "windows-949": "cp949",
    "windows-950": "cp950",
    "gbk": "gbk",
    "gb18030": "gb18030",
    "big5": "big5",
    "shift-jis": "shift_jis",
    "euc-jp": "euc_jp",
    "euc-kr": "euc_kr",
    "iso-8859-1": "latin-1",
    "iso-8859-15": "iso8859-15",
    "us-ascii": "ascii",
}
"""What ``encoding`` may say, to Python's name for it."""
_ENCODING = re.compile(rb'^[ \t]*encoding[ \t]*=[ \t]*"?([A-Za-z0-9_-]{1,40})"?', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ExtentLine:
    """One piece of the disk.

    Attributes:
        access: RW, RDONLY or NOACCESS.
        sectors: of the disk.
        kind: FLAT, SPARSE, ZERO, VMFS, VMFSSPARSE, SESPARSE, or something we do not serve.
        name: of its file, "" where there is none.
        first: sector of the file where a flat one begins.
    """

    sectors: int
    kind: str
    name: str = ""
    first: int = 0
    access: str = "RW"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a descriptor says.

    Attributes:
        create_type: monolithicSparse, streamOptimized, vmfs ...
        content_id: changes whenever the content does.
        parent_content_id: NO_PARENT where there is none.
        parent_name: where the parent lay, "" where there is none.
        database: ``ddb.`` keys without that prefix, in small letters.
    """

    create_type: str
    extents: tuple[ExtentLine, ...]
    content_id: int = NO_PARENT - 1
    parent_content_id: int = NO_PARENT
    parent_name: str = ""
    version: str = "1"
    database: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_parent(self) -> bool:
        """Is it a snapshot of another disk?"""
        return self.parent_content_id != NO_PARENT


def read_descriptor(file: ImageFile, position: int, length: int) -> Descriptor:
    """Read and parse; blocking.

    Raises:
        CorruptImage: it is none, too long, or contradicts itself.
    """
    if length > MAX_DESCRIPTOR:
        raise file.corrupt(position, f"a descriptor of {length} bytes")
    return parse(file, position, file.read(position, length, "descriptor"))


def parse(file: ImageFile, position: int, data: bytes) -> Descriptor:
    """The descriptor in ``data``, which lies at ``position`` of ``file``.

    Raises:
        CorruptImage: see ``read_descriptor``.
    """
    keys: dict[str, str] = {}
    database: dict[str, str] = {}
    extents: list[ExtentLine] = []
    for number, raw_line in enumerate(_text(file, position, data).split("\n"), 1):
        line = raw_line.strip()
        where = f"line {number} of its descriptor"
        if not line or line.startswith("#"):
            continue
        if _LOOKS_LIKE_EXTENT.match(line):
            extents.append(_extent(file, position, line, where))
            if len(extents) > MAX_EXTENTS:
                raise file.corrupt(position, f"more than {MAX_EXTENTS} extents")
        elif match := _KEY.fullmatch(line):
            key, value = match[1].lower(), match[2] or match[3] or ""
            if key.startswith("ddb."):
                database[key.removeprefix("ddb.")] = value
            elif keys.setdefault(key, value) != value:
                raise file.corrupt(position, f"{where} says {key} a second time")
        else:
            raise file.corrupt(position, f"{where} makes no sense: {line[:60]!r}")
    return _descriptor(file, position, keys, database, extents)


def _descriptor(
    file: ImageFile,
    position: int,
    keys: Mapping[str, str],
    database: Mapping[str, str],
    extents: list[ExtentLine],
) -> Descriptor:
    if not keys.get("createtype"):
        raise file.corrupt(position, "its descriptor has no createType")
    if sum(extent.sectors for extent in extents) >= MAX_SECTORS:
        raise file.corrupt(position, "the extents make a disk of more than 2**63 bytes")
    ids = {}
    for key, default in (("cid", NO_PARENT - 1), ("parentcid", NO_PARENT)):
        text = keys.get(key, f"{default:08x}")
        if not _HEX.fullmatch(text):
            raise file.corrupt(position, f"its descriptor's {key} is {text[:40]!r}")
        ids[key] = int(text, 16)
    return Descriptor(
        create_type=keys["createtype"],
        extents=tuple(extents),
        content_id=ids["cid"],
        parent_content_id=ids["parentcid"],
        parent_name=keys.get("parentfilenamehint", ""),
        version=keys.get("version", ""),
        database=database,
    )


def _extent(file: ImageFile, position: int, line: str, where: str) -> ExtentLine:
    match = _EXTENT.fullmatch(line)
    if match is None:
        raise file.corrupt(position, f"{where} is no extent: {line[:60]!r}")
    sectors, first = int(match["sectors"]), int(match["first"] or 0)
    if not 0 < sectors < MAX_SECTORS or first >= MAX_SECTORS:
        raise file.corrupt(position, f"{where} is an extent of impossible size or place")
    return ExtentLine(sectors, match["kind"], match["name"] or "", first, match["access"])


def _text(file: ImageFile, position: int, data: bytes) -> str:
    """Up to the first NUL, in the charset it says it is in."""
    data = data.partition(b"\0")[0]
    match = _ENCODING.search(data)
    name = match[1].decode("ascii") if match else "utf-8"
    charset = _CHARSETS.get(name.lower().replace("_", "-"))
    try:
        if charset is None:
            return data.decode("ascii")
        return data.decode(charset)
    except UnicodeDecodeError as error:
        raise file.corrupt(
            position + error.start, f"its descriptor is in {name}, but this byte is not"
        ) from error


def render(descriptor: Descriptor) -> str:
    """The text of a descriptor, in UTF-8 when it is encoded. ``parse`` gives back the same."""
    lines = [
        "# Disk DescriptorFile",
        f"version={descriptor.version}",
        'encoding="UTF-8"',
        f"CID={descriptor.content_id:08x}",
        f"parentCID={descriptor.parent_content_id:08x}",
        f'createType="{descriptor.create_type}"',
    ]
    if descriptor.parent_name:
        lines.append(f'parentFileNameHint="{descriptor.parent_name}"')
    lines += ["", "# Extent description"]
    lines += [_render_extent(extent) for extent in descriptor.extents]
    lines += ["", "# The Disk Data Base", "#DDB", ""]
    lines += [f'ddb.{key} = "{value}"' for key, value in descriptor.database.items()]
    return "\n".join(lines) + "\n"


def _render_extent(extent: ExtentLine) -> str:
    text = f"{extent.access} {extent.sectors} {extent.kind}"
    if extent.name:
        text += f' "{extent.name}"'
        text += f" {extent.first}" if extent.kind == "FLAT" else ""
    return text
