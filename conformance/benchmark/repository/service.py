"""Something to read a restore point from: an NBD server, or a file in a FUSE mount.

NBD over a Unix socket where a program has one, else over TCP on loopback. (TCP for all would be
unfair to qemu-nbd: its first replies run into a delayed acknowledgement of 40 ms.)

restic and borg have no NBD server: their column is the file in their mount, read with O_DIRECT, so
that each request reaches them (the kernel's page cache in front of a mount would answer the second
time, and is not their work).
"""

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from conformance.benchmark.cells import Transport
from conformance.benchmark.report import BenchmarkError
from conformance.benchmark.servers import GREETING, free_port, receive, stop

__all__ = ["Target", "listening", "mounted"]

READY_TIMEOUT_S = 60.0
UNMOUNT_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Target:
    """What fio reads: an NBD URI or a file."""

    uri: str = ""
    path: str = ""


@contextlib.contextmanager
def listening(
    command: Callable[[str], Sequence[str]],
    export: str,
    *,
    over: Transport,
    directory: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Target]:
    """An NBD server, until the block ends; ``command`` is given a port or the path of a socket."""
    with tempfile.TemporaryDirectory(prefix="nbd-bench-") as scratch:  # a short path, for Unix
        socket_path = os.path.join(scratch, "socket")
        where = socket_path if over is Transport.UNIX else str(free_port())
        with _process(command(where), directory, environment) as process:
            _await(process, directory, lambda: _greets(over, where))
            if over is Transport.UNIX:
                yield Target(uri=f"nbd+unix:///{export}?socket={socket_path}")
            else:
                yield Target(uri=f"nbd://127.0.0.1:{where}/{export}")


@contextlib.contextmanager
def mounted(
    command: Sequence[str],
    mount: str,
    inside: str,
    *,
    directory: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Target]:
    """A program that keeps a FUSE mount in the foreground; ``inside`` is the file in it."""
    os.makedirs(mount, exist_ok=True)
    path = os.path.join(mount, inside)
    with _process(command, directory, environment) as process:
        try:
            _await(process, directory, lambda: os.path.ismount(mount) and os.path.exists(path))
            yield Target(path=path)
        finally:
            if os.path.ismount(mount):
                unmount = ["umount", "--lazy", mount]
                subprocess.run(unmount, timeout=UNMOUNT_TIMEOUT_S, check=False)


@contextlib.contextmanager
def _process(
    command: Sequence[str], directory: str, environment: Mapping[str, str] | None
) -> Iterator[subprocess.Popen[bytes]]:
    with open(_log(directory), "wb") as log:
        try:
            process = subprocess.Popen(
                command,
                cwd=directory,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C is for us: a mount goes down before its program
            )
        except OSError as error:
            raise BenchmarkError(f"{command[0]}: {error}") from error
    try:
        yield process
    finally:
        stop(process)


def _await(process: subprocess.Popen[bytes], directory: str, is_ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            with open(_log(directory), "rb") as file:
                said = file.read()[-400:].decode("utf-8", "replace").strip()
            raise BenchmarkError(f"{process.args!s:.200}: did not get ready: {said}")
        time.sleep(0.02)


def _greets(over: Transport, where: str) -> bool:
    family = socket.AF_UNIX if over is Transport.UNIX else socket.AF_INET
    with socket.socket(family) as connection:
        connection.settimeout(READY_TIMEOUT_S)
        try:
            connection.connect(where if over is Transport.UNIX else ("127.0.0.1", int(where)))
            return receive(connection, len(GREETING)) == GREETING
        except OSError:
            return False  # not listening yet


def _log(directory: str) -> str:
    return os.path.join(directory, "service.log")
