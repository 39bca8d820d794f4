"""Children that qemu-img cannot make: over a parent of the same format, VHD, VHDX, VDI, Parallels.

Each starts as an image qemu-img wrote; the parent's identity, and for VHD and VHDX the sector
bitmaps, are put in by hand::

    VHD    footer type 4 | header: parent id, name, locators | BAT | block: bitmap, 2 MiB of data
    VHDX   metadata: HasParent, parent locator | BAT: payload partially present, bitmap block
    VDI    header: type 4, parent's uuids
    Parallels    a DiskDescriptor.xml beside both says which is below which

Data is in the child where the child's own content differs from the parent's.
"""

import struct
import uuid
from pathlib import Path

from conformance.fuzz.mending import mend_vhd, mend_vhdx
from conformance.fuzz.specimen import KIB, MIB, SECTOR, Specimen, guest_content
from conformance.fuzz.specimens.hypervisors import Bench

__all__ = ["parallels", "vdi", "vhd", "vhdx"]

SIZE = 4 * MIB
CHANGED = (0, 100 * KIB, 2 * MIB + 40 * KIB)
"""Where the child has data of its own, ``SPAN`` bytes each."""
SPAN = 20 * KIB


def _parent_content() -> bytes:
    content = bytearray(SIZE)
    content[: 200 * KIB] = guest_content(200 * KIB)
    content[3 * MIB : 3 * MIB + 64 * KIB] = guest_content(64 * KIB, seed=2)
    return bytes(content)


def _child_content() -> bytes:
    content = bytearray(SIZE)
    for index, at in enumerate(CHANGED):
        content[at : at + SPAN] = guest_content(SPAN, seed=10 + index)
    return bytes(content)


def _together() -> bytes:
    content, child = bytearray(_parent_content()), _child_content()
    for at in CHANGED:
        content[at : at + SPAN] = child[at : at + SPAN]
    return bytes(content)


def _pair(directory: Path, form: str, qemu: str, options: str) -> tuple[bytes, bytearray]:
    """Parent and child as qemu-img writes them, not related yet."""
    made = []
    for name, content in (("parent", _parent_content()), ("child", _child_content())):
        place = directory / name
        place.mkdir()
        bench = Bench(place, content)
        bench.convert(qemu, f"{name}.{form}", options)
        made.append((place / f"{name}.{form}").read_bytes())
    return made[0], bytearray(made[1])


def vhd(directory: Path) -> list[Specimen]:
    """Two blocks with sector bitmaps; the parent by relative name and by its Unicode name."""
    parent, child = _pair(directory, "vhd", "vpc", "subformat=dynamic,force_size=on")
    struct.pack_into(">I", child, 60, 4)  # the footer's copy, and below the footer: differencing
    struct.pack_into(">I", child, len(child) - 512 + 60, 4)
    header = int.from_bytes(child[16:24], "big")
    table, entries = struct.unpack_from(">Q", child, header + 16)[0], 2
    child[header + 40 : header + 56] = parent[68:84]
    child[header + 56 : header + 60] = parent[24:28]
    name = "parent.vhd"
    unicode_name = name.encode("utf-16-be")
    child[header + 64 : header + 64 + len(unicode_name)] = unicode_name
    for index in range(entries):
        sector = int.from_bytes(child[table + 4 * index : table + 4 * index + 4], "big")
        if sector != 0xFFFFFFFF:
            child[sector * SECTOR : (sector + 1) * SECTOR] = _vhd_bitmap(index)
    # The locator's text goes where the old footer was; the footer moves behind it.
    footer = bytes(child[-512:])
    where = len(child) - 512
    text = name.encode("utf-16-le")
    child[where:] = text.ljust(SECTOR, b"\0") + footer
    struct.pack_into(">4sIIIQ", child, header + 576, b"W2ru", SECTOR, len(text), 0, where)
    mend_vhd(child)
    files = {"child.vhd": bytes(child), name: parent}
    source = "vhd:{}/child.vhd"
    known = _parent_content() + _child_content()
    return [Specimen("vhd", "child", files, source, _together(), mend_vhd, known=known, peer=False)]


