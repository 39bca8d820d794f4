"""nbdfuse with a real file system on top: mkfs.ext4, a loop mount, files, fsck.

::

    ext4 mount  ->  loop device  ->  nbdfuse's file  ->  libnbd  ->  our server  ->  raw file

It needs root, /dev/fuse and loop devices. Everything is undone in reverse, also on failure.
"""

import hashlib
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from conformance.context import Context
from conformance.image import MIB, Image
from conformance.outcome import CheckFailedError, MissingPeerError
from conformance.process import find_program, kill_group
from conformance.registry import check, expect
from conformance.server import Server

NEEDS = ("nbdfuse",)

MOUNT_TIMEOUT_S = 10.0


def fuse_mount(
    context: Context, server: Server, *options: str, name: str = "", place: str = "fuse"
) -> tuple[Path, Callable[[], None]]:
    """Mount an export as a file; return its path, and what unmounts it."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MissingPeerError("/dev/fuse is not usable")
    mountpoint = context.directory / place
    mountpoint.mkdir()
    process = subprocess.Popen(
        [find_program("nbdfuse"), *options, mountpoint / "nbd", server.uri(name)],
        cwd=context.directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def unmount() -> None:
        _unmount_fuse(context, mountpoint, process)

    context.at_end(unmount)
    deadline = time.monotonic() + MOUNT_TIMEOUT_S
    while not os.path.ismount(mountpoint):
        if process.poll() is not None or time.monotonic() > deadline:
            raise CheckFailedError(f"nbdfuse did not mount (exit code {process.returncode})")
        time.sleep(0.02)
    return mountpoint / "nbd", unmount


def _unmount_fuse(context: Context, mountpoint: Path, process: subprocess.Popen[bytes]) -> None:
    if os.path.ismount(mountpoint):
        # libfuse as root mounts by itself, and so may have come without its setuid program.
        words = ("umount",) if os.geteuid() == 0 else ("fusermount3", "-u")
        if context.run(*words, mountpoint, code=None).code != 0:
            context.run(*words, "-l" if os.geteuid() == 0 else "-z", mountpoint, code=None)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        # What waits on a dead FUSE daemon is released, so this cannot hang the cleanup.
        kill_group(process)


@check("nbdfuse", "read", needs=NEEDS)
def read_file(context: Context) -> None:
    """The mounted file is the image."""
    image = context.image()
    path, _ = fuse_mount(context, context.serve(image), "-r")
    expect(image.size, path.stat().st_size, "size of the mounted file")
    expect(image.digest(), Image(path, image.size, ()).digest(), "sha256 of the mounted file")


@check("nbdfuse", "ext4 on a loop mount", needs=(*NEEDS, "mkfs.ext4", "e2fsck", "mount", "umount"))
def ext4(context: Context) -> None:
    """mkfs, mount, write, unmount; then our file passes fsck and mounts with the same content."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        raise MissingPeerError("loop mounts need root and /dev/loop-control")
    image = context.image(size=64 * MIB, spans=())
    server = context.serve(image, write=True)
    path, unmount_fuse = fuse_mount(context, server, "-C", "4")
    context.run("mkfs.ext4", "-q", "-F", path)
    mounted = loop_mount(context, path, "rw")
    wanted = _write_tree(mounted)
    _unmount(context, mounted)
    unmount_fuse()
    server.stop()
    context.run("e2fsck", "-f", "-n", image.path)
    again = loop_mount(context, image.path, "ro")
    expect(wanted, _read_tree(again), "files on our image")
    _unmount(context, again)


def loop_mount(context: Context, file: Path, mode: str, place: str = "") -> Path:
    """Mount through a loop device that mount(8) picks and the kernel frees on unmount."""
    mountpoint = context.directory / (place or f"mnt-{mode}")
    mountpoint.mkdir()
    context.at_end(_unmount, context, mountpoint)
    # noload: on a read-only mount nothing may be replayed, fsck has just found nothing to.
    options = f"loop,{mode}" + (",noload" if mode == "ro" else "")
    context.run("mount", "-t", "ext4", "-o", options, file, mountpoint)
    return mountpoint


def _unmount(context: Context, mountpoint: Path) -> None:
    if not os.path.ismount(mountpoint):
        return
    if context.run("umount", mountpoint, code=None).code != 0:
        context.run("umount", "-l", mountpoint, code=None)
        raise CheckFailedError(f"{mountpoint} could only be unmounted lazily")


def _write_tree(root: Path) -> dict[str, str]:
    source = random.Random(42)
    for index in range(60):
        directory = root / f"d{index % 7}"
        directory.mkdir(exist_ok=True)
        (directory / f"file{index}").write_bytes(source.randbytes(source.randrange(200_000)))
    for index in range(0, 60, 5):
        (root / f"d{index % 7}" / f"file{index}").unlink()
    os.sync()
    return _read_tree(root)


def _read_tree(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
    }
