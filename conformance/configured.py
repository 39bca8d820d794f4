"""``nbdsrv serve --config`` as a process, and the commands that look at it while it runs."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conformance.context import Context
from conformance.process import Finished
from conformance.repository import command
from conformance.server import Server, server_command, server_environment

__all__ = ["ConfiguredServer"]


class ConfiguredServer(Server):
    """A service. ``start`` it, or have ``Context`` do so by ``serve_configured``.

    Attributes:
        config: its file.
        admin: its admin socket.
    """

    def __init__(
        self,
        context: Context,
        text: str,
        *,
        lines: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``text`` may say ``@DIR@``, the check's directory; ``lines`` are the URIs expected."""
        super().__init__(
            context.directory,
            sources=[],
            exports={},
            listen=(),
            write=False,
            tls=None,
            environment=environment,
        )
        self._context = context
        self.socket = context.directory / "nbd"
        self.admin = context.directory / "admin"
        self.config = context.directory / "nbdsrv.toml"
        self._expected_lines = lines
        self._command = server_command("--config", self.config)
        self.write(text)

    def write(self, text: str) -> None:
        """Another configuration; nobody is told."""
        new = self.config.with_suffix(".new")
        new.write_text(text.replace("@DIR@", str(self.config.parent)))
        os.replace(new, self.config)

    def begin(self) -> "ConfiguredServer":
        """Start, and be ended with the check."""
        self._context.at_end(self.close)
        self.start()
        return self

    def nbdsrv(self, *words: str, code: int = 0, timeout_s: float = 60) -> Finished:
        """``nbdsrv status`` or ``reload``."""
        return self._context.run(
            *command(words[0], "--socket", self.admin, *words[1:]),
            code=code,
            environment=server_environment(),
            timeout_s=timeout_s,
        )

    def status(self) -> dict[str, Any]:
        """What it tells of itself."""
        document: dict[str, Any] = json.loads(self.nbdsrv("status", "--json").stdout)
        return document

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def try_again(self, code: int) -> Finished:
        """The same command once more, which must end at once with this exit code."""
        return self._context.run(*self._command, code=code, environment=dict(self._environment))

    def audit(self) -> list[dict[str, Any]]:
        """The lines of the file ``audit``."""
        text = Path(self.config.parent / "audit").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def descriptors(self) -> int:
        """It has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident(self) -> int:
        """Bytes of memory."""
        with open(f"/proc/{self.pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
