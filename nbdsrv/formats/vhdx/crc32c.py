"""CRC-32C (Castagnoli), eight bytes at a time, and only the zlib kind is in the library.

::

    8 bytes   b0 b1 b2 b3 b4 b5 b6 b7          ("slicing by eight")
              |  |  |  |  |  |  |  |
    tables    t7 t6 t5 t4 t3 t2 t1 t0          tk: the CRC of a byte with k zero bytes behind it
              '--'--'--'--xor-'--'--'--> crc

Some 30 MB/s: enough for 64 KiB of tables and a log.
"""

import struct

__all__ = ["crc32c"]

_POLYNOMIAL = 0x82F63B78


def _tables() -> list[list[int]]:
    first = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        first.append(crc)
    tables = [first]
    for _ in range(7):
        tables.append([first[crc & 0xFF] ^ crc >> 8 for crc in tables[-1]])
    return tables


_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7 = _tables()


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """The CRC of ``data``, or of what ``crc`` is of and ``data`` behind it."""
    t0, t1, t2, t3, t4, t5, t6, t7 = _T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7
    crc ^= 0xFFFFFFFF
    whole = len(data) // 8 * 8
    view = memoryview(data)
    for low, high in struct.iter_unpack("<II", view[:whole]):
        crc ^= low
        crc = (
            t7[crc & 0xFF]
            ^ t6[crc >> 8 & 0xFF]
            ^ t5[crc >> 16 & 0xFF]
            ^ t4[crc >> 24]
            ^ t3[high & 0xFF]
            ^ t2[high >> 8 & 0xFF]
            ^ t1[high >> 16 & 0xFF]
            ^ t0[high >> 24]
        )
    for byte in view[whole:]:
        crc = t0[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
