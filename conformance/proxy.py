"""``nbdsrv proxy`` as a process: where it serves, and what it says when it ends.

::

    nbdsrv proxy SOURCE... --tee A --tee B --listen ... --json
        stdout   a URI per disk and listener, then, after SIGTERM, what was stored
        exit     0 all stored, 3 one of several repositories has failed, 1 no point
"""

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from conformance.context import Context
from conformance.outcome import CheckFailedError
from conformance.process import kill_group, tail
from conformance.repository import command
from conformance.server import server_environment

__all__ = ["Proxy", "Told"]

READY_S = 60.0
END_S = 120.0
"""After SIGTERM: what nobody has read is read, and a repository that fell behind catches up."""


@dataclass(frozen=True, slots=True)
class Told:
    """How a proxy ended.

    Attributes:
        code: of its exit.
        rows: what was stored, a row for each disk and repository.
        said: what it wrote to stderr.
    """

    code: int
    rows: list[dict[str, Any]]
    said: str

    def of(self, repository: str) -> list[dict[str, Any]]:
        """What was stored in this one."""
        return [row for row in self.rows if row["repository"] == repository and "error" not in row]

    def failed(self, repository: str) -> str:
        """Why this one has no point, in the report's own words; "" if that is not said."""
        rows = [row for row in self.rows if row["repository"] == repository and "error" in row]
        return str(rows[0]["error"]) if rows else ""


class Proxy:
    """One that is running; it ends with the context.

    Attributes:
        uris: by the names of its exports.
    """

    def __init__(
        self,
        context: Context,
        sources: Sequence[str],
        tees: Sequence[str],
        *,
        exports: int,
        listen: str = "127.0.0.1:0",
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it and wait for its URIs.

        Raises:
            CheckFailedError: it ended instead.
        """
        words = [word for tee in tees for word in ("--tee", tee)]
        words += ["--json"] if tees else []
        self._errors = context.directory / f"proxy-{id(self):x}.stderr"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command("proxy", *sources, *words, "--listen", listen, *options),
                cwd=context.directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **server_environment(), **(environment or {})},
                start_new_session=True,
            )
        context.at_end(kill_group, self._process)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.uris: dict[str, str] = {}
        for _ in range(exports):
            uri = self._line()
            self.uris[unquote(urlsplit(uri).path.removeprefix("/"))] = uri

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """It; ended by ``end`` alone."""
        return self._process

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.decode(errors="replace"))
        self._lines.put(None)

    def _line(self) -> str:
        try:
            line = self._lines.get(timeout=READY_S)
        except queue.Empty:
            line = None
        if line is None:
            raise CheckFailedError(f"the proxy did not start: {tail(self._said())}")
        return line.strip()

    def _said(self) -> str:
        return self._errors.read_text(errors="replace")

    def end(self, *, code: int | None = 0) -> Told:
        """SIGTERM, then wait until it has stored everything.

        Raises:
            CheckFailedError: it hung, printed a traceback, or exited with another code.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            exited = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            raise CheckFailedError(f"the proxy was still there {END_S:g} s after SIGTERM") from None
        self._reader.join()
        lines = []
        while (line := self._lines.get()) is not None:
            lines.append(line)
        said = self._said()
        if "Traceback" in said or (code is not None and exited != code):
            raise CheckFailedError(f"the proxy exited {exited}: {tail(said, lines=6)}")
        text = "".join(lines)
        return Told(exited, json.loads(text) if text.strip() else [], said)
