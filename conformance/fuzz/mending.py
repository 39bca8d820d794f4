"""Checksums made right again, so that a mutation reaches the code behind them.

One function per kind of image; each takes a whole file and changes nothing but checksums, where it
finds what carries them. They are written from the formats' own descriptions, not with our readers.
"""

import struct
import zlib
from functools import lru_cache

__all__ = ["crc32c", "mend_gpt", "mend_tar", "mend_vhd", "mend_vhdx", "mend_xz"]

SECTOR = 512
_VHD_SUMS = {b"conectix": (512, 64), b"cxsparse": (1024, 36)}
"""Cookie to (length, position of the checksum) of VHD's footer and dynamic header."""
MOST_LOG_SECTORS = 512
"""Sectors of a VHDX log looked at: all there are in the specimens."""


def mend_vhd(data: bytearray) -> None:
    """VHD: ones' complement of the byte sum, wherever a footer or dynamic header stands."""
    places = [*range(0, min(len(data), 64 * SECTOR), SECTOR), len(data) - 512, len(data) - 511]
    for at in places:
        known = _VHD_SUMS.get(bytes(data[at : at + 8])) if at >= 0 else None
        if known is None or at + known[0] - 1 > len(data):
            continue
        length, place = known
        data[at + place : at + place + 4] = bytes(4)
        total = ~sum(data[at : at + length]) & 0xFFFFFFFF
        data[at + place : at + place + 4] = total.to_bytes(4, "big")


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC32C = _crc32c_table()


@lru_cache(maxsize=256)  # most structures of most mutants are as they were, and this is slow
def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli)."""
    crc, table = 0xFFFFFFFF, _CRC32C
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _mend_crc32c(data: bytearray, at: int, length: int) -> None:
    data[at + 4 : at + 8] = bytes(4)
    data[at + 4 : at + 8] = crc32c(bytes(data[at : at + length])).to_bytes(4, "little")


def mend_vhdx(data: bytearray) -> None:
    """VHDX: headers, region tables and log entries, by their signatures."""
    for at in (64 << 10, 128 << 10):
        if data[at : at + 4] == b"head" and len(data) >= at + 4096:
            _mend_crc32c(data, at, 4096)
    for at in (192 << 10, 256 << 10):
        if data[at : at + 4] == b"regi" and len(data) >= at + (64 << 10):
            _mend_crc32c(data, at, 64 << 10)
    at, end = 1 << 20, min(len(data), (1 << 20) + 4096 * MOST_LOG_SECTORS)
    while at < end:
        if data[at : at + 4] == b"loge":
            length = int.from_bytes(data[at + 8 : at + 12], "little")
            if 4096 <= length <= 1 << 18 and at + length <= len(data):
                _mend_crc32c(data, at, length)
        at += 4096


def mend_gpt(data: bytearray) -> None:
    """GPT: the header and the partition array it points to, primary and backup."""
    for sector in (512, 4096):
        for at in (sector, len(data) - sector):
            if at > 0 and data[at : at + 8] == b"EFI PART":
                _mend_gpt_header(data, at, sector)


def _mend_gpt_header(data: bytearray, at: int, sector: int) -> None:
    if len(data) < at + 92:
        return
    first, count, size = struct.unpack_from("<QII", data, at + 72)
    length = count * size
    if length <= 1 << 20 and first * sector + length <= len(data):
        crc = zlib.crc32(data[first * sector : first * sector + length])
        data[at + 88 : at + 92] = crc.to_bytes(4, "little")
    header = int.from_bytes(data[at + 12 : at + 16], "little")
    if 92 <= header <= sector and at + header <= len(data):
        data[at + 16 : at + 20] = bytes(4)
        crc = zlib.crc32(data[at : at + header])
        data[at + 16 : at + 20] = crc.to_bytes(4, "little")


def mend_tar(data: bytearray) -> None:
    """tar: the byte sum of each header, following the sizes as far as they make sense."""
    at = 0
    while at + SECTOR <= len(data) and any(data[at : at + SECTOR]):
        data[at + 148 : at + 156] = b" " * 8
        total = sum(data[at : at + SECTOR])
        data[at + 148 : at + 156] = b"%06o\0 " % total
        try:
            size = int(bytes(data[at + 124 : at + 136]).strip(b"\0 ") or b"0", 8)
        except ValueError:
            return
        at += SECTOR + -(-size // SECTOR) * SECTOR


def mend_xz(data: bytearray) -> None:
    """xz: stream header, block header, index and footer of the last stream."""
    if data[:6] == b"\xfd7zXZ\0" and len(data) > 24:
        data[8:12] = zlib.crc32(data[6:8]).to_bytes(4, "little")
        length = (data[12] + 1) * 4
        if data[12] and 12 + length <= len(data):
            _put_crc(data, 12, length - 4)
    if len(data) >= 24 and data[-2:] == b"YZ":
        _put_crc(data, len(data) - 8, 6, at=len(data) - 12)
        backward = (int.from_bytes(data[-8:-4], "little") + 1) * 4
        start = len(data) - 12 - backward
        if start >= 12 and backward >= 8:
            _put_crc(data, start, backward - 4)


def _put_crc(data: bytearray, start: int, length: int, at: int | None = None) -> None:
    place = start + length if at is None else at
    crc = zlib.crc32(data[start : start + length])
    data[place : place + 4] = crc.to_bytes(4, "little")
