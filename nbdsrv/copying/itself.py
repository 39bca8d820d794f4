"""A copy whose target is its own source, by whatever name.

::

    source           target                  are the same because
    ---------------  ----------------------  ------------------------------------
    disk.img         a link to it            it is the same inode
    /dev/vg/disk     /dev/dm-3               it is the same device number
    /dev/loop0       disk.img                the loop device lies on the file
    disk.img         /dev/loop0              likewise
    /dev/sdb1        /dev/sdb                the partition lies on the disk
"""

import contextlib
import os
import stat
from collections.abc import Iterator

from nbdsrv.copying.target import Place, Target
from nbdsrv.errors import ConfigError

__all__ = ["refuse_itself"]


def refuse_itself(source: str, target: Target) -> None:
    """The source, or an image it is made of, must not be the target. Blocking.

    They are open by now: so the target must not be among the files that this process has open.

    Raises:
        ConfigError: it is.
    """
    if target.place is Place.NBD and source == target.text:
        raise ConfigError(f"{target.text}: is SOURCE itself")
    if target.place not in {Place.FILE, Place.DEVICE}:
        return
    try:
        wanted = os.stat(target.location)
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(wanted.st_mode) and not stat.S_ISBLK(wanted.st_mode):
        return  # not written to either; the writer says why
    places = [wanted, *_file_below(wanted)]
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/self/fd/{name}")
            below = [*_file_below(found), *_disk_below(found)]
            same = any(_same(found, each) for each in places)
            if int(name) > 2 and (same or any(_same(each, wanted) for each in below)):
                raise ConfigError(f"{target.text}: SOURCE is read from it; choose another TARGET")


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    """The same file, or two names of the same device."""
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return os.path.samestat(one, other)


def _file_below(info: os.stat_result) -> Iterator[os.stat_result]:
    """The file that a loop device lies on."""
    if stat.S_ISBLK(info.st_mode):
        with contextlib.suppress(OSError), open(f"{_device(info)}/loop/backing_file", "rb") as file:
            yield os.stat(file.read().removesuffix(b"\n"))


def _disk_below(info: os.stat_result) -> Iterator[os.stat_result]:
    """The disk that a partition lies on."""
    if stat.S_ISBLK(info.st_mode) and os.path.exists(f"{_device(info)}/partition"):
        whole = os.path.basename(os.path.dirname(os.path.realpath(_device(info))))
        with contextlib.suppress(OSError):
            yield os.stat(f"/dev/{whole}")


def _device(info: os.stat_result) -> str:
    return f"/sys/dev/block/{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
