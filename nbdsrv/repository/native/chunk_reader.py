"""Reading chunks to serve them: the short way, and the long one where that fails.

::

    short   a plain pack that is a file here     pread table, pread frame ── check ──> content
            any other                            fetch, decrypt ── table ── check ──> content
    long    ``vault.chunk``                      fetch, decrypt, all of it ── id ──> content
                                                 from another pack, if this one is damaged

The short way proves the frames it gives; the long one also proves the chunk's id, and knows how to
tell what is wrong. Tables are remembered: who reads a chunk once is likely to read it again.
"""

import os
import threading
from collections import OrderedDict

from nbdsrv.disk.residency import Residency, inline_flags
from nbdsrv.errors import DiskError
from nbdsrv.repository.native.entry import ENTRY_SIZE, Kind, Place, check_entry
from nbdsrv.repository.native.frames import (
    FRAME,
    Frame,
    expand_frames,
    frame_table,
    open_frame,
    table_size,
)
from nbdsrv.repository.native.layout import pack_key
from nbdsrv.repository.native.sealing import BrokenPayload, Codec
from nbdsrv.repository.native.vault import Vault

__all__ = ["ChunkReader"]

MAX_FILES = 256
"""Packs kept open: 8 GiB of them, and a quarter of the descriptors a process usually has."""
WORTH_A_HINT = 8 << 10
"""Bytes of a frame, about, from which it does not come along with the table anyway."""
MAX_TABLES = 1 << 13
"""Tables remembered, some 6 MiB."""


class _PackFile:
    """An open pack. Closed when nobody uses it any more, in whatever thread."""

    __slots__ = ("fd", "residency")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.residency = Residency(inline_flags(fd))

    def __del__(self) -> None:
        os.close(self.fd)


class ChunkReader:
    """The chunks of one repository. Thread-safe; all but ``at_hand`` blocks."""

    def __init__(self, vault: Vault) -> None:
        """``vault`` stays open."""
        self._vault = vault
        self._files: OrderedDict[bytes, _PackFile | None] = OrderedDict()
        self._tables: dict[tuple[bytes, int], list[Frame]] = {}
        self._lock = threading.Lock()

    def chunk(self, id_: bytes, place: Place, length: int) -> bytes:
        """A chunk of ``length`` bytes.

        Raises:
            CorruptImage: it is damaged, and no other pack has it.
            StoreError: the store does not answer.
        """
        if place.codec == Codec.FRAMES:
            try:
                return expand_frames(self._body(id_, place, length), id_, length)
            except (BrokenPayload, DiskError):
                pass  # the long way finds it elsewhere, or tells what is wrong
        content = self._vault.chunk(id_, place, length)
        return content if isinstance(content, bytes) else bytes(content)

    def frame(self, id_: bytes, place: Place, length: int, number: int) -> bytes:
        """One frame of a chunk of ``length`` bytes; of other codecs than frames a part as long.

        Raises:
            CorruptImage: it is damaged, and no other pack has it.
            StoreError: the store does not answer.
        """
        if place.codec == Codec.FRAMES:
            try:
                return self._frame(id_, place, length, number)
            except (BrokenPayload, DiskError, OSError):
                pass
        content = self._vault.chunk(id_, place, length)
        return bytes(memoryview(content)[number * FRAME : (number + 1) * FRAME])

    def at_hand(self, id_: bytes, place: Place, length: int, number: int) -> bool:
        """Would ``frame`` find all it needs in memory? For the loop; never blocks."""
        file = self._files.get(place.pack)
        if file is None or place.codec != Codec.FRAMES:
            return False
        key = (place.pack, place.offset)
        table = self._tables.get(key)
        resident = file.residency.resident
        if table is None:
            if not resident(file.fd, place.offset, ENTRY_SIZE + table_size(length)):
                return False
            try:
                table = self._remember(key, self._table(file, id_, place, length))
            except (BrokenPayload, OSError):
                return False  # whoever reads it is told
        frame = table[number]
        return resident(file.fd, place.offset + ENTRY_SIZE + frame.position, frame.clen)

    def close(self) -> None:
        """Close the packs that nobody is reading."""
        self._files.clear()
        self._tables.clear()

    def _frame(self, id_: bytes, place: Place, length: int, number: int) -> bytes:
        file = self._file(place.pack)
        if file is None:
            body = memoryview(self._body(id_, place, length))
            frame = frame_table(body, id_, length, len(body))[number]
            return open_frame(frame, body[frame.position : frame.position + frame.clen])
        key = (place.pack, place.offset)
        table = self._tables.get(key)
        if table is None:
            # Where the frame is likely to lie: on its way while the table is read.
            likely = place.length * number * FRAME // length
            share = place.length * FRAME // length
            if share >= WORTH_A_HINT:
                start = place.offset + likely - share // 8
                os.posix_fadvise(file.fd, start, share + share // 4, os.POSIX_FADV_WILLNEED)
            table = self._remember(key, self._table(file, id_, place, length))
        frame = table[number]
        data = os.pread(file.fd, frame.clen, place.offset + ENTRY_SIZE + frame.position)
        if len(data) != frame.clen:
            raise BrokenPayload("the pack ends within it")
        return open_frame(frame, data)

    def _remember(self, key: tuple[bytes, int], table: list[Frame]) -> list[Frame]:
        if len(self._tables) >= MAX_TABLES:
            self._tables.clear()
        self._tables[key] = table
        return table

    def _table(self, file: _PackFile, id_: bytes, place: Place, length: int) -> list[Frame]:
        size = ENTRY_SIZE + table_size(length)
        head = os.pread(file.fd, size, place.offset)
        check_entry(head, id_, Kind.CHUNK, length, place.length)
        return frame_table(head[ENTRY_SIZE:], id_, length, place.length)

    def _body(self, id_: bytes, place: Place, length: int) -> "bytes | bytearray | memoryview":
        """All of a chunk as it is stored, decrypted."""
        file = self._file(place.pack)
        if file is None:
            return self._vault.entries.body_there(Kind.CHUNK, id_, place, length)
        size = ENTRY_SIZE + place.length
        data = memoryview(os.pread(file.fd, size, place.offset))
        if len(data) != size:
            raise BrokenPayload("the pack ends within it")
        check_entry(data, id_, Kind.CHUNK, length, place.length)
        return data[ENTRY_SIZE:]

    def _file(self, pack: bytes) -> _PackFile | None:
        """The pack if it is a file here that is not encrypted."""
        files = self._files
        try:
            file = files[pack]
            files.move_to_end(pack)
            return file
        except KeyError:
            pass
        file = None
        if self._vault.sealing.id_key is None:
            fd = self._vault.store.open_file(pack_key(pack))
            file = None if fd is None else _PackFile(fd)
        with self._lock:
            files[pack] = file
            while len(files) > MAX_FILES:
                files.popitem(last=False)
        return file
