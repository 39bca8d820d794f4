"""virtnbdbackup's own functions, called without a libvirt daemon.

Runs under the distribution's Python, which has virtnbdbackup's package and libnbd's bindings.
virtnbdbackup asks libvirt for the domain's configuration and for its disks' NBD server; of a
domain that is shut off it starts qemu-nbd itself. That second way is taken here: the functions
below are called with the arguments its command line would give them. All of its imports,
processes and bytes are its own; what is left out are the calls to libvirt.

::

    virtnbd_driver.py backup  IMAGE.qcow2 DIRECTORY full
    virtnbd_driver.py backup  IMAGE.qcow2 DIRECTORY inc BITMAP
    virtnbd_driver.py restore DIRECTORY TARGET-DIRECTORY FILE...
    virtnbd_driver.py map     FILE.data MAP.json
"""

import contextlib
import importlib.machinery
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

TARGET = "vda"
COMPRESSION_LEVEL = 1
"""lz4's; what a bare ``--compress`` means."""
CLOSE_TIMEOUT_S = 120


def main(words: list[str]) -> None:
    """Do what the first word says."""
    actions: dict[str, Callable[..., None]] = {"backup": _backup, "restore": _restore, "map": _map}
    actions[words[0]](*words[1:])


def _backup(image: str, directory: str, level: str, bitmap: str = "") -> None:
    program = _load("virtnbdbackup")
    compress: int | bool = COMPRESSION_LEVEL if os.environ.get("COMPRESS") else False
    with _scratch() as scratch:
        arguments = Namespace(
            level=level,
            type="stream",
            output=directory,
            offline=True,
            compress=compress,
            qemu=False,
            stdout=False,
            noprogress=True,
            socketfile=os.path.join(scratch, "socket"),
            nbd_ip="",
            nbd_port=10809,
            tls=False,
            sshClient=None,
            cpt=Namespace(name=bitmap or "none", parent=bitmap, file=""),
        )
        disk = program.DomainDisk(TARGET, "qcow2", os.path.basename(image), image, [])
        stream = program.getFileStream(arguments, program.output.target)
        try:
            if not program.backupDisk(arguments, disk, 0, stream, Namespace(remoteHost="")):
                raise SystemExit("virtnbdbackup: the backup failed")
        except BaseException:
            _stop(f"{arguments.socketfile}.{TARGET}.pid")
            raise


def _restore(directory: str, target: str, *files: str) -> None:
    program = _load("virtnbdrestore")
    with _scratch() as scratch:
        socket = os.path.join(scratch, "socket")
        arguments = Namespace(
            input=directory,
            output=target,
            socketfile=socket,
            noprogress=True,
            until=None,
            sshClient=None,
        )
        if not program.restoreSequence(arguments, list(files), Namespace(remoteHost="")):
            raise SystemExit("virtnbdrestore: the restore failed")
        # qemu-nbd, which it leaves behind, writes the image out when its client has gone.
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while _is_locked(os.path.join(target, TARGET)):
            if time.monotonic() > deadline:
                raise SystemExit("virtnbdrestore: its qemu-nbd does not end")
            time.sleep(0.01)


def _map(file: str, target: str) -> None:
    """The map virtnbdmap hands its nbdkit plugin."""
    program = _load("virtnbdmap")
    stream = program.streamer.SparseStream(program.types)
    with open(file, "rb") as reader, open(target, "wb") as written:
        ranges, _ = program.getDataRanges(stream, program.types.SparseStreamTypes(), reader)
        program.dumpBlockMap(written, ranges)


def _load(name: str) -> Any:
    """One of its programs as a module, its ``main`` not run."""
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} is not installed")
    loader = importlib.machinery.SourceFileLoader(name, path)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A directory for sockets, and for the logs that it leaves in the temporary directory."""
    with tempfile.TemporaryDirectory(prefix="virtnbd-") as scratch:
        tempfile.tempdir = scratch
        yield scratch


def _stop(pid_file: str) -> None:
    """End the qemu-nbd that virtnbdbackup leaves behind when it fails."""
    if os.path.exists(pid_file):
        with open(pid_file, encoding="ascii") as file:
            os.kill(int(file.read()), signal.SIGTERM)


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _is_locked(path: str) -> bool:
    """Has a process this image open? Its locks tell: /proc/locks names inodes."""
    status = os.stat(path)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with open("/proc/locks", encoding="ascii") as locks:
        return any(wanted in line.split() for line in locks)


if __name__ == "__main__":
    sys.dont_write_bytecode = True  # nothing is left beside the system's programs
    signal.signal(signal.SIGTERM, _leave)
    main(sys.argv[1:])
