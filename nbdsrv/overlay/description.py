"""overlay.json: what an overlay is over; and how a base is told from any other.

::

    {"format": 1, "id": "9f3c...", "export": "vm1/sda@latest", "source": "repo:/srv/backup",
     "size": 34359738368, "created": 1764115200.0,
     "base": {"format": "repo", "group": "vm1", "disk": "sda", "point": "01M8...", ...}}

==================== ==========================================================================
base                 witness
==================== ==========================================================================
a restore point      group, disk, point id and, of ours, ``image_id``: a hash over the content
VHD VHDX VMDK VDI    what the format calls the image by, and what it changes when it is written
any file             size and the time it was last changed, of each file of the chain: extents,
                     data files and the archive that it is a member of
NBD export           its name and size, no more: the server must be trusted
==================== ==========================================================================

Rule: an overlay over anything else than what it was made over is wrong content. Who cannot prove
the base is refused.
"""

import os
import re
import stat
from typing import Any

import msgspec

from nbdsrv.disk.disk import Disk
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage

__all__ = ["Description", "check_base", "decode", "encode", "identity_of"]

FORMAT = 1
MAX_CHAIN = 64
_KNOWN = (
    "group",
    "disk",
    "point",
    "image_id",
    "unique_id",
    "uuid",
    "disk_id",
    "data_write_guid",
    "content_id",
    "long_content_id",
    "snapshot",
    "export",
)
"""Facts that tell one disk from another; see ``Disk.facts``."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What an overlay says of itself.

    Attributes:
        format: of overlay.json and all that lies beside it.
        id: hex, 16 bytes; the map names it.
        export: name it was made for.
        source: the base as the operator named it.
        size: bytes.
        created: seconds since 1970.
        base: see ``identity_of``.
    """

    format: int
    id: str
    export: str
    source: str
    size: int
    created: float
    base: dict[str, Any]

    @property
    def id_bytes(self) -> bytes:
        """For the map."""
        return bytes.fromhex(self.id)

    @property
    def selector(self) -> str:
        """``GROUP/DISK@POINT`` of the restore point it, or its disk, is of; "" if of none."""
        point = self.base.get("point") or self.base.get("of_point")
        if not isinstance(point, str):
            return ""
        return f"{self.base.get('group')}/{self.base.get('disk')}@{point}"


def encode(description: Description) -> bytes:
    """The file."""
    return msgspec.json.format(msgspec.json.encode(description), indent=2) + b"\n"


def decode(data: bytes, path: str) -> Description:
    """From the file.

    Raises:
        CorruptImage: it makes no sense.
        UnsupportedImage: a later version's.
    """
    try:
        found = msgspec.json.decode(data, type=Description)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise CorruptImage(f"corrupt overlay: {path}: {error}") from error
    if found.format != FORMAT:
        text = f"{path}: an overlay of format {found.format}; use a newer nbdsrv"
        raise UnsupportedImage(text)
    if not re.fullmatch("[0-9a-f]{32}", found.id) or not 0 <= found.size < 1 << 62:
        raise CorruptImage(f"corrupt overlay: {path}: no overlay has such an id or size")
    return found


def identity_of(base: Disk, *, whole: bool = True) -> dict[str, Any]:
    """What tells this base from any other, without reading all of it. Blocking.

    Args:
        base: open.
        whole: is it all of what its facts speak of, and not a partition of it?
    """
    found: dict[str, Any] = {"format": base.format}
    for key in _KNOWN:
        value = base.facts.get(key)
        if isinstance(value, dict):  # a snapshot within an image
            value = value.get("id")
        if isinstance(value, str | int) and value != "":
            found[key] = value
    if not whole:
        for key in ("point", "image_id"):
            if key in found:
                found[f"of_{key}"] = found.pop(key)
        found["part"] = base.name.rpartition("~p")[2]
    names = [name for disk in _chain(base) for name in (disk.name, *disk.further_files)]
    files = [witness for witness in map(_witness, names) if witness is not None]
    if files:
        found["files"] = files
    return found


def _chain(base: Disk) -> list[Disk]:
    chain: list[Disk] = []
    disk: Disk | None = base
    while disk is not None and len(chain) < MAX_CHAIN:
        chain.append(disk)
        disk = disk.backing
    return chain


def _witness(name: str) -> dict[str, Any] | None:
    """Of the file that a Disk, a partition or a member of an archive is called by, if it is one."""
    path = name.rpartition("~p")[0] or name
    for candidate in (name, path, path.rpartition("#")[0]):
        try:
            info = os.stat(candidate)
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(info.st_mode):
            return {"name": os.path.basename(path), "size": info.st_size, "mtime": info.st_mtime_ns}
    return None


def check_base(description: Description, base: Disk, found: dict[str, Any], path: str) -> None:
    """Is that what the overlay is over?

    Args:
        description: the overlay's.
        base: open.
        found: its ``identity_of``.
        path: of the overlay, for messages.

    Raises:
        DiskError: it is not, or cannot be proven to be.
    """
    recorded = description.base
    what = ""
    if base.size != description.size:
        what = f"its size is {base.size} bytes, not {description.size}"
    else:
        for key in dict.fromkeys((*recorded, *found)):
            if key != "files" and recorded.get(key) != found.get(key):
                was, now = recorded.get(key, "none"), found.get(key, "none")
                what = f"its {key} is {now}, not {was}"
                break
        else:
            what = _changed_file(recorded.get("files"), found.get("files"))
    if what:
        raise DiskError(
            f"{base.name} is not what overlay {path} was made over: {what};"
            " serve that base, or another --overlay"
        )


def _changed_file(was: Any, now: Any) -> str:
    if was == now:
        return ""
    if not isinstance(was, list) or not isinstance(now, list) or len(was) != len(now):
        return "it consists of other files"
    for old, new in zip(was, now, strict=True):
        if not isinstance(old, dict) or old.get("size") != new["size"]:
            return f"the size of {new['name']} has changed"
        if old.get("mtime") != new["mtime"]:
            return f"{new['name']} has been written to since"
    return ""
