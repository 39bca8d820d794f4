"""What has become of blocks since the last flush, for whoever goes on when this process is killed.

::

    recent   header | state of block 0 | state of block 1 | ...      a byte each, sparse; 0: nothing
             magic, boot id, overlay's id                            new since the map was written

A write that was answered and not flushed may be lost when the power fails, and must not be when
only the server dies: its bytes are in the kernel's page cache, its client connects again, and takes
what was answered for written. QEMU then sends a FLUSH alone, and believes it. So a state is
written down here, without a sync, before the change is answered.

It counts only while the kernel runs that has these pages: the boot id tells. After a power cut it
may say that bytes are in the data file which never got to the disk, and is forgotten. Where the
boot id is hidden (systemd's ``ProcSubset=pid``) it never counts, and the log says so.

Rule: everything here blocks; any thread may call ``mark``.
"""

import contextlib
import errno as os_errno
import logging
import os
import re
import threading
from collections.abc import Sequence
from struct import Struct

from nbdsrv.overlay.block_map import BLOCK_BITS, PAGE_BITS
from nbdsrv.overlay.journal import Record
from nbdsrv.overlay.states import DATA, ZERO

__all__ = ["RECENT_NAME", "Recent", "boot_id"]

log = logging.getLogger(__name__)

RECENT_NAME = "recent"
BOOT_ID = "/proc/sys/kernel/random/boot_id"
MAGIC = b"NBDRECNT"
_HEADER = Struct("<8s36s16s")
MARKS_AT = 4096
"""Where the bytes of the blocks begin."""
PIECE = 1 << 20
MAX_KNOWN = 512
"""Pages (64 MiB of the disk) of which it is remembered what was marked last: 8 MiB of memory."""

_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_PAGE_BLOCKS = 1 << PAGE_BITS - BLOCK_BITS
_STRETCH = re.compile(b"\x01+|\x02+")
_BYTES = {state: bytes([state]) * _PAGE_BLOCKS for state in (DATA, ZERO)}


def boot_id() -> bytes:
    """Of the running kernel, 36 letters; empty where that is not told."""
    try:
        with open(BOOT_ID, "rb") as file:
            found = file.read(64).strip()
    except OSError:
        return b""
    return found if len(found) == 36 else b""


class Recent:
    """The file, open; made when something is marked: on a full disk there is much to read still."""

    def __init__(self, directory: int, id_: bytes, size: int) -> None:
        """Open it, if it is there.

        Args:
            directory: of the overlay, open.
            id_: of the overlay, 16 bytes.
            size: of the disk.

        Raises:
            OSError: it cannot be opened.
        """
        self._directory = directory
        self._blocks = -(-size >> BLOCK_BITS)
        self._known: dict[int, bytearray] = {}
        self._making = threading.Lock()
        self._fd = -1
        boot = boot_id()
        if not boot:
            text = "what is not flushed is lost when the server is killed"
            log.warning("overlay.no_boot_id file=%s; %s", BOOT_ID, text)
        self._header = _HEADER.pack(MAGIC, boot, id_)
        self._counts = self._made = False
        try:
            self._fd = os.open(RECENT_NAME, _FLAGS, dir_fd=directory)
        except FileNotFoundError:
            return
        try:
            found = os.pread(self._fd, _HEADER.size, 0)
            self._counts = self._made = bool(boot) and found == self._header
            if not self._counts:
                os.ftruncate(self._fd, 0)
        except BaseException:
            os.close(self._fd)
            raise

    def told(self) -> Sequence[Record]:
        """What a process that was killed has left: first block, end, state. Raises OSError."""
        if not self._counts:
            return []
        found: list[Record] = []
        at, end = MARKS_AT, MARKS_AT + self._blocks
        while at < end:
            try:
                at = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == os_errno.ENXIO:  # there is nothing more
                    break
                # Otherwise holes are not told here, and all of it is looked at.
            data = os.pread(self._fd, min(PIECE, end - at), at)
            if not data:
                break
            for match in _STRETCH.finditer(data):
                first = at - MARKS_AT + match.start()
                found.append((first, first + len(match[0]), match[0][0]))
            at += len(data)
        return found

    def mark(self, first: int, end: int, state: int) -> None:
        """Blocks have this state now: DATA or ZERO. Raises OSError."""
        if not self._made:
            self._make()
        while first < end:
            page, at = divmod(first, _PAGE_BLOCKS)
            count = min(end - first, _PAGE_BLOCKS - at)
            marks = _BYTES[state][:count]
            known = self._known.get(page)
            if known is None:
                if len(self._known) >= MAX_KNOWN:
                    self._known.clear()
                known = self._known.setdefault(page, bytearray(_PAGE_BLOCKS))
            if known[at : at + count] != marks:
                _write(self._fd, marks, MARKS_AT + first)
                known[at : at + count] = marks
            first += count

    def _make(self) -> None:
        with self._making:
            if self._made:
                return
            if self._fd < 0:
                flags = _FLAGS | os.O_CREAT
                self._fd = os.open(RECENT_NAME, flags, 0o600, dir_fd=self._directory)
            _write(self._fd, self._header, 0)
            self._made = True

    def forget(self) -> None:
        """All of it is in the map, durably, and nothing changes any more. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(RECENT_NAME, dir_fd=self._directory)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _write(fd: int, data: bytes, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], position + done)
