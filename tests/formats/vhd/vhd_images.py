"""VHD files written byte by byte, for what no tool here writes.

::

    footer copy | header | locators | BAT | [bitmap | data] ... | footer

An independent reading of the specification: nothing is taken from the code under test.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

__all__ = ["BASE_ID", "CHILD_ID", "GRANDCHILD_ID", "Block", "Vhd", "bits"]

BASE_ID = UUID("11111111-2222-4333-8444-555555555555")
CHILD_ID = UUID("66666666-7777-4888-8999-aaaaaaaaaaaa")
GRANDCHILD_ID = UUID("bbbbbbbb-cccc-4ddd-8eee-ffffffffffff")

FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4

_NOBODY = UUID(int=0)


@dataclass(frozen=True)
class Block:
    """Data of a block and which of its sectors count; ``sectors`` None: all."""

    data: bytes
    sectors: frozenset[int] | None = None


def bits(sectors: frozenset[int] | None, count: int, size: int, *, least_first: bool) -> bytes:
    """A sector bitmap of ``size`` bytes."""
    bitmap = bytearray(size)
    for sector in range(count) if sectors is None else sectors:
        bitmap[sector // 8] |= 1 << sector % 8 if least_first else 0x80 >> sector % 8
    return bytes(bitmap)


@dataclass
class Vhd:
    """What the file is to say; blocks lie in the order in which ``blocks`` names them."""

    size: int
    blocks: dict[int, Block] = field(default_factory=dict)
    kind: int = DYNAMIC
    unique_id: UUID = BASE_ID
    block_size: int = 2 << 20
    parent_id: UUID = _NOBODY
    parent_name: str = ""
    locators: list[tuple[bytes, bytes]] = field(default_factory=list)
    space_in_bytes: bool = False
    creator: bytes = b"test"
    creator_version: int = 0x00010000
    geometry: tuple[int, int, int] = (65535, 16, 255)
    features: int = 2
    hidden: int = 0
    forget_hidden: bool = False
    entries: int | None = None
    least_first: bool = False
    bat: dict[int, int] = field(default_factory=dict)
    cut: int = 0

    def footer(self) -> bytes:
        """512 bytes."""
        data_offset = 0xFFFFFFFFFFFFFFFF if self.kind == FIXED else 512
        raw = bytearray(512)
        struct.pack_into(
            ">8sIIQI4sI4sQQHBBII16sBB", raw, 0,
            b"conectix", self.features, 0x00010000, data_offset, 700000000,
            self.creator, self.creator_version, b"Wi2k", self.size, self.size,
            *self.geometry, self.kind, 0, self.unique_id.bytes, 0,
            0 if self.forget_hidden else self.hidden,
        )  # fmt: skip
        struct.pack_into(">I", raw, 64, ~sum(raw) & 0xFFFFFFFF)
        raw[85] = self.hidden
        return bytes(raw)

    def header(self, table_at: int, locators: list[tuple[bytes, int, int]]) -> bytes:
        """1024 bytes."""
        raw = bytearray(1024)
        struct.pack_into(
            ">8sQQIII4x16sI4x512s", raw, 0,
            b"cxsparse", 0xFFFFFFFFFFFFFFFF, table_at, 0x00010000, self._entries(),
            self.block_size, self.parent_id.bytes, 1234, self.parent_name.encode("utf-16-be"),
        )  # fmt: skip
        for index, (platform, position, length) in enumerate(locators):
            space = 512 if self.space_in_bytes else 1
            where = 576 + 24 * index
            struct.pack_into(">4sII4xQ", raw, where, platform, space, length, position)
        struct.pack_into(">I", raw, 36, ~sum(raw) & 0xFFFFFFFF)
        return bytes(raw)

    def _entries(self) -> int:
        return -(-self.size // self.block_size) if self.entries is None else self.entries

    def build(self) -> bytes:
        """The whole file."""
        if self.kind == FIXED:
            content = bytearray(self.size)
            for number, block in self.blocks.items():
                start = number * self.block_size
                content[start : start + len(block.data)] = block.data
            return bytes(content[: self.size]) + self.footer()
        body = bytearray(512 + 1024)
        locators = []
        for platform, name in self.locators:
            locators.append((platform, len(body), len(name)))
            body += name.ljust(-(-len(name) // 512) * 512, b"\0")
        table_at = len(body)
        body += bytes(-(-4 * self._entries() // 512) * 512)
        table = [0xFFFFFFFF] * self._entries()
        sectors = self.block_size // 512
        bitmap_size = -(-sectors // 4096) * 512
        for number, block in self.blocks.items():
            table[number] = len(body) // 512
            body += bits(block.sectors, sectors, bitmap_size, least_first=self.least_first)
            body += block.data.ljust(self.block_size, b"\0")
        for number, entry in self.bat.items():
            table[number] = entry
        struct.pack_into(f">{len(table)}I", body, table_at, *table)
        body[512 : 512 + 1024] = self.header(table_at, locators)
        body[:512] = self.footer()
        del body[len(body) - self.cut :]
        return bytes(body) + self.footer()

    def content(self, below: bytes = b"") -> bytes:
        """What it reads as, over ``below``."""
        content = bytearray(below[: self.size].ljust(self.size, b"\0"))
        for number, block in self.blocks.items():
            data = block.data.ljust(self.block_size, b"\0")
            every = range(self.block_size // 512) if block.sectors is None else block.sectors
            for sector in every:
                start = number * self.block_size + sector * 512
                length = min(512, self.size - start)
                if length > 0:
                    content[start : start + length] = data[sector * 512 : sector * 512 + length]
        return bytes(content)

    def write(self, path: Path) -> str:
        """Build it there."""
        path.write_bytes(self.build())
        return str(path)
