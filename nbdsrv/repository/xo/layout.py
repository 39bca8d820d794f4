"""Where everything lies in a Xen Orchestra repository, and what it is called.

::

    encryption.json  metadata.json                   which cipher; is the key right?
    xo-vm-backups/<vm>.lock/                         a job is at work
    xo-vm-backups/<vm>/<stamp>.json                  a restore point; written last
    xo-vm-backups/<vm>/<stamp>.xva                   mode "full": the whole VM in one archive
    xo-vm-backups/<vm>/vdis/<job>/<vdi>/<stamp>.vhd            a disk in one file
                                       /<stamp>.alias.vhd      where its directory is: "data/..."
                                       /data/<any>.vhd/        a VHD directory
                                       /.<parent>.merge.json   two disks are becoming one
    .../data/<any>.vhd/header footer bat chunk-filters.json blocks/<i div 1000>/<i mod 1000>

A stamp is a time in UTC, ``20260101T020304Z``. What begins with a dot is temporary or not a VM.
"""

import posixpath
from datetime import UTC, datetime

__all__ = [
    "ALIAS",
    "BAT",
    "BLOCKS",
    "CHECKSUM",
    "DATA",
    "ENCRYPTION",
    "FILTERS",
    "FOOTER",
    "HEADER",
    "LOCK",
    "METADATA",
    "POINT",
    "VDIS",
    "VHD",
    "VM_BACKUPS",
    "XVA",
    "block_path",
    "is_alias",
    "merge_state_path",
    "merging_parent",
    "point_stamp",
    "stamp_of",
    "time_of",
    "vdi_directory",
]

ENCRYPTION = "encryption.json"
METADATA = "metadata.json"
VM_BACKUPS = "xo-vm-backups"
LOCK = ".lock"
POINT = ".json"
XVA = ".xva"
CHECKSUM = ".checksum"
"""Behind the name of an XVA: its MD5."""
VDIS = "vdis"
VHD = ".vhd"
ALIAS = ".alias.vhd"
DATA = "data"

HEADER = "header"
FOOTER = "footer"
BAT = "bat"
FILTERS = "chunk-filters.json"
BLOCKS = "blocks"

_STAMP = "%Y%m%dT%H%M%SZ"
_STAMP_LENGTH = 16
_BLOCKS_A_DIRECTORY = 1000
_MERGE = ".merge.json"


def stamp_of(seconds: float) -> str:
    """The stamp of a time in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).strftime(_STAMP)


def time_of(stamp: str) -> float | None:
    """Seconds since 1970; None if it is no stamp."""
    if len(stamp) != _STAMP_LENGTH:
        return None
    try:
        return datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def point_stamp(name: str) -> str | None:
    """The stamp of a restore point by the name of its file; None if it is no point's."""
    stamp = name.removesuffix(POINT)
    return stamp if stamp != name and time_of(stamp) is not None else None


def vdi_directory(vm: str, job: str, vdi: str) -> str:
    """Where the disks of one VDI lie."""
    return f"{VM_BACKUPS}/{vm}/{VDIS}/{job}/{vdi}"


def is_alias(path: str) -> bool:
    """Does it name another place, rather than hold a disk?"""
    return path.endswith(ALIAS)


def block_path(directory: str, block: int) -> str:
    """The file of a block in a VHD directory."""
    high, low = divmod(block, _BLOCKS_A_DIRECTORY)
    return f"{directory}/{BLOCKS}/{high}/{low}"


def merge_state_path(parent: str) -> str:
    """The file that is there while other disks are merged into ``parent``."""
    directory, name = posixpath.split(parent)
    return posixpath.join(directory, f".{name}{_MERGE}")


def merging_parent(name: str) -> str | None:
    """The disk a state file is about, by the file's name; None if it is no state file."""
    if name.startswith(".") and name.endswith(_MERGE) and len(name) > len(_MERGE) + 1:
        return name[1 : -len(_MERGE)]
    return None