def _vhd_bitmap(block: int) -> bytes:
    bitmap = bytearray(SECTOR)
    for at in CHANGED:
        if at // (2 * MIB) == block:
            for sector in range(at % (2 * MIB) // SECTOR, (at % (2 * MIB) + SPAN) // SECTOR):
                bitmap[sector // 8] |= 0x80 >> sector % 8
    return bytes(bitmap)


def vdi(directory: Path) -> list[Specimen]:
    """Whole blocks of 1 MiB in the child, found by the parent's uuid."""
    parent, child = _pair(directory, "vdi", "vdi", "")
    struct.pack_into("<I", child, 76, 4)
    child[424:440] = parent[392:408]  # uuidParent := the parent's uuidImage
    child[440:456] = parent[408:424]
    content, own = bytearray(_parent_content()), _child_content()
    for block in range(SIZE // MIB):
        if any(block == at // MIB for at in CHANGED):
            content[block * MIB : (block + 1) * MIB] = own[block * MIB : (block + 1) * MIB]
    files = {"child.vdi": bytes(child), "parent.vdi": parent}
    known = _parent_content() + own
    return [
        Specimen("vdi", "child", files, "vdi:{}/child.vdi", bytes(content), known=known, peer=False)
    ]


_BUNDLE = """<?xml version="1.0" encoding="UTF-8"?>
<Parallels_disk_image Version="1.0">
<Disk_Parameters><Disk_size>{sectors}</Disk_size></Disk_Parameters>
<StorageData><Storage><Start>0</Start><End>{sectors}</End><Blocksize>128</Blocksize>
<Image><GUID>{{{one}}}</GUID><Type>Compressed</Type><File>parent.parallels</File></Image>
<Image><GUID>{{{two}}}</GUID><Type>Compressed</Type><File>child.parallels</File></Image>
</Storage></StorageData>
<Snapshots>
<Shot><GUID>{{{two}}}</GUID><ParentGUID>{{{one}}}</ParentGUID></Shot>
<Shot><GUID>{{{one}}}</GUID><ParentGUID>{{{none}}}</ParentGUID></Shot>
</Snapshots>
</Parallels_disk_image>
"""
CLUSTER = 64 * KIB


def parallels(directory: Path) -> list[Specimen]:
    """A bundle of two images."""
    parent, child = _pair(directory, "parallels", "parallels", f"cluster_size={CLUSTER}")
    content, own = bytearray(_parent_content()), _child_content()
    for at in range(0, SIZE, CLUSTER):
        if any(own[at : at + CLUSTER]):
            content[at : at + CLUSTER] = own[at : at + CLUSTER]
    ids = {"one": uuid.UUID(int=1), "two": uuid.UUID(int=2), "none": uuid.UUID(int=0)}
    text = _BUNDLE.format(sectors=SIZE // SECTOR, **ids)
    files = {
        "child.parallels": bytes(child),
        "parent.parallels": parent,
        "DiskDescriptor.xml": text.encode(),
    }
    source = "parallels:{}/child.parallels"
    known = _parent_content() + own
    return [Specimen("parallels", "bundle", files, source, bytes(content), known=known, peer=False)]


_LOCATOR_ITEM = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
_LOCATOR_TYPE = uuid.UUID("b04aefb7-d19e-4a81-b789-25b8e9445913").bytes_le
_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_BAT_REGION = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
_METADATA_REGION = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_PRESENT = 6
"""Of payload and of sector bitmap blocks."""
_PARTIAL = 7


def vhdx(directory: Path) -> list[Specimen]:
    """Payload blocks partially present, one bitmap block, the parent by relative path."""
    options = "subformat=dynamic,block_size=1M,log_size=1M"
    parent, child = _pair(directory, "vhdx", "vhdx", options)
    regions = _regions(child)
    linkage = uuid.UUID(bytes_le=parent[64 * KIB + 32 : 64 * KIB + 48])
    if int.from_bytes(parent[128 * KIB + 8 : 128 * KIB + 16], "little") > int.from_bytes(
        parent[64 * KIB + 8 : 64 * KIB + 16], "little"
    ):
        linkage = uuid.UUID(bytes_le=parent[128 * KIB + 32 : 128 * KIB + 48])
    entries = {"parent_linkage": f"{{{linkage}}}", "relative_path": ".\\parent.vhdx"}
    _add_locator(child, regions[_METADATA_REGION], entries)
    _make_partial(child, regions[_BAT_REGION])
    mend_vhdx(child)
    files = {"child.vhdx": bytes(child), "parent.vhdx": parent}
    known = _parent_content() + _child_content()
    source = "vhdx:{}/child.vhdx"
    return [
        Specimen("vhdx", "child", files, source, _together(), mend_vhdx, known=known, peer=False)
    ]


def _regions(data: bytearray) -> dict[bytes, int]:
    """Region kinds and their positions, from the first region table."""
    at = 192 * KIB
    count = int.from_bytes(data[at + 8 : at + 12], "little")
    found = {}
    for index in range(count):
        entry = at + 16 + 32 * index
        kind = bytes(data[entry : entry + 16])
        found[kind] = int.from_bytes(data[entry + 16 : entry + 24], "little")
    return found


def _add_locator(data: bytearray, table: int, entries: dict[str, str]) -> None:
    count = int.from_bytes(data[table + 10 : table + 12], "little")
    last = 0
    for index in range(count):
        entry = table + 32 + 32 * index
        where, length = struct.unpack_from("<II", data, entry + 16)
        last = max(last, where + length)
        if bytes(data[entry : entry + 16]) == _PARAMETERS:
            data[table + where + 4] |= 2  # HasParent
    blob = bytearray(_LOCATOR_TYPE + struct.pack("<HH", 0, len(entries)))
    texts, at = b"", 20 + 12 * len(entries)
    for key, value in entries.items():
        one, two = key.encode("utf-16-le"), value.encode("utf-16-le")
        blob += struct.pack("<IIHH", at, at + len(one), len(one), len(two))
        texts += one + two
        at += len(one) + len(two)
    blob += texts
    entry = table + 32 + 32 * count
    where = -(-last // 8) * 8
    data[entry : entry + 32] = _LOCATOR_ITEM + struct.pack("<IIII", where, len(blob), 4, 0)
    data[table + where : table + where + len(blob)] = blob
    data[table + 10 : table + 12] = (count + 1).to_bytes(2, "little")


def _make_partial(data: bytearray, table: int) -> None:
    """Blocks of 1 MiB and sectors of 512 bytes: the bitmap's entry comes behind 4096 blocks."""
    ratio = 2**23 * SECTOR // MIB
    bitmap = bytearray(MIB)
    for at in CHANGED:
        for sector in range(at // SECTOR, (at + SPAN) // SECTOR):
            bitmap[sector // 8] |= 1 << sector % 8
    for block in range(SIZE // MIB):
        entry = int.from_bytes(data[table + 8 * block : table + 8 * block + 8], "little")
        partial = entry & ~7 | _PARTIAL if entry & 7 == _PRESENT else 0
        data[table + 8 * block : table + 8 * block + 8] = partial.to_bytes(8, "little")
    data += bytes(-len(data) % MIB)
    where = table + 8 * ratio
    data[where : where + 8] = (len(data) | _PRESENT).to_bytes(8, "little")
    data += bitmap
