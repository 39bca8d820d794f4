"""VHDX files written byte by byte, for what no tool here writes: parents, states, logs.

::

    0            1M    2M         3M                4M
    | headers    | log | metadata | BAT             | payload and bitmap blocks ...

An independent reading of MS-VHDX: nothing is taken from the code under test.
"""

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

__all__ = [
    "BASE_ID",
    "BAT_AT",
    "CHILD_ID",
    "LOG_AT",
    "LOG_ID",
    "METADATA_AT",
    "PAYLOAD_AT",
    "Block",
    "Vhdx",
    "crc32c",
    "log_entry",
    "parent_keys",
    "summed",
]

MIB = 1 << 20
LOG_AT, METADATA_AT, BAT_AT, PAYLOAD_AT = MIB, 2 * MIB, 3 * MIB, 4 * MIB
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, FULL, PARTIAL = 0, 1, 2, 3, 6, 7

BASE_ID = UUID("11111111-2222-4333-8444-555555555555")
CHILD_ID = UUID("66666666-7777-4888-8999-aaaaaaaaaaaa")
LOG_ID = UUID("bbbbbbbb-cccc-4ddd-8eee-ffffffffffff")
_NOBODY = UUID(int=0)


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 * (byte & 1))  # noqa: PLW2901
        table.append(byte)
    return table


_TABLE = _table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def summed(raw: bytes) -> bytes:
    """With the right checksum at 4."""
    raw = raw[:4] + bytes(4) + raw[8:]
    return raw[:4] + struct.pack("<I", crc32c(raw)) + raw[8:]


