"""Where each object of a repository stands (docs/repository-format.md, "Objects").

::

    nbdrepo.json                 what this is; written once
    keys/<slot>.json             the master key, wrapped
    packs/<aa>/<name>.pk         chunks             name: hash of the file, hex
    metas/<aa>/<name>.pk         pages and roots    the same format
    index/<ulid>.ix              id -> place
    points/<group>/<ulid>.pt     one restore point of one VM: the commit
    traces/<group>/<disk>.tr     what it reads when it boots (``boot_trace``); help, and no more
    leases/ condemned/ scrub/    <ulid>.json
    pins/<32 hex>.json           what overlay stands on which point (``pins``)

An object is named by its content or by a ULID: a name is never used twice.
"""

import re
from urllib.parse import quote, unquote

from nbdsrv.ulid import ULID_PATTERN, new_ulid, ulid_time

__all__ = [
    "CONDEMNED",
    "CONFIG",
    "INDEX",
    "KEYS",
    "LEASES",
    "METAS",
    "PACKS",
    "POINTS",
    "SCRUB",
    "group_of",
    "index_key",
    "is_text",
    "meta_key",
    "new_ulid",
    "pack_key",
    "pack_of",
    "point_key",
    "point_prefix",
    "ulid_of",
    "ulid_time",
]

CONFIG = "nbdrepo.json"
KEYS = "keys/"
PACKS = "packs/"
METAS = "metas/"
INDEX = "index/"
POINTS = "points/"
LEASES = "leases/"
CONDEMNED = "condemned/"
SCRUB = "scrub/"

MAX_GROUP = 200
"""Bytes of a group's name as it stands in a key: file systems take 255."""

_ULID = re.compile(ULID_PATTERN)
_PACK = re.compile(r"[0-9a-f]{64}\.pk")


def ulid_of(key: str) -> str | None:
    """The ULID an object's name begins with, or None if it is somebody else's file."""
    match = _ULID.match(key.rpartition("/")[2])
    return match[0] if match else None


def pack_key(name: bytes) -> str:
    """Of a pack of chunks; ``name`` is its hash, 32 bytes."""
    text = name.hex()
    return f"{PACKS}{text[:2]}/{text}.pk"


def meta_key(name: bytes) -> str:
    """Of a pack of pages and roots."""
    text = name.hex()
    return f"{METAS}{text[:2]}/{text}.pk"


def pack_of(key: str) -> bytes | None:
    """The hash in the name of a pack or meta pack; None for anything else."""
    name = key.rpartition("/")[2]
    if _PACK.fullmatch(name) is None:
        return None
    pack = bytes.fromhex(name[:64])
    # The same bytes under another key are a file somebody put there: not what a reader would open.
    return pack if key in {pack_key(pack), meta_key(pack)} else None


def index_key(ulid: str) -> str:
    """Of a segment of the index."""
    return f"{INDEX}{ulid}.ix"


def is_text(name: str) -> bool:
    """Can JSON hold it? Names of files that are not UTF-8 come as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def point_prefix(group: str) -> str:
    """Under which the points of a group stand.

    Raises:
        ValueError: no name of a group.
    """
    if not is_text(group):
        raise ValueError(f"a group's name is UTF-8, and {group!r} is not; choose another")
    quoted = quote(group, safe="").replace("~", "%7E")
    if quoted.startswith("."):
        quoted = "%2E" + quoted[1:]
    if not 0 < len(quoted) <= MAX_GROUP:
        raise ValueError(f"a group's name has 1 to {MAX_GROUP} bytes, this one {len(quoted)}")
    return f"{POINTS}{quoted}/"


def point_key(group: str, ulid: str) -> str:
    """Of one point."""
    return f"{point_prefix(group)}{ulid}.pt"


def group_of(key: str) -> str | None:
    """The group a point's key names; None if it is no point's key.

    A key that ``point_key`` would not make is none: what reads like a second copy of a point must
    not be counted, pruned or shown as one.
    """
    parts = key.split("/")
    ulid = ulid_of(key)
    if len(parts) != 3 or ulid is None:
        return None
    group = unquote(parts[1])
    try:
        return group if key == point_key(group, ulid) else None
    except ValueError:
        return None
