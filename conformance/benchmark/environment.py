"""The machine and the programs a number comes from."""

import os
import platform
import subprocess
import sys
import time

__all__ = ["describe"]

VERSIONS = {
    "nbdkit": ["nbdkit", "--version"],
    "qemu-nbd": ["qemu-nbd", "--version"],
    "fio": ["fio", "--version"],
    "nbdcopy": ["nbdcopy", "--version"],
}
VERSION_TIMEOUT_S = 10


def describe(image: str, size: int, rounds: int, seconds: float) -> dict[str, str]:
    """What a reader needs to judge or repeat the run, in a fixed order.

    The load average is the one before the run: on a machine with other work it is what
    explains a strange round.
    """
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "processor": f"{_cpu()} x {os.cpu_count()}",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') >> 20} MiB",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "uvloop": _uvloop(),
        **{name: _version(command) for name, command in VERSIONS.items()},
        "image": f"{size >> 20} MiB raw on {_file_system(image)}",
        "rounds": f"{rounds} of {seconds:g} s a cell",
        "load average before": f"{os.getloadavg()[0]:.2f}",
    }


def _cpu() -> str:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _uvloop() -> str:
    # Asked of the interpreter that runs our server, which is this one.
    return _version([sys.executable, "-c", "import uvloop; print('uvloop', uvloop.__version__)"])


def _version(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "not found"
    words = (done.stdout.splitlines() or ["unknown"])[0].replace("fio-", "").split()
    return next((word for word in words if word[:1].isdigit()), "unknown")


def _file_system(path: str) -> str:
    """The type of the file system a file is on, from the mount table."""
    where, kind = "", "unknown"
    real = os.path.realpath(path)
    with open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
        for line in file:
            _, mount, this, *_ = line.split()
            inside = real == mount or real.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= len(where):
                where, kind = mount, this
    return kind
