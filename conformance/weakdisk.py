"""A file system on a disk that can become slow, or die, while it is being written to.

::

    a directory on ext4 (page cache as everywhere) - loop device - nbdfuse
        - nbdkit: rate filter (how fast is in a file it looks at) - memory

``slow`` lets so many bytes a second through from now on. ``die`` kills nbdkit: whatever is not in
the page cache fails with EIO, and ext4 refuses to be written to. Needs root and /dev/fuse.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["WeakDisk", "WeakDiskError", "unavailable"]

NEEDED = ("nbdkit", "nbdfuse", "losetup", "mount", "umount", "mkfs.ext4")
COMMAND_S = 60.0
READY_S = 15.0


class WeakDiskError(Exception):
    """It could not be set up."""


def unavailable() -> str | None:
    """Why there is no such disk here, or None."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.exists("/dev/fuse") or not os.path.exists("/dev/loop-control"):
        return "needs /dev/fuse and loop devices"
    return None


class WeakDisk:
    """One such disk, mounted. Use as a context manager.

    Attributes:
        path: of the directory it is mounted at.
    """

    def __init__(self, size: int = 2 << 30) -> None:
        """``size`` bytes at most, of which only those written to take memory."""
        self._size = size
        self._stack = ExitStack()
        self._server: subprocess.Popen[bytes] | None = None
        self.path = Path()

    def __enter__(self) -> Self:
        try:
            self._set_up()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _set_up(self) -> None:
        base = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="nbd-weak-")))
        socket, fuse, mount = base / "s", base / "fuse", base / "mount"
        self._rate = base / "rate"
        for directory in (fuse, mount):
            directory.mkdir()
        image = base / "empty.ext4"
        with image.open("wb") as file:
            file.truncate(self._size)
        _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))
        # A copy in memory, so that nothing but the rate makes it slow. Without a rate there is
        # none; a burst of a tenth of a second is let through at once.
        words = ["nbdkit", "-f", "-U", str(socket), "--filter=cow", "--filter=rate"]
        words += ["file", str(image), f"rate-file={self._rate}", "burstiness=0.1"]
        self._server = self._daemon(words)
        _await(socket.exists, "nbdkit's socket")
        exported = fuse / "disk"
        self._daemon(["nbdfuse", str(exported), f"nbd+unix:///?socket={socket}"])
        self._stack.callback(_unmount, fuse)
        _await(exported.exists, "nbdfuse's file")
        loop = _run("losetup", "--find", "--show", str(exported))
        self._stack.callback(_quietly, "losetup", "--detach", loop)
        _run("mount", "-t", "ext4", "-o", "errors=remount-ro", loop, str(mount))
        self._stack.callback(_unmount, mount)
        self.path = mount

    def _daemon(self, words: list[str]) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for us: what is mounted goes down from the top
        )
        self._stack.callback(_end, process)
        return process

    def slow(self, rate: int) -> None:
        """Let ``rate`` bytes a second through from now on."""
        partial = self._rate.with_suffix(".new")
        partial.write_text(f"{rate * 8}\n")
        partial.rename(self._rate)

    def mend(self) -> None:
        """As fast as it was."""
        self._rate.unlink(missing_ok=True)

    def die(self) -> None:
        """Every access fails from now on."""
        assert self._server is not None
        with suppress(ProcessLookupError):
            self._server.send_signal(signal.SIGKILL)


def _run(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WeakDiskError(f"{words[0]}: {error}") from error
    if done.returncode:
        raise WeakDiskError(f"{' '.join(words)}: {done.stderr.strip()[-200:]}")
    return done.stdout.strip()


def _quietly(*words: str) -> None:
    with suppress(WeakDiskError):
        _run(*words)


def _unmount(path: Path) -> None:
    _quietly("umount", "--lazy", str(path))


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(COMMAND_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _await(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + READY_S
    while not ready():
        if time.monotonic() > deadline:
            raise WeakDiskError(f"{what} did not appear")
        time.sleep(0.02)
