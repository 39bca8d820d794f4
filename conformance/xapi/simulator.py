"""Starting the simulator, and its control as methods."""

import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from conformance.process import PROJECT

__all__ = ["Simulator"]

READY_S = 30
STOP_S = 10


class Simulator:
    """A pool, from ``with`` to the end of the block.

    Attributes:
        addresses: of the hosts, the master first.
        port: of HTTPS, at each of them.
        fingerprints: of their certificates, SHA-256 in hexadecimal.
        certificates: PEM files.
    """

    addresses: list[str]
    port: int
    fingerprints: list[str]
    certificates: list[str]

    def __init__(self, directory: Path, *, hosts: int = 1, insecure_nbd: bool = False) -> None:
        """``directory`` is for its certificates and its socket; its path is short."""
        directory.mkdir(exist_ok=True)
        words = ["--directory", str(directory), "--hosts", str(hosts)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "conformance.xapi", *words]
            + (["--insecure-nbd"] if insecure_nbd else []),
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(READY_S)
            raise RuntimeError(f"the simulator ended with {self._process.returncode}")
        ready = json.loads(line)
        self.addresses, self.port = ready["addresses"], ready["port"]
        self.fingerprints, self.certificates = ready["fingerprints"], ready["certificates"]
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(READY_S)
        self._socket.connect(ready["control"])
        self._lines = self._socket.makefile("rwb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._socket.close()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    @property
    def address(self) -> str:
        """HOST:PORT of the master."""
        return f"{self.addresses[0]}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """How nbdsrv gets in."""
        return {
            "NBDSRV_XAPI_PASSWORD": "secret",
            "NBDSRV_XAPI_FINGERPRINT": ",".join(self.fingerprints),
        }

    def do(self, verb: str, **order: Any) -> Any:
        """One order; see ``control``.

        Raises:
            RuntimeError: it could not be done.
        """
        self._lines.write(json.dumps({"do": verb, **order}).encode() + b"\n")
        self._lines.flush()
        answer = json.loads(self._lines.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]

    def write(self, vdi: str, offset: int, data: bytes) -> None:
        """As the guest does."""
        self.do("write", vdi=vdi, offset=offset, data=base64.b64encode(data).decode())

    def content(self, vdi: str) -> bytes:
        """Of a disk now."""
        return base64.b64decode(self.do("content", vdi=vdi))

    def archived(self, snapshot: str) -> bytes:
        """Of a snapshot at its moment."""
        return base64.b64decode(self.do("archived", vdi=snapshot))
