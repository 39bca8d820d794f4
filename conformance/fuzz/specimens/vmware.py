"""Snapshots as ESXi writes them: COWD (``vmfsSparse``) and seSparse, each over a flat base.

::

    COWD      header 4 x 512 | grain directory | grain tables of 4096 x 32 bit | grains
    seSparse  const header | volatile header | journal | grain directory | grain tables | grains
                                                         64-bit entries: type in the top 4 bits
"""

import struct
from pathlib import Path

from conformance.fuzz.specimen import KIB, Specimen, guest_content
from conformance.outcome import CheckFailedError
from conformance.process import run

__all__ = ["vmdk"]

SECTOR = 512
SIZE = 256 * KIB
GRAIN = 8
"""Sectors of an seSparse grain."""

_DESCRIPTOR = """# Disk DescriptorFile
version=1
encoding="UTF-8"
CID={cid}
parentCID={parent}
createType="{kind}"
{hint}
# Extent description
RW {sectors} {extent} "{file}"

# The Disk Data Base
#DDB
ddb.virtualHWVersion = "8"
ddb.geometry.cylinders = "1"
ddb.geometry.heads = "16"
ddb.geometry.sectors = "63"
ddb.adapterType = "lsilogic"
"""


def vmdk(directory: Path) -> list[Specimen]:
    """Both kinds, on a ``vmfs`` base with its own descriptor; qemu has to agree that they are."""
    base = guest_content(SIZE)
    changed = guest_content(SIZE, seed=5)
    blocks = [0, 3, 4, 5, 17, 40, 63]
    content = bytearray(base)
    for block in blocks:
        at = block * GRAIN * SECTOR
        content[at : at + GRAIN * SECTOR] = changed[at : at + GRAIN * SECTOR]
    sparse = {"vmfsSparse": ("VMFSSPARSE", _cowd), "seSparse": ("SESPARSE", _se_sparse)}
    made = []
    for kind, (extent, build) in sparse.items():
        files = {
            "top.vmdk": _descriptor(kind, extent, "top-delta.vmdk", "00000002", "00000001"),
            "top-delta.vmdk": build(changed, blocks),
            "base.vmdk": _descriptor("vmfs", "VMFS", "base-flat.vmdk", "00000001", "ffffffff"),
            "base-flat.vmdk": base,
        }
        known = changed + base
        _prove(directory / kind, files, bytes(content))
        made.append(Specimen("vmdk", kind, files, "vmdk:{}/top.vmdk", bytes(content), known=known))
    return made


def _prove(directory: Path, files: dict[str, bytes], content: bytes) -> None:
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    run(("qemu-img", "convert", "-O", "raw", "top.vmdk", "read.img"), directory=directory)
    if (directory / "read.img").read_bytes() != content:
        raise CheckFailedError(f"qemu-img reads something else from our {directory.name}")


def _descriptor(kind: str, extent: str, file: str, cid: str, parent: str) -> bytes:
    hint = 'parentFileNameHint="base.vmdk"' if parent != "ffffffff" else ""
    return _DESCRIPTOR.format(
        kind=kind,
        extent=extent,
        file=file,
        cid=cid,
        parent=parent,
        hint=hint,
        sectors=SIZE // SECTOR,
    ).encode()


def _cowd(data: bytes, blocks: list[int]) -> bytes:
    """Grains of one sector, as ESXi chooses."""
    table_at, grain_at = 5, 5 + 4096 * 4 // SECTOR
    header = bytearray(4 * SECTOR)
    fields = (1, 3, SIZE // SECTOR, 1, 4, 1, 0)
    struct.pack_into("<4sIIIIIII", header, 0, b"COWD", *fields)
    directory = struct.pack("<I", table_at).ljust(SECTOR, b"\0")
    table = [0] * 4096
    grains = bytearray()
    for block in blocks:
        for sector in range(block * GRAIN, (block + 1) * GRAIN):
            table[sector] = grain_at + len(grains) // SECTOR
            grains += data[sector * SECTOR : (sector + 1) * SECTOR]
    struct.pack_into("<I", header, 28, grain_at + len(grains) // SECTOR)
    return bytes(header) + directory + struct.pack("<4096I", *table) + bytes(grains)


def _se_sparse(data: bytes, blocks: list[int]) -> bytes:
    """Tables of 64 sectors (4096 entries), regions one behind the other."""
    table_sectors = 64
    journal_header, journal, directory_at = 2, 4, 20
    tables_at = directory_at + 8
    free_at = tables_at + table_sectors
    back_at, grains_at = free_at + 8, free_at + 16
    const = struct.pack(
        "<QQQQQQQQQQ",
        *(0xCAFEBABE, 0x200000001, SIZE // SECTOR, GRAIN, table_sectors, 0, 0, 0, 0, 0),
    )
    regions = [
        *(1, 1, journal_header, 2, journal, 16, directory_at, 8, tables_at, table_sectors),
        *(free_at, 8, back_at, 8, grains_at, len(blocks) * GRAIN),
    ]
    const += struct.pack(f"<{len(regions)}Q", *regions)
    volatile = struct.pack("<QQQQQ", 0xCAFECAFE, 0, len(blocks), 0, 0)
    file = bytearray(grains_at * SECTOR)
    file[: len(const)] = const
    file[SECTOR : SECTOR + len(volatile)] = volatile
    struct.pack_into("<Q", file, directory_at * SECTOR, 0x1000000000000000)
    for number, block in enumerate(blocks):
        # A data grain: 3 in the top bits, the low 12 bits of its number, then the high 48.
        entry = 3 << 60 | (number & 0xFFF) << 48 | number >> 12
        struct.pack_into("<Q", file, tables_at * SECTOR + 8 * block, entry)
        file += data[block * GRAIN * SECTOR : (block + 1) * GRAIN * SECTOR]
    return bytes(file)
