"""TARGET: where a copy goes.

::

    TARGET = FORMAT ":" PATH | FORMAT ":-" | "-" | URI | PATH

====================== ====================================================================
TARGET                 becomes
====================== ====================================================================
``qcow2:/x``, ``vhd:`` a new image of that format
``/x.vmdk``            a new image, its format by the extension or ``--to``; raw otherwise
``/dev/sdb``           a block device that is there: overwritten in place
``-``, ``raw:-``       standard output, in order
``nbd://...``          an NBD export: overwritten in place
``null:``              nothing: read, and forgotten
====================== ====================================================================
"""

import os
import stat
from dataclasses import dataclass
from enum import Enum, auto

from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import FORMATS, HYPERVISORS, REPOSITORIES, is_nbd
from nbdsrv.formats.target_file import STANDARD_OUTPUT

__all__ = ["WRITTEN", "Place", "Target", "parse_target"]

WRITTEN = ("raw", "qcow2", "vhd", "vmdk")
"""The formats we can write."""
NULL = "null:"
_EXTENSIONS = {
    ".img": "raw",
    ".raw": "raw",
    ".bin": "raw",
    ".qcow2": "qcow2",
    ".vhd": "vhd",
    ".vpc": "vhd",
    ".vmdk": "vmdk",
}
_NOT_WRITTEN = {
    ".vhdx": "vhdx",
    ".vdi": "vdi",
    ".hdd": "parallels",
    ".qcow": "qcow",
    ".qed": "qed",
    ".ova": "ova",
    ".xva": "xva",
    ".vma": "vma",
    ".gz": "gzip",
    ".xz": "xz",
    ".zst": "zstd",
    ".bz2": "bzip2",
}
"""Extensions under which nobody would look for a raw image."""


class Place(Enum):
    """What kind of thing is written to."""

    FILE = auto()
    PIPE = auto()
    DEVICE = auto()
    NBD = auto()
    POOL = auto()
    NOWHERE = auto()


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed TARGET.

    Attributes:
        text: as it was given.
        location: a path, ``-`` or a URI.
        format: one of ``WRITTEN``; "raw" where a disk is overwritten.
    """

    text: str
    place: Place
    location: str
    format: str

    @property
    def in_place(self) -> bool:
        """Is something overwritten that is there already?"""
        return self.place in {Place.DEVICE, Place.NBD, Place.NOWHERE}


def parse_target(text: str, to: str | None = None) -> Target:
    """Parse one TARGET; ``to`` is the format that ``--to`` asks for.

    Looks at the file system once: is it a block device?

    Raises:
        ConfigError: empty, of a kind that cannot be written, or contradicting ``to``.
    """
    scheme, colon, rest = text.partition(":")
    if is_nbd(text):
        return _in_place(text, Place.NBD, text, to)
    if colon and scheme == "xapi":
        if to not in {None, "vhd"}:
            raise ConfigError(f"{text}: is filled as a VHD; --to {to} contradicts it")
        return Target(text, Place.POOL, text, "vhd")
    if colon and scheme in REPOSITORIES | HYPERVISORS:
        raise ConfigError(f"{text}: copy writes images and NBD exports; this is neither")
    if text == NULL:
        return _in_place(text, Place.NOWHERE, text, to)
    named = None
    if colon and scheme in FORMATS:
        _refuse_unwritten(text, scheme)
        named, location = scheme, rest
    else:
        location = text
    if not location:
        raise ConfigError("an empty TARGET; give a file, for instance qcow2:disk.qcow2")
    if named and to and named != to:
        raise ConfigError(f"{text}: --to {to} contradicts it")
    kind = named or to
    if location == STANDARD_OUTPUT:
        return Target(text, Place.PIPE, location, kind or "raw")
    if _is_device(location):
        return _in_place(text, Place.DEVICE, location, kind)
    if _among_devices(location):
        raise ConfigError(f"{text}: no such device")
    return Target(text, Place.FILE, location, kind or _by_extension(text, location))


def _refuse_unwritten(text: str, kind: str) -> None:
    if kind not in WRITTEN:
        raise ConfigError(f"{text}: {kind} images are not written, only {', '.join(WRITTEN)}")


def _by_extension(text: str, path: str) -> str:
    extension = os.path.splitext(path)[1].lower()
    if extension in _NOT_WRITTEN:
        _refuse_unwritten(text, _NOT_WRITTEN[extension])
    return _EXTENSIONS.get(extension, "raw")


def _in_place(text: str, place: Place, location: str, kind: str | None) -> Target:
    if kind not in {None, "raw"}:
        raise ConfigError(f"{text}: is overwritten as it is; a {kind} image goes into a file")
    return Target(text, place, location, "raw")


def _among_devices(path: str) -> bool:
    """Would a new file be made in /dev, in memory, where a device's name was mistyped?"""
    try:
        place = os.stat(os.path.dirname(os.path.realpath(path)))
        return not os.path.lexists(path) and place.st_dev == os.stat("/dev").st_dev
    except (OSError, ValueError):
        return False


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