def log_entry(
    sequence: int,
    tail: int,
    updates: list[tuple[int, bytes | int]],
    *,
    guid: UUID = LOG_ID,
    flushed: int = 0,
    last: int = 0,
) -> bytes:
    """``updates``: (file offset, 4 KiB of data, or how many bytes to zero)."""
    descriptors, sectors = b"", b""
    for offset, data in updates:
        if isinstance(data, int):
            descriptors += struct.pack("<4s4xQQQ", b"zero", data, offset, sequence)
            continue
        assert len(data) == 4096
        descriptors += struct.pack("<4s4s8sQQ", b"desc", data[-4:], data[:8], offset, sequence)
        high, low = sequence >> 32, sequence & 0xFFFFFFFF
        sectors += struct.pack("<4sI4084sI", b"data", high, data[8:-4], low)
    length = -(-(64 + len(descriptors)) // 4096) * 4096
    head = struct.pack(
        "<4sIIIQII16sQQ", b"loge", 0, length + len(sectors), tail, sequence, len(updates), 0,
        guid.bytes_le, flushed, last,
    )  # fmt: skip
    return summed((head + descriptors).ljust(length, b"\0") + sectors)


def parent_keys(name: str, parent_id: UUID = BASE_ID, **others: str) -> dict[str, str]:
    """A parent locator."""
    return {"parent_linkage": f"{{{parent_id}}}", "relative_path": name, **others}


@dataclass(frozen=True)
class Block:
    """A payload block; ``sectors``: which of them are here, if the state is PARTIAL."""

    state: int = FULL
    data: bytes = b""
    sectors: frozenset[int] = frozenset()


@dataclass
class Vhdx:
    """What the file is to say; blocks lie in the order in which ``blocks`` names them."""

    size: int
    blocks: dict[int, Block] = field(default_factory=dict)
    block_size: int = MIB
    sector_size: int = 512
    data_write_guid: UUID = BASE_ID
    parent: dict[str, str] | None = None
    log: dict[int, bytes] = field(default_factory=dict)
    log_guid: UUID = _NOBODY
    log_length: int = MIB
    flags: int = 0
    bat: dict[int, int] = field(default_factory=dict)
    version: int = 1
    log_version: int = 0

    @property
    def ratio(self) -> int:
        return (1 << 23) * self.sector_size // self.block_size

    def index(self, block: int) -> int:
        """Of a block's entry in the BAT."""
        return block + block // self.ratio

    def header(self, sequence: int) -> bytes:
        raw = struct.pack(
            "<4sIQ16s16s16sHHIQ", b"head", 0, sequence, b"f" * 16, self.data_write_guid.bytes_le,
            self.log_guid.bytes_le, self.log_version, self.version, self.log_length, LOG_AT,
        )  # fmt: skip
        return summed(raw.ljust(4096, b"\0"))

    def regions(self, bat_length: int) -> bytes:
        bat = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
        metadata = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
        raw = struct.pack("<4sIII", b"regi", 0, 2, 0)
        raw += struct.pack("<16sQII", bat.bytes_le, BAT_AT, bat_length, 1)
        raw += struct.pack("<16sQII", metadata.bytes_le, METADATA_AT, MIB, 1)
        return summed(raw.ljust(64 << 10, b"\0"))

    def metadata(self) -> bytes:
        flags = self.flags | (2 if self.parent is not None else 0)
        items = [
            ("caa16737-fa36-4d43-b3b6-33f0aa44e76b", struct.pack("<II", self.block_size, flags)),
            ("2fa54224-cd1b-4876-b211-5dbed83bf4b8", struct.pack("<Q", self.size)),
            ("beca12ab-b2e6-4523-93ef-c309e000c746", b"d" * 16),
            ("8141bf1d-a96f-4709-ba47-f233a8faab5f", struct.pack("<I", self.sector_size)),
            ("cda348c7-445d-4471-9cc9-e9885251c556", struct.pack("<I", 4096)),
        ]
        if self.parent is not None:
            items.append(("a8d35f2d-b30b-454d-abf7-d3d84834ab0c", self.locator(self.parent)))
        table = struct.pack("<8sHH20x", b"metadata", 0, len(items))
        body = b""
        for guid, item in items:
            offset = (64 << 10) + len(body)
            table += struct.pack("<16sIIII", UUID(guid).bytes_le, offset, len(item), 4, 0)
            body += item
        return table.ljust(64 << 10, b"\0") + body

    @staticmethod
    def locator(keys: dict[str, str]) -> bytes:
        kind = UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
        head, text = struct.pack("<16sHH", kind.bytes_le, 0, len(keys)), b""
        start = 20 + 12 * len(keys)
        for key, value in keys.items():
            name, content = key.encode("utf-16-le"), value.encode("utf-16-le")
            at = start + len(text)
            head += struct.pack("<IIHH", at, at + len(name), len(name), len(content))
            text += name + content
        return head + text

    def write(self, path: Path) -> str:
        """Write it there, sparse."""
        count = -(-self.size // self.block_size)
        chunks = -(-count // self.ratio)
        bat_length = -(-8 * chunks * (self.ratio + 1) // MIB) * MIB
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.pwrite(fd, b"vhdxfile" + "nbdsrv's tests".encode("utf-16-le"), 0)
            os.pwrite(fd, self.header(7), 64 << 10)
            os.pwrite(fd, self.header(8), 128 << 10)
            for at in (192 << 10, 256 << 10):
                os.pwrite(fd, self.regions(bat_length), at)
            for at, entry in self.log.items():
                os.pwrite(fd, entry, LOG_AT + at)
            os.pwrite(fd, self.metadata(), METADATA_AT)
            end = self._payload(fd, BAT_AT + bat_length)
            for index, entry in self.bat.items():
                os.pwrite(fd, struct.pack("<Q", entry), BAT_AT + 8 * index)
            os.ftruncate(fd, end)
        finally:
            os.close(fd)
        return str(path)

    def _payload(self, fd: int, end: int) -> int:
        bitmaps: dict[int, int] = {}
        for number, block in self.blocks.items():
            entry = block.state
            if block.state in {FULL, PARTIAL}:
                entry |= end
                os.pwrite(fd, block.data, end)
                end += self.block_size
            os.pwrite(fd, struct.pack("<Q", entry), BAT_AT + 8 * self.index(number))
            if block.state != PARTIAL:
                continue
            chunk = number // self.ratio
            if chunk not in bitmaps:
                bitmaps[chunk], end = end, end + MIB
                index = chunk * (self.ratio + 1) + self.ratio
                os.pwrite(fd, struct.pack("<Q", bitmaps[chunk] | 6), BAT_AT + 8 * index)
            sectors = self.block_size // self.sector_size
            bitmap = bytearray(sectors // 8)
            for sector in block.sectors:
                bitmap[sector // 8] |= 1 << sector % 8
            os.pwrite(fd, bitmap, bitmaps[chunk] + number % self.ratio * sectors // 8)
        return end

    def content(self, below: bytes = b"") -> bytes:
        """What it reads as, over ``below``."""
        content = bytearray(below[: self.size].ljust(self.size, b"\0"))
        for number, block in self.blocks.items():
            start = number * self.block_size
            length = min(self.block_size, self.size - start)
            data = block.data.ljust(self.block_size, b"\0")
            if block.state == FULL:
                content[start : start + length] = data[:length]
            elif block.state == PARTIAL:
                for sector in block.sectors:
                    at, end = sector * self.sector_size, (sector + 1) * self.sector_size
                    if at < length:
                        content[start + at : start + end] = data[at:end]
            elif block.state != NOT_PRESENT:
                content[start : start + length] = bytes(length)
        return bytes(content)
