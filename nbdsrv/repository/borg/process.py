"""borg's own code in processes of its own, and how it is asked.

::

    threads ── call(request) ── an idle one? ── pipe ── worker.py ── borg ── repository
                   │              └── none: start another, up to WORKERS
                   └── it died: start another, ask again, once

A worker answers one request at a time. It ends when its standard input does, so also when this
process is killed. borg's caches go to a directory of our own; its keys are read where it keeps
them.

Rule: an answer is bounded before it is read, and waited for so long and no longer.
"""

import json
import os
import select
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from nbdsrv.errors import ConfigError, CorruptImage, DiskError, RepositoryError, UnsupportedImage
from nbdsrv.repository.borg.interpreter import INSTALL, borg_python

__all__ = ["BorgProcesses"]

WORKERS = max(1, min(3, len(os.sched_getaffinity(0))))
"""Processes at most; each has the repository's index in memory."""
ANSWER_S = 300.0
"""Seconds until an answer is given up: rebuilding an index reads all segments' headers."""
CHUNK_S = 60.0
"""The same for a chunk."""
MAX_HEADER = 16 << 20
MAX_BODY = 64 << 20
_FRAME = struct.Struct(">II")
_SCRIPT = os.path.join(os.path.dirname(__file__), "worker.py")
_NOT_PASSED = ("PYTHON", "NBDSRV_", "LISTEN_", "NOTIFY_", "BORG_REPO")
_OURS = frozenset({"BORG_CACHE_DIR", "BORG_SECURITY_DIR", "BORG_CONFIG_DIR", "BORG_PASSPHRASE_FD"})


class _DiedError(Exception):
    """A worker is gone."""


