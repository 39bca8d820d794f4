"""Compressed raw images, in every way that decides how they can be read in the middle; and bombs.

A bomb unpacks to ``BOMB`` bytes of zeroes: more than any reader may have in memory at once.
"""

import gzip
import io
import lzma
import zlib
from pathlib import Path

import zstandard

from conformance.fuzz.mending import mend_xz
from conformance.fuzz.specimen import MIB, Mend, Specimen, guest_content

__all__ = ["BOMB", "gzip_images", "xz_images", "zstd_images"]

BOMB = 384 * MIB
SIZE = 700_333
PIECE = 100_000


def _made(
    form: str, label: str, data: bytes, content: bytes | None, mend: Mend | None = None
) -> Specimen:
    name = f"disk.{form}"
    return Specimen(
        form, label, {name: data}, f"{form}:{{}}/{name}", content, mend, bomb=label == "bomb"
    )


def _pieces(content: bytes) -> list[bytes]:
    return [content[at : at + PIECE] for at in range(0, len(content), PIECE)]


def gzip_images(directory: Path) -> list[Specimen]:
    """One member, many members, blocked (BGZF), with all header fields, a bomb."""
    del directory
    content = guest_content(SIZE)
    named = io.BytesIO()
    with gzip.GzipFile("a name.img", "wb", fileobj=named, mtime=1) as file:
        file.write(content)
    one = gzip.compress(content, 6)
    fields = b"\x1f\x8b\x08\x1e\0\0\0\0\0\x03" + b"\x04\0AB\0\0" + b"name\0" + b"comment\0"
    fields += (zlib.crc32(fields) & 0xFFFF).to_bytes(2, "little")
    return [
        _made("gzip", "one member", one, content),
        _made("gzip", "named", named.getvalue(), content),
        _made("gzip", "all fields", fields + one[10:], content),
        _made("gzip", "members", b"".join(map(gzip.compress, _pieces(content))), content),
        _made("gzip", "bgzf", _bgzf(content), content),
        _made("gzip", "bomb", _gzip_bomb(), None),
    ]


def _bgzf(content: bytes) -> bytes:
    out = bytearray()
    for piece in [*(content[at : at + 60_000] for at in range(0, len(content), 60_000)), b""]:
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        data = packer.compress(piece) + packer.flush()
        out += b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0"
        out += (len(data) + 25).to_bytes(2, "little") + data
        out += zlib.crc32(piece).to_bytes(4, "little") + len(piece).to_bytes(4, "little")
    return bytes(out)


def _gzip_bomb() -> bytes:
    """One member made of the same full-flushed block again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeroes = bytes(MIB)
    packer.compress(zeroes)
    packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(zeroes) + packer.flush(zlib.Z_FULL_FLUSH)
    last = packer.flush()
    crc = 0
    for _ in range(BOMB // MIB):
        crc = zlib.crc32(zeroes, crc)
    tail = crc.to_bytes(4, "little") + BOMB.to_bytes(4, "little")
    return b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + block * (BOMB // MIB) + last + tail


def xz_images(directory: Path) -> list[Specimen]:
    """One block with each check, many streams, filters, a large dictionary claimed, a bomb."""
    del directory
    content = guest_content(SIZE)
    checks = {"crc64": lzma.CHECK_CRC64, "crc32": lzma.CHECK_CRC32, "sha256": lzma.CHECK_SHA256}
    made = [
        _made("xz", label, lzma.compress(content, check=check, preset=1), content, mend_xz)
        for label, check in checks.items()
    ]
    streams = b"".join(lzma.compress(piece, preset=1) + bytes(4) for piece in _pieces(content))
    made.append(_made("xz", "streams", streams, content, mend_xz))
    filters = [
        {"id": lzma.FILTER_DELTA, "dist": 4},
        {"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 64 * MIB},
    ]
    filtered = lzma.compress(content, filters=filters)
    made.append(_made("xz", "filters", filtered, content, mend_xz))
    made.append(_made("xz", "bomb", _xz_bomb(), None))
    return made


def _xz_bomb() -> bytes:
    """One block: packing so much takes seconds, so it is less than the others, yet enough."""
    packer = lzma.LZMACompressor(preset=0)
    zeroes = bytes(MIB)
    return b"".join(packer.compress(zeroes) for _ in range(330)) + packer.flush()


def zstd_images(directory: Path) -> list[Specimen]:
    """One frame, with its size and without; many; the seekable format; skippable ones; a bomb."""
    del directory
    content = guest_content(SIZE)
    plain = zstandard.ZstdCompressor(write_checksum=True)
    streaming = zstandard.ZstdCompressor(level=1)
    unsized = streaming.compressobj()
    frames = [plain.compress(piece) for piece in _pieces(content)]
    skippable = b"\x50\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"ignored"
    return [
        _made("zstd", "one frame", plain.compress(content), content),
        _made("zstd", "unsized", unsized.compress(content) + unsized.flush(), content),
        _made("zstd", "frames", b"".join(frames), content),
        _made("zstd", "seekable", _seekable(frames, _pieces(content)), content),
        _made("zstd", "skippable", skippable.join([*frames, b""]), content),
        _made("zstd", "bomb", _zstd_bomb(), None),
    ]


def _seekable(frames: list[bytes], pieces: list[bytes]) -> bytes:
    table = b"".join(
        len(frame).to_bytes(4, "little") + len(piece).to_bytes(4, "little")
        for frame, piece in zip(frames, pieces, strict=True)
    )
    table += len(frames).to_bytes(4, "little") + b"\0" + (0x8F92EAB1).to_bytes(4, "little")
    head = (0x184D2A5E).to_bytes(4, "little") + len(table).to_bytes(4, "little")
    return b"".join(frames) + head + table


def _zstd_bomb() -> bytes:
    packer = zstandard.ZstdCompressor(level=1).compressobj(size=BOMB)
    zeroes = bytes(MIB)
    return b"".join(packer.compress(zeroes) for _ in range(BOMB // MIB)) + packer.flush()
