"""LZ4 frames, unpacked in parts.

::

    frame   | descriptor | block | block | block | ... | 0 | content checksum
                         size, packed bytes, checksum
    guest   |  64 KiB   |  64 KiB   |  64 KiB   | ...        up to 32 MiB a frame
    units   |         256 KiB               |  256 KiB  ...  what is unpacked for a small read

virtnbdbackup's frames have linked blocks: each refers to the 64 KiB before it. So a unit needs the
end of the one before; these *seeds* are kept every fourth unit, and where none is kept the frame is
unpacked from the last one on. A frame of independent blocks needs none.

Rule: a block whose checksum is wrong is never unpacked. Where blocks carry no checksum but the
whole does, the frame is unpacked as a whole.

Source: the LZ4 frame format, v1.6.2 (lz4_Frame_format.md).
"""

import threading
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import lz4.block  # type: ignore[import-untyped]
import lz4.frame  # type: ignore[import-untyped]
import xxhash

from nbdsrv.formats.image_file import MAX_METADATA, ImageFile

__all__ = ["MAX_CONTENT", "UNIT", "Lz4Frames", "Seeds", "content_size"]

UNIT = 256 << 10
"""Bytes unpacked at a time; a fifth of a millisecond."""
MAX_CONTENT = 256 << 20
"""Bytes of a frame, packed or not: NBD servers take requests of at most 32 or 64 MiB."""
MAX_WHOLE = 64 << 20
"""Bytes of a frame that can only be unpacked as a whole."""
WINDOW = 64 << 10
"""How far back LZ4 refers."""
SEED_UNITS = 4
"""A seed is kept every so many units: a sixteenth of the data."""
MAX_SEEDS = 48 << 20
"""Bytes of seeds: of 768 MiB of disk."""
MAX_RECENT = 32
"""Units kept for who reads on, and for those who read beside him: 8 MiB."""
MAX_TABLES = 4096
"""Frames whose blocks are remembered: 4 KiB for each."""
MAGIC = 0x184D2204
LOCKS = 16

_VERSION, _VERSION_1 = 0xC0, 0x40
_INDEPENDENT, _BLOCK_SUM, _SIZE, _CONTENT_SUM, _RESERVED, _DICTIONARY = 32, 16, 8, 4, 2, 1
_AS_IS = 1 << 31
MAX_DESCRIPTOR = 19


class Descriptor(NamedTuple):
    """What a frame says of itself.

    Attributes:
        length: bytes, the magic number included.
        block_size: bytes a block has at most, unpacked.
        content: bytes of all, or None if it does not say.
    """

    length: int
    independent: bool
    block_sums: bool
    content_sum: bool
    block_size: int
    content: int | None


@dataclass(frozen=True, slots=True)
class _Table:
    """The blocks of a frame; ``sizes`` as they are in the file, the top bit meaning not packed."""

    descriptor: Descriptor
    positions: "array[int]"
    sizes: "array[int]"
    whole: bool


def content_size(file: ImageFile, position: int, packed: int) -> int:
    """How many bytes a frame unpacks to, by its descriptor. Blocking.

    Raises:
        CorruptImage: there is no frame, or it does not say.
    """
    descriptor = _descriptor(file, position, packed)
    if descriptor.content is None:
        raise file.corrupt(position, "an LZ4 frame that does not say its size")
    return descriptor.content


def _descriptor(file: ImageFile, position: int, packed: int) -> Descriptor:
    raw = file.read_up_to(position, min(MAX_DESCRIPTOR, packed))
    if len(raw) < 7 or int.from_bytes(raw[:4], "little") != MAGIC:
        raise file.corrupt(position, "no LZ4 frame")
    flags, sizes = raw[4], raw[5]
    length = 7 + (8 if flags & _SIZE else 0)
    known = flags & _VERSION == _VERSION_1 and not flags & (_RESERVED | _DICTIONARY)
    code = sizes >> 4
    if not known or sizes & 0x8F or code < 4 or len(raw) < length:
        raise file.corrupt(position, f"an LZ4 frame with flags {flags:#x} {sizes:#x}")
    if raw[length - 1] != xxhash.xxh32_intdigest(raw[4 : length - 1]) >> 8 & 0xFF:
        raise file.corrupt(position, "an LZ4 frame whose descriptor has the wrong checksum")
    return Descriptor(
        length,
        independent=bool(flags & _INDEPENDENT),
        block_sums=bool(flags & _BLOCK_SUM),
        content_sum=bool(flags & _CONTENT_SUM),
        block_size=1 << 8 + 2 * code,
        content=int.from_bytes(raw[6:14], "little") if flags & _SIZE else None,
    )