class _Worker:
    """One process."""

    def __init__(self, python: str, environment: Mapping[str, str], directory: str) -> None:
        try:
            self._process = subprocess.Popen(
                [python, _SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=directory,
                env=environment,
                start_new_session=True,  # no terminal to ask at, and not hit by its Ctrl-C
                bufsize=0,
            )
        except OSError as error:
            raise RepositoryError(f"{python}: {error.strerror}; {INSTALL}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: Mapping[str, Any], within_s: float) -> tuple[dict[str, Any], bytes]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        deadline = time.monotonic() + within_s
        data = json.dumps(request).encode()
        try:
            self._send(stdin.fileno(), _FRAME.pack(len(data), 0) + data)
            head, body = _FRAME.unpack(self._receive(stdout.fileno(), _FRAME.size, deadline))
            if head > MAX_HEADER or body > MAX_BODY:
                raise _DiedError(f"an answer of {head} and {body} bytes")
            header = json.loads(self._receive(stdout.fileno(), head, deadline))
            if not isinstance(header, dict):
                raise _DiedError("an answer that is none")
            return header, self._receive(stdout.fileno(), body, deadline)
        except BrokenPipeError as error:  # before it had read what it was asked
            raise _DiedError("it ended") from error
        except (OSError, ValueError, RecursionError) as error:
            raise _DiedError(str(error)) from error

    @staticmethod
    def _send(fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    @staticmethod
    def _receive(fd: int, length: int, deadline: float) -> bytes:
        data = bytearray(length)
        view, done = memoryview(data), 0
        waiting = select.poll()
        waiting.register(fd, select.POLLIN)
        while done < length:
            left = deadline - time.monotonic()
            if left <= 0 or not waiting.poll(left * 1000):
                raise _DiedError("it did not answer in time")
            count = os.readv(fd, [view[done:]])
            if not count:
                raise _DiedError("it ended")
            done += count
        view.release()
        return bytes(data)

    def end(self) -> None:
        """Kill it, and wait for that."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        self._process.kill()
        self._process.wait()


class BorgProcesses:
    """Workers on one repository. Thread-safe; everything here blocks.

    Attributes:
        name: of the repository.
        facts: what ``hello`` says of it.
    """

    def __init__(self, path: str, passphrase: str | None) -> None:
        """Start the first.

        Args:
            path: of the repository.
            passphrase: None: borg's own variables, or none at all.

        Raises:
            RepositoryError: no borg repository, a wrong passphrase, or no borg.
            CorruptImage: it is damaged.
        """
        self.name = path
        self._path = os.path.abspath(path)
        self._passphrase = passphrase
        self._python = borg_python()
        self._directory = tempfile.TemporaryDirectory(prefix="nbdsrv-borg-")
        self._environment = _environment(self._directory.name)
        self._free = threading.Condition()
        self._idle: list[_Worker] = []
        self._count = 0
        self._closed = False
        try:
            self.facts, _ = self.call("hello")
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Of the workers that are idle, for tests."""
        return [worker.pid for worker in self._idle]

    def call(
        self, do: str, within_s: float = ANSWER_S, **request: Any
    ) -> tuple[dict[str, Any], bytes]:
        """Ask, and return the answer: what it says, and bytes.

        Raises:
            CorruptImage: borg says that something is damaged.
            RepositoryError, UnsupportedImage: it cannot be read so.
            DiskError: borg failed, twice.
        """
        said = ""
        for _ in range(2):
            worker = self._take()
            try:
                header, body = worker.ask({"do": do, **request}, within_s)
            except _DiedError as error:
                said = str(error)
                self._lose(worker)
                continue
            except BaseException:
                self._lose(worker)
                raise
            self._give_back(worker)
            if "error" in header:
                raise self._error(header)
            return header, body
        raise DiskError(f"{self.name}: borg failed: {said}")

    def _take(self) -> _Worker:
        with self._free:
            while not self._idle and self._count >= WORKERS and not self._closed:
                self._free.wait()
            if self._closed:
                raise RepositoryError(f"{self.name} is closed")
            if self._idle:
                return self._idle.pop()
            self._count += 1
        worker = None
        try:
            worker = _Worker(self._python, self._environment, self._directory.name)
            hello = {"do": "hello", "path": self._path, "passphrase": self._passphrase}
            try:
                header, _ = worker.ask(hello, ANSWER_S)
            except _DiedError as error:
                text = f"{self.name}: {self._python} did not start: {error}; {INSTALL}"
                raise RepositoryError(text) from error
            if "error" in header:
                raise self._error(header)
            return worker
        except BaseException:
            self._lose(worker)
            raise

    def _give_back(self, worker: _Worker) -> None:
        with self._free:
            if not self._closed:
                self._idle.append(worker)
                self._free.notify()
                return
        self._lose(worker)

    def _lose(self, worker: _Worker | None) -> None:
        if worker is not None:
            worker.end()
        with self._free:
            self._count -= 1
            self._free.notify()

    def _error(self, header: Mapping[str, Any]) -> Exception:
        kind, text = header.get("error"), str(header.get("text", ""))
        if kind == "corrupt":
            return CorruptImage(f"corrupt repository: {self.name}: {text}")
        if kind == "passphrase":
            if self._passphrase is None and "BORG_PASSPHRASE" not in os.environ:
                what = "set NBDSRV_PASSPHRASE, NBDSRV_PASSPHRASE_FILE or BORG_PASSPHRASE"
                return ConfigError(f"{self.name}: the repository is encrypted; {what}")
            return RepositoryError(f"{self.name}: the passphrase does not open it: {text}")
        if kind == "import":
            return RepositoryError(f"{self._python}: {text}; {INSTALL}")
        if kind in {"none", "key", "missing", "refused"}:
            return RepositoryError(f"{self.name}: {text}")
        if kind == "unsupported":
            return UnsupportedImage(f"{self.name}: {text}")
        return DiskError(f"{self.name}: {text}")

    def close(self) -> None:
        """End all workers, those that are at work as soon as they have answered. Idempotent."""
        with self._free:
            if self._closed:
                return
            self._closed = True
            idle, self._idle = self._idle, []
            self._free.notify_all()
        for worker in idle:
            self._lose(worker)
        with suppress(OSError):
            self._directory.cleanup()


def _environment(directory: str) -> dict[str, str]:
    """Ours, but for what would lead borg to write anywhere but into ``directory``."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_NOT_PASSED) and name not in _OURS
    }
    keys = _keys_directory(os.environ)
    kept.update(
        BORG_BASE_DIR=directory,
        LC_ALL="C.UTF-8",
        PYTHONSAFEPATH="1",
        PYTHONDONTWRITEBYTECODE="1",
        BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK="yes",
        BORG_RELOCATED_REPO_ACCESS_IS_OK="yes",
        BORG_DISPLAY_PASSPHRASE="no",  # noqa: S106
    )
    kept.pop("BORG_KEYS_DIR", None)
    if os.path.isdir(keys):  # borg makes it where there is none
        kept["BORG_KEYS_DIR"] = keys
    return kept


def _keys_directory(environment: Mapping[str, str]) -> str:
    """Where borg keeps the keys of ``keyfile`` repositories."""
    if keys := environment.get("BORG_KEYS_DIR"):
        return os.path.abspath(keys)
    config = environment.get("BORG_CONFIG_DIR")
    if not config:
        base = environment.get("BORG_BASE_DIR")
        home = environment.get("HOME") or os.path.expanduser("~")
        xdg = os.path.join(base or home, ".config")
        if not base:
            xdg = environment.get("XDG_CONFIG_HOME") or xdg
        config = os.path.join(xdg, "borg")
    return os.path.abspath(os.path.join(config, "keys"))
