"""The members of a tar archive: where each lies, without unpacking anything.

::

    | header | content ......... pad | header | content . pad | 0 | 0 |      units of 512 bytes
               ^ position, size

Understood: POSIX ustar, pax (``path``, ``size``) and GNU (``L`` long names, sizes in base 256, for
members of 8 GiB and more). Only regular files are members; directories, links and devices have
no content and are passed over.

Facts relied on: IEEE Std 1003.1 "pax", and GNU tar's manual, "Basic Tar Format".

``struct`` and not construct describes the header: an XVA has two of them for each MiB of disk.
"""

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.image_file import ImageFile

__all__ = ["MAX_MEMBERS", "Member", "walk"]

UNIT = 512
"""Headers and contents begin on multiples of this."""
MAX_MEMBERS = 1 << 26
"""Headers looked at: 32 TiB of XVA, which has two for each MiB."""
MAX_EXTENSION = 1 << 20
"""Bytes of a pax header or a long name; paths are at most 4 KiB."""
MAX_PAX_RECORDS = 1 << 12
"""Records in one pax header; a dozen is usual."""

_HEADER = Struct("100s 24x 12s 12x 8s c 100x 6s 2x 80x 155s 12x")
_CHECKSUM = slice(148, 156)
_REGULAR = frozenset((b"0", b"\0", b"7"))
_LINKS_DEVICES_DIRECTORIES = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
_LONG_NAME, _LONG_LINK = b"L", b"K"
_PAX, _PAX_GLOBAL = b"x", b"g"
_GNU_SPARSE = b"S"


class Member(NamedTuple):
    """A regular file in the archive.

    Attributes:
        name: as the archive says, unprintable characters escaped.
        position: of its content in the archive, bytes.
        size: bytes; all of them lie within the archive.
    """

    name: str
    position: int
    size: int


def walk(file: ImageFile, limit: int = MAX_MEMBERS) -> Iterator[Member]:
    """The archive's regular files in order, read as they are asked for. Blocking.

    Args:
        file: the archive.
        limit: headers to look at before giving up.

    Raises:
        CorruptImage: a broken header, or the archive ends within a member.
        UnsupportedImage: a sparse member, whose content does not lie there as it is.
    """
    at = 0
    name, size = "", -1  # what an extension says of the header behind it
    for _ in range(limit):
        if at + UNIT > file.size:
            return
        header = file.read(at, UNIT, "tar header")
        if not any(header):
            return
        short_name, digits, checksum, kind, magic, prefix = _HEADER.unpack(header)
        _check_sum(file, at, header, checksum)
        stored = _number(file, at, digits, "size")
        content = at + UNIT
        if kind == _LONG_NAME:
            name = _text(_extension(file, content, stored).rstrip(b"\0"))
        elif kind == _PAX:
            pax_name, size = _pax(file, content, stored)
            name = pax_name or name
        elif kind not in {_LONG_LINK, _PAX_GLOBAL}:
            stored = stored if size < 0 else size
            full_name = name or _ustar_name(short_name, magic, prefix)
            name, size = "", -1
            if kind == _GNU_SPARSE:
                raise _sparse(file, full_name)
            if kind in _LINKS_DEVICES_DIRECTORIES:
                stored = 0
            if content + stored > file.size:
                raise file.corrupt(at, f"member {full_name} of {stored} bytes reaches past the end")
            if kind in _REGULAR:
                yield Member(full_name, content, stored)
        at = content + -(-stored // UNIT) * UNIT
    raise file.corrupt(at, f"more than {limit} members in the archive")


def _check_sum(file: ImageFile, at: int, header: bytes, checksum: bytes) -> None:
    """The sum of all bytes, those of the sum itself taken as blanks."""
    rest = header[: _CHECKSUM.start] + b" " * 8 + header[_CHECKSUM.stop :]
    expected = _number(file, at, checksum, "checksum")
    found = sum(rest)
    # Some historic programs summed signed characters.
    if expected not in {found, found - 256 * sum(byte > 127 for byte in rest)}:
        raise file.corrupt(at, f"tar header with checksum {expected}, its bytes sum to {found}")


def _number(file: ImageFile, at: int, field: bytes, what: str) -> int:
    """Octal digits, or base 256 behind a byte of 0x80 (GNU, for 8 GiB and more)."""
    if field[0] & 0x80:
        number = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40 or number >= 1 << 63:
            raise file.corrupt(at, f"tar header with an impossible {what}")
        return number
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise file.corrupt(at, f"tar header whose {what} is {digits!r}")
    return int(digits or b"0", 8)


def _ustar_name(name: bytes, magic: bytes, prefix: bytes) -> str:
    name = name.partition(b"\0")[0]
    prefix = prefix.partition(b"\0")[0] if magic == b"ustar\0" else b""  # GNU: other fields there
    return _text(prefix + b"/" + name if prefix else name)


def _extension(file: ImageFile, position: int, length: int) -> bytes:
    if length > MAX_EXTENSION:
        raise file.corrupt(position, f"an extended tar header of {length} bytes")
    return file.read(position, length, "extended tar header")


def _pax(file: ImageFile, position: int, length: int) -> tuple[str, int]:
    """``path`` and ``size`` from lines of ``LENGTH KEY=VALUE``; "" and -1 where there is none."""
    data = _extension(file, position, length)
    name, size, at = "", -1, 0
    for _ in range(MAX_PAX_RECORDS):
        if at >= len(data):
            return name, size
        digits = data[at : at + 8].partition(b" ")[0]
        end = at + int(digits) if digits.isdigit() else -1
        key, mark, value = data[at + len(digits) + 1 : end - 1].partition(b"=")
        if not mark or end > len(data) or data[end - 1 : end] != b"\n":
            raise file.corrupt(position + at, "a broken record in a pax header")
        if key.startswith(b"GNU.sparse."):
            raise _sparse(file, name)
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise file.corrupt(position + at, "a pax header with an impossible size")
            size = int(value)
        at = end
    raise file.corrupt(position, f"more than {MAX_PAX_RECORDS} records in a pax header")


def _text(name: bytes) -> str:
    text = name.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _sparse(file: ImageFile, name: str) -> UnsupportedImage:
    what = f"its member {name} is stored sparse" if name else "it has members stored sparse"
    return UnsupportedImage(f"{file.path}: {what}; pack it again without --sparse")