class Seeds:
    """Ends of units, and units, that have been unpacked; shared by all files. Thread-safe."""

    def __init__(self, limit: int = MAX_SEEDS) -> None:
        self._limit = limit // WINDOW
        self._lock = threading.Lock()
        self._seeds: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()
        self._recent: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()

    def unit(self, key: tuple[int, int, int]) -> bytes | None:
        """A unit that was unpacked a moment ago."""
        with self._lock:
            return self._recent.get(key)

    def before(self, key: tuple[int, int, int]) -> bytes | None:
        """What a unit refers to; None if it is not known."""
        file, frame, unit = key
        with self._lock:
            seed = self._seeds.get(key)
            if seed is not None:
                self._seeds.move_to_end(key)
                return seed
            last = self._recent.get((file, frame, unit - 1))
        return last[-WINDOW:] if last is not None else None

    def keep(self, key: tuple[int, int, int], data: bytes) -> None:
        """A unit has been unpacked."""
        file, frame, unit = key
        with self._lock:
            self._recent[key] = data
            self._recent.move_to_end(key)
            if len(self._recent) > MAX_RECENT:
                self._recent.popitem(last=False)
            if (unit + 1) % SEED_UNITS == 0:
                self._seeds[file, frame, unit + 1] = data[-WINDOW:]
                if len(self._seeds) > self._limit:
                    self._seeds.popitem(last=False)

    def forget(self, file: int) -> None:
        """A file is closed."""
        with self._lock:
            for kept in (self._seeds, self._recent):
                for key in [key for key in kept if key[0] == file]:
                    del kept[key]


