"""Reading chunks to serve them: the short way, and the long one where that fails.

::

    short   a pack that is a file here     pread of the frame ── opened, check ──> content
            any other                      fetch of the frame ── opened, check ──> content
            of what was repacked           the same, where the index says
    long    ``vault.chunk``                fetch, all of it ── opened ── id ──> content
                                           from another pack, if this one is damaged

The map's slot says where each frame lies, so the short way is one read, encrypted or not. It proves
the frames it gives; the long one also proves the chunk's id, and knows how to tell what is wrong.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import suppress

from nbdsrv.disk.residency import Residency, Stored, inline_flags
from nbdsrv.errors import DiskError
from nbdsrv.repository.native.entry import ENTRY_SIZE, Place
from nbdsrv.repository.native.frames import (
    FRAME,
    expand_frames,
    frame_span,
    is_raw,
    open_frame,
)
from nbdsrv.repository.native.layout import pack_key
from nbdsrv.repository.native.sealing import BrokenPayload, Codec, Seal
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.store import ObjectMissing

__all__ = ["ChunkReader"]

MAX_FILES = 256
"""Packs kept open: 8 GiB of them, and a quarter of the descriptors a process usually has."""

MAX_PREPARED = 64
"""Packs of one disk opened in advance: 2 GiB of them, some 2 ms."""
_spare = threading.Semaphore(128)
"""Descriptors a process may take in advance; a server has 256 beside those of its clients."""


class _PackFile:
    """An open pack. Closed when nobody uses it any more, in whatever thread."""

    __slots__ = ("fd", "residency", "seal")

    def __init__(self, fd: int, seal: Seal, inline: int) -> None:
        self.fd = fd
        self.seal = seal
        self.residency = Residency(inline)

    def __del__(self) -> None:
        os.close(self.fd)


class ChunkReader:
    """The chunks of one repository. Thread-safe; all but ``stored`` blocks."""

    def __init__(self, vault: Vault) -> None:
        """``vault`` stays open."""
        self._vault = vault
        self._gone: set[bytes] = set()
        self._files: OrderedDict[bytes, _PackFile | None] = OrderedDict()
        self._lock = threading.Lock()
        self._inline: int | None = None
        self._prepared = 0

    def chunk(self, id_: bytes, place: Place, length: int) -> bytes:
        """A chunk of ``length`` bytes.

        Raises:
            CorruptImage: it is damaged, and no other pack has it.
            StoreError: the store does not answer.
        """
        if place.codec == Codec.FRAMES and place.pack not in self._gone:
            try:
                return self._chunk(id_, place, length)
            except ObjectMissing:
                self._gone.add(place.pack)
            except (BrokenPayload, DiskError, OSError):
                pass  # the long way finds it elsewhere, or tells what is wrong
        moved = self._moved(id_, place, lambda there: self._chunk(id_, there, length))
        if moved is not None:
            return moved
        content = self._vault.chunk(id_, place, length)
        return content if isinstance(content, bytes) else bytes(content)

    def frame(self, id_: bytes, place: Place, length: int, number: int) -> bytes:
        """One frame of a chunk of ``length`` bytes; of other codecs than frames a part as long.

        Raises:
            CorruptImage: it is damaged, and no other pack has it.
            StoreError: the store does not answer.
        """
        if place.codec == Codec.FRAMES and place.pack not in self._gone:
            try:
                return self._frame(id_, place, length, number)
            except ObjectMissing:
                self._gone.add(place.pack)
            except (BrokenPayload, DiskError, OSError):
                pass  # the long way finds it elsewhere, or tells what is wrong
        moved = self._moved(id_, place, lambda there: self._frame(id_, there, length, number))
        if moved is not None:
            return moved
        content = self._vault.chunk(id_, place, length)
        return bytes(memoryview(content)[number * FRAME : (number + 1) * FRAME])

    def prepare(self, packs: Collection[bytes]) -> None:
        """Open these packs if they are files here, and few; so that no read has to. Once.

        Never fails: whoever reads is told what is wrong with a pack.
        """
        if len(packs) > MAX_PREPARED:
            return
        with suppress(BrokenPayload, DiskError, OSError):
            for pack in packs:
                if not _spare.acquire(blocking=False):
                    return
                self._prepared += 1
                if self._file(pack) is None:
                    return  # none of them is

    def stored(self, place: Place, length: int, number: int) -> Stored | None:
        """Where all lies that ``frame`` reads, if the pack is open. Never blocks."""
        file = self._files.get(place.pack)
        if file is None or place.codec != Codec.FRAMES:
            return None
        try:
            position, size = frame_span(place.frames, length, number)
        except BrokenPayload:
            return None  # whoever reads it is told
        return file.fd, place.offset + ENTRY_SIZE + position, size, file.residency

    def close(self) -> None:
        """Close the packs that nobody is reading. Idempotent."""
        self._files.clear()
        prepared, self._prepared = self._prepared, 0
        if prepared:
            _spare.release(prepared)

    def _moved(self, id_: bytes, place: Place, read: Callable[[Place], bytes]) -> bytes | None:
        """What ``read`` gives where it has gone; None if only the long way can find it.

        Repacking moves things and maps go on naming the old pack: that it is gone is found out
        once, not for each frame that was in it.
        """
        if place.pack not in self._gone:
            return None
        with suppress(BrokenPayload, DiskError, OSError):
            for there in self._vault.entries.elsewhere(id_):
                if there.codec == Codec.FRAMES and there.pack not in self._gone:
                    try:
                        return read(there)
                    except ObjectMissing:
                        self._gone.add(there.pack)
        return None

    def _frame(self, id_: bytes, place: Place, length: int, number: int) -> bytes:
        file = self._file(place.pack)
        if file is None:
            return self._vault.entries.frame_there(id_, place, length, number)
        position, size = frame_span(place.frames, length, number)
        piece = os.pread(file.fd, size, place.offset + ENTRY_SIZE + position)
        if len(piece) != size:
            raise BrokenPayload("the pack ends within it")
        raw = is_raw(place.frames, number)
        return open_frame(file.seal, place.offset, id_, length, number, piece, raw=raw)

    def _chunk(self, id_: bytes, place: Place, length: int) -> bytes:
        file = self._file(place.pack)
        if file is None:
            return self._vault.entries.chunk_there(id_, place, length)
        payload = os.pread(file.fd, place.length, place.offset + ENTRY_SIZE)
        return expand_frames(place.frames, payload, file.seal, place.offset, id_, length)

    def _file(self, pack: bytes) -> _PackFile | None:
        """The pack if it is a file here.

        Raises:
            BrokenPayload: it is encrypted, and damaged at its beginning.
        """
        files = self._files
        try:
            file = files[pack]
            files.move_to_end(pack)
            return file
        except KeyError:
            pass
        file = None
        fd = self._vault.store.open_file(pack_key(pack))
        if fd is not None:
            try:
                seal = self._vault.entries.seal_of(pack)
                if self._inline is None:  # all packs lie in one file system
                    self._inline = inline_flags(fd)
            except BaseException:
                os.close(fd)
                raise
            file = _PackFile(fd, seal, self._inline)
        with self._lock:
            files[pack] = file
            while len(files) > MAX_FILES:
                files.popitem(last=False)
        return file
