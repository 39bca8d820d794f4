"""A mounted file system every uncached read of which takes a fixed time.

::

    file on ext4 (page cache as everywhere) - loop device, direct I/O - nbdfuse
        - nbdkit with its delay filter - an ext4 image in the cache directory

A fast disk hides a server that waits for it: a stall of 70 microseconds is lost in the noise.
On this one a single blocking read on an event loop shows as a latency of at least the delay
for everybody else. Needs root (loop device, mount) and /dev/fuse; elsewhere it is left out.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator

from conformance.benchmark.image import make
from conformance.benchmark.report import BenchmarkError

__all__ = ["DELAY_MS", "mounted", "unavailable"]

DELAY_MS = 50
SIZE = 192 << 20
"""Bytes of the slow file: at this delay no client reads all of it within a phase."""
ROOM = 32 << 20
"""What ext4 needs beside the file."""

COMMAND_TIMEOUT_S = 60
APPEAR_TIMEOUT_S = 15.0
NEEDED = ("nbdkit", "nbdfuse", "losetup", "mount", "umount", "mkfs.ext4")


def unavailable() -> str | None:
    """Why there is no slow disk here, or None."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.exists("/dev/fuse") or not os.path.exists("/dev/loop-control"):
        return "needs /dev/fuse and loop devices"
    return None


@contextlib.contextmanager
def mounted(cache: str) -> Iterator[str]:
    """The path of a ``SIZE`` bytes long file on such a file system, until the block ends.

    Raises BenchmarkError when a step fails; whatever was set up is taken down again.
    """
    disk = _disk(cache)
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(tempfile.TemporaryDirectory(prefix="nbd-bench-slow-"))
        socket, fuse, mount = (os.path.join(base, name) for name in ("socket", "fuse", "mount"))
        os.mkdir(fuse)
        os.mkdir(mount)
        delay = ["--filter=delay", "file", disk, f"rdelay={DELAY_MS}ms"]
        stack.enter_context(_daemon(["nbdkit", "-f", "-r", "-U", socket, *delay]))
        _await_path(socket)
        exported = os.path.join(fuse, "disk")
        stack.enter_context(_daemon(["nbdfuse", "-r", exported, f"nbd+unix:///?socket={socket}"]))
        stack.callback(_unmount, fuse)
        _await_path(exported)
        loop = _run("losetup", "--find", "--show", "--read-only", "--direct-io=on", exported)
        stack.callback(_run, "losetup", "--detach", loop)
        _run("mount", "-t", "ext4", "-o", "ro,noload", loop, mount)
        stack.callback(_unmount, mount)
        yield os.path.join(mount, "data.raw")


def _disk(cache: str) -> str:
    """An ext4 image holding ``data.raw``, made unless it is in the cache directory."""
    path = os.path.join(cache, f"slow-{SIZE}.ext4")
    if os.path.exists(path):
        return path
    with tempfile.TemporaryDirectory(dir=cache) as content:
        os.rename(make(content, "slow", SIZE, seed=3), os.path.join(content, "data.raw"))
        partial = f"{path}.partial"
        with open(partial, "wb") as file:
            file.truncate(SIZE + ROOM)
        _run("mkfs.ext4", "-q", "-F", "-d", content, partial)
    os.rename(partial, path)
    return path


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchmarkError(f"slow disk: {command[0]}: {error}") from error
    if done.returncode:
        raise BenchmarkError(f"slow disk: {' '.join(command)}: {done.stderr.strip()[-200:]}")
    return done.stdout.strip()


def _unmount(path: str) -> None:
    if os.path.ismount(path):
        _run("umount", "--lazy", path)


@contextlib.contextmanager
def _daemon(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,  # Ctrl-C is for us: what is mounted goes down from the top
    )
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_path(path: str) -> None:
    deadline = time.monotonic() + APPEAR_TIMEOUT_S
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise BenchmarkError(f"slow disk: {path} did not appear")
        time.sleep(0.02)
