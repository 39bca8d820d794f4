"""Inflating gzip from some place on, member after member.

::

    file   |member ......................|member ..|member ....|00 00 00
                 ^ position                                     padding, and nothing else
                 state, or None where a member begins

Facts: RFC 1952; zeroes behind the last member are padding (gzip's manual).
"""

import zlib
from typing import TYPE_CHECKING

from nbdsrv.formats.image_file import ImageFile

if TYPE_CHECKING:
    from zlib import _Decompress

__all__ = ["Inflater"]

PIECE = 16 << 10
"""Bytes of the file inflated at a time; deflate makes at most 1032 times as much of them."""
MAX_PADDING = 64 << 20
"""Bytes of zeroes behind the last member; tapes and devices leave some."""
GZIP_MAGIC = b"\x1f\x8b"


class Inflater:
    """Inflating from somewhere on, across members.

    Attributes:
        offset: bytes of the disk before what comes next.
        position: bytes of the file that have been taken.
        between_members: is nothing of a member under way?
    """

    def __init__(
        self, file: ImageFile, offset: int, position: int, state: "_Decompress | None"
    ) -> None:
        self._file = file
        self.offset = offset
        self.position = position
        self.between_members = state is None
        self._state = zlib.decompressobj(31) if state is None else state.copy()
        self._left = b""

    def copy_state(self) -> "_Decompress | None":
        """To start from here again."""
        return None if self.between_members else self._state.copy()

    def more(self, limit: int = 0) -> bytes:
        """What the next piece of the file holds, at most ``limit`` bytes if not 0; maybe none."""
        at = self.position - len(self._left)
        data = self._left or self._file.read_up_to(self.position, PIECE)
        if not data:
            raise self._file.corrupt(at, "the file ends within a gzip member")
        if not self._left:
            self.position += len(data)
        try:
            found = self._state.decompress(data, limit)
        except zlib.error as error:
            raise self._file.corrupt(at, _what(error)) from error
        self._left = self._state.unconsumed_tail
        self.between_members = self._state.eof
        if self._state.eof:
            self.position -= len(self._state.unused_data)
            self._state, self._left = zlib.decompressobj(31), b""
        self.offset += len(found)
        return found

    def at_end(self) -> bool:
        """Between members: is there none to come? Only zeroes may follow the last one."""
        data, at = self._file.read_up_to(self.position, PIECE), self.position
        if not data:
            return bool(at)
        if not at or data.startswith(GZIP_MAGIC):
            return False
        while data:
            if data.strip(b"\0") or at - self.position > MAX_PADDING:
                raise self._file.corrupt(at, "something that is no gzip member")
            at += len(data)
            data = self._file.read_up_to(at, PIECE)
        return True


def _what(error: zlib.error) -> str:
    """What zlib says, without its numbers."""
    return f"the gzip stream is broken: {str(error).rpartition(': ')[2]}"