class Lz4Frames:
    """The frames of one file. All methods block; any thread may call them."""

    def __init__(self, file: ImageFile, seeds: Seeds) -> None:
        """Use a file that somebody else closes, and call ``close`` before."""
        self._file = file
        self._seeds = seeds
        self._tables: OrderedDict[int, _Table] = OrderedDict()
        self._lock = threading.Lock()
        # Readers of one frame go one after the other: each needs what the one before unpacks.
        self._turns = [threading.Lock() for _ in range(LOCKS)]

    def read(self, position: int, packed: int, length: int, number: int) -> bytes:
        """A unit of the frame at ``position``.

        Args:
            position: in the file.
            packed: bytes of it in the file.
            length: bytes it must unpack to.
            number: of the unit.

        Raises:
            CorruptImage: a checksum is wrong, or it is no such frame.
        """
        with self._turns[position // 7 % LOCKS]:
            table = self._table(position, packed, length)
            if table.whole:
                return self._of_whole(position, packed, length, number)
            size = table.descriptor.block_size
            if size <= UNIT:
                return self._unit(position, table, length, number)
            # Larger blocks than virtnbdbackup makes: a block is many units.
            start = number * UNIT
            block = self._unit(position, table, length, start // size)
            return block[start % size : start % size + UNIT]

    def unpack(self, position: int, packed: int, length: int) -> None:
        """Prove all checksums of a frame, and that it unpacks.

        Raises:
            CorruptImage: no.
        """
        table = self._table(position, packed, length)
        content = xxhash.xxh32()
        before = b""
        for block in range(len(table.sizes)):
            data = self._block(table, block, before, length)
            content.update(data)
            length -= len(data)
            before = data if len(data) >= WINDOW else (before + data)[-WINDOW:]
        if length:
            raise self._file.corrupt(position, f"an LZ4 frame with {length} bytes too few")
        if table.descriptor.content_sum:
            end = table.positions[-1] + (table.sizes[-1] & ~_AS_IS) if table.sizes else position
            end += 4 * (1 + table.descriptor.block_sums)
            wanted = int.from_bytes(self._file.read(end, 4, "a checksum"), "little")
            if content.intdigest() != wanted:
                raise self._file.corrupt(position, "an LZ4 frame whose content is not what it was")

    def close(self) -> None:
        """Give memory back."""
        self._seeds.forget(id(self))
        with self._lock:
            self._tables.clear()

    # --- tables --------------------------------------------------------------------------------

    def _table(self, position: int, packed: int, length: int) -> _Table:
        with self._lock:
            table = self._tables.get(position)
            if table is not None:
                self._tables.move_to_end(position)
                return table
        table = self._read_table(position, packed, length)
        with self._lock:
            self._tables[position] = table
            if len(self._tables) > MAX_TABLES:
                self._tables.popitem(last=False)
        return table

    def _read_table(self, position: int, packed: int, length: int) -> _Table:
        descriptor = _descriptor(self._file, position, packed)
        if descriptor.content not in {None, length}:
            text = f"an LZ4 frame of {descriptor.content} bytes in place of {length}"
            raise self._file.corrupt(position, text)
        positions, sizes = array("q"), array("L")
        at, end = position + descriptor.length, position + packed
        extra = 4 if descriptor.block_sums else 0
        most = -(-length // descriptor.block_size)
        while True:
            if at + 4 > end:
                raise self._file.corrupt(at, "an LZ4 frame without an end")
            size = int.from_bytes(self._file.read(at, 4, "the size of a block"), "little")
            if not size:
                break
            stored = size & ~_AS_IS
            if not stored or stored > descriptor.block_size or at + 4 + stored + extra > end:
                raise self._file.corrupt(at, f"an LZ4 block of {stored} bytes")
            positions.append(at + 4)
            sizes.append(size)
            at += 4 + stored + extra
            if len(sizes) > 4 * most + 4:
                raise self._file.corrupt(at, f"an LZ4 frame with too many blocks for {length}")
        if at + 4 + (4 if descriptor.content_sum else 0) != end:
            raise self._file.corrupt(at, f"an LZ4 frame that ends {end - at} bytes early")
        # Blocks that are not full do not come from virtnbdbackup; where they begin is not known.
        regular = len(sizes) == most
        proven = descriptor.block_sums or not descriptor.content_sum
        return _Table(descriptor, positions, sizes, whole=not (regular and proven))

    # --- blocks --------------------------------------------------------------------------------

    def _unit(self, position: int, table: _Table, length: int, number: int) -> bytes:
        owner = id(self)
        found = self._seeds.unit((owner, position, number))
        if found is not None:
            return found
        first, before = number, b""
        if not table.descriptor.independent:
            while first and not (before := self._seeds.before((owner, position, first)) or b""):
                first -= 1
        data = b""
        for unit in range(first, number + 1):
            data = self._unpack_unit(position, table, length, unit, before)
            self._seeds.keep((owner, position, unit), data)
            before = data[-WINDOW:]
        return data

    def _unpack_unit(
        self, position: int, table: _Table, length: int, number: int, before: bytes
    ) -> bytes:
        size = table.descriptor.block_size
        per_unit = max(UNIT // size, 1)
        first = number * per_unit
        parts: list[bytes] = []
        for block in range(first, min(first + per_unit, len(table.sizes))):
            wanted = min(size, length - block * size)
            part = self._block(table, block, before, wanted)
            if len(part) != wanted:
                text = f"an LZ4 block of {len(part)} bytes in place of {wanted}"
                raise self._file.corrupt(table.positions[block], text)
            parts.append(part)
            before = part[-WINDOW:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _block(self, table: _Table, block: int, before: bytes, limit: int) -> bytes:
        """One block, proven and unpacked; at most ``limit`` bytes."""
        position, size = table.positions[block], table.sizes[block]
        stored = size & ~_AS_IS
        extra = 4 if table.descriptor.block_sums else 0
        raw = self._file.read(position, stored + extra, "an LZ4 block")
        data, told = raw[:stored], raw[stored:]
        if told and xxhash.xxh32_intdigest(data) != int.from_bytes(told, "little"):
            raise self._file.corrupt(position, "an LZ4 block whose checksum is wrong")
        limit = min(limit, table.descriptor.block_size)
        if size & _AS_IS:
            if stored > limit:
                raise self._file.corrupt(position, f"an LZ4 block of {stored} bytes")
            return data
        window = b"" if table.descriptor.independent else before[-WINDOW:]
        try:
            found: bytes = lz4.block.decompress(data, uncompressed_size=limit, dict=window)
        except (lz4.block.LZ4BlockError, ValueError, MemoryError) as error:
            raise self._file.corrupt(position, f"an LZ4 block, {error}") from error
        return found

    def _of_whole(self, position: int, packed: int, length: int, number: int) -> bytes:
        """A unit of a frame that can only be proven, or found the way through, as a whole."""
        owner = id(self)
        found = self._seeds.unit((owner, position, number))
        if found is not None:
            return found
        if max(length, packed) > min(MAX_WHOLE, MAX_METADATA * 2):
            raise self._file.corrupt(position, f"an LZ4 frame of {length} bytes without block sums")
        half = min(packed, MAX_METADATA)
        raw = self._file.read(position, half, "an LZ4 frame")
        if packed > half:
            raw += self._file.read(position + half, packed - half, "an LZ4 frame")
        unpacker = lz4.frame.LZ4FrameDecompressor()
        try:
            data: bytes = unpacker.decompress(raw, max_length=length)
            if not unpacker.eof:  # the end mark and the checksum behind the last byte
                data += unpacker.decompress(b"", max_length=1)
        except (RuntimeError, ValueError, EOFError, MemoryError) as error:
            raise self._file.corrupt(position, f"an LZ4 frame, {error}") from error
        if len(data) != length or not unpacker.eof:
            raise self._file.corrupt(position, f"an LZ4 frame that does not hold {length} bytes")
        units = range(0, length, UNIT)
        for unit in (u for u in range(number, min(number + MAX_RECENT // 2, len(units)))):
            part = data[unit * UNIT : (unit + 1) * UNIT]
            self._seeds.keep((owner, position, unit), part)
        return data[number * UNIT : (number + 1) * UNIT]
