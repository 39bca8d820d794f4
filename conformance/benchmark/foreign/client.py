"""A client that asks one named export for small reads, one at a time.

::

    client  EXPORT_NAME ── size, flags, 124 zeroes ──> READ 4096 ── simple reply ──> ...

Plain sockets and constants of its own, so that our code is not on both sides (proto.md, "Simple
reply message").
"""

import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

from conformance.benchmark.report import BenchmarkError

__all__ = ["Reader"]

TIMEOUT_S = 60.0
_GREETING = struct.Struct(">8s8sH")
_CHOICE = struct.Struct(">I8sII")
_EXPORT = struct.Struct(">QH124x")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_EXPORT_NAME = 1
_FIXED = 1


class Reader:
    """A connection to one export; a context manager.

    Attributes:
        size: of the export, bytes.
    """

    def __init__(self, path: Path, export: str) -> None:
        """Connect to a Unix socket and open the export.

        Raises:
            BenchmarkError: the server refuses.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(TIMEOUT_S)
        try:
            self._socket.connect(str(path))
            self._exactly(_GREETING.size)
            name = export.encode()
            choice = _CHOICE.pack(_FIXED, b"IHAVEOPT", _EXPORT_NAME, len(name))
            self._socket.sendall(choice + name)
            self.size = int(_EXPORT.unpack(self._exactly(_EXPORT.size))[0])
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def read(self, offset: int, length: int) -> bytes:
        """These bytes.

        Raises:
            BenchmarkError: the server answers with an error.
        """
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, 0, 7, offset, length))
        magic, error, _ = _REPLY.unpack(self._exactly(_REPLY.size))
        if magic != _REPLY_MAGIC or error:
            raise BenchmarkError(f"reading {length} bytes at {offset}: error {error}")
        return self._exactly(length)

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = self._socket.recv(length - len(data))
            if not part:
                raise BenchmarkError("the server hung up")
            data += part
        return bytes(data)
