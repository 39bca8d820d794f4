"""Asking a running server by its admin socket."""

import os
import socket
from collections.abc import Mapping
from typing import Any, Self

import msgspec

from nbdsrv.errors import ConfigError, DiskError
from nbdsrv.ops.runtime import ADMIN_SOCKET, runtime_directories

__all__ = ["AdminClient", "find_socket"]

VARIABLE = "NBDSRV_ADMIN_SOCKET"
MAX_ANSWER = 256 << 20
"""Bytes of an answer: half a million clients."""


def find_socket(given: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """Where the server listens for us: as given, or in one of the usual places.

    Raises:
        ConfigError: nowhere.
    """
    if given or (given := environ.get(VARIABLE)):
        return given
    places = [os.path.join(each, ADMIN_SOCKET) for each in runtime_directories(environ)]
    for place in places:
        if os.path.exists(place):
            return place
    looked = ", ".join(places)
    raise ConfigError(f"no server has its admin socket at {looked}; say with --socket where it is")


class AdminClient:
    """One connection. A context manager; blocking."""

    def __init__(self, path: str, timeout_s: float = 30.0) -> None:
        """Connect.

        Raises:
            DiskError: nobody answers there.
        """
        self._path = path
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(timeout_s)
        self._received = b""
        try:
            self._sock.connect(path)
        except (OSError, ValueError) as error:
            self._sock.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise DiskError(f"admin socket {path}: {reason}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def ask(self, command: str, **more: int) -> Any:
        """The result of a command.

        Raises:
            ConfigError: the server says that a configuration is wrong.
            DiskError: it says no, or says nothing in time.
        """
        try:
            self._sock.sendall(msgspec.json.encode({"command": command} | more) + b"\n")
            answer = msgspec.json.decode(self._line())
            if answer["ok"]:
                return answer["result"]
            reason, code = str(answer["error"]), answer.get("code")
        except TimeoutError as error:
            raise DiskError(f"admin socket {self._path}: no answer in time") from error
        except OSError as error:
            raise DiskError(f"admin socket {self._path}: {error.strerror or error}") from error
        except (msgspec.DecodeError, LookupError, TypeError) as error:
            raise DiskError(f"admin socket {self._path}: this is no nbdsrv") from error
        raise ConfigError(reason) if code == 2 else DiskError(reason)

    def _line(self) -> bytes:
        pieces = [self._received]
        size = len(self._received)
        while b"\n" not in pieces[-1]:
            piece = self._sock.recv(1 << 18)
            if not piece:
                raise ConnectionError("the server hung up; is it another user's?")
            pieces.append(piece)
            size += len(piece)
            if size > MAX_ANSWER:
                raise ConnectionError(f"an answer of more than {MAX_ANSWER} bytes")
        line, _, self._received = b"".join(pieces).partition(b"\n")
        return line
