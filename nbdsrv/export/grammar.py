"""SOURCE: the one grammar for every disk (docs/usage.md).

::

    SOURCE  = DISK [ "~p" N ]
    DISK    = FORMAT ":" PATH | REPOSITORY ":" PATH [ "#" GROUP/DISK@POINT ]
            | URI | HYPERVISOR | PATH

Kinds that are not served yet are recognised here all the same, so that their users read which
kind it is instead of "no such file".
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum, auto

from nbdsrv.errors import ConfigError

__all__ = ["NATIVE", "Kind", "Source", "is_native", "is_nbd", "parse_source", "unknown_kind"]


class Kind(Enum):
    """What a SOURCE names."""

    IMAGE = auto()
    NBD = auto()
    REPOSITORY = auto()
    HYPERVISOR = auto()


FORMATS = frozenset(
    {
        "raw",
        "qcow2",
        "qcow",
        "vhd",
        "vhdx",
        "vmdk",
        "vdi",
        "parallels",
        "ova",
        "xva",
        "gzip",
        "xz",
        "zstd",
    }
)
REPOSITORIES = frozenset(
    {
        "repo",
        "repo+s3",
        "xo",
        "xo+s3",
        "pbs",
        "virtnbdbackup",
        "casync",
        "benji",
        "restic",
        "borg",
    }
)
NATIVE = frozenset({"repo", "repo+s3"})
"""Repositories of our own format."""
HYPERVISORS = frozenset({"qemu", "libvirt", "xapi"})

_SCHEME = re.compile(r"([a-z][a-z0-9+]*):(.*)", re.DOTALL)
_NBD = re.compile(r"nbds?(?:\+tcp|\+unix)?:|(?i:nbds?(?:\+[a-z0-9]+)?://)")
"""Also what only looks like an NBD URI, nbd+vsock://...: its parser says what is wrong with it."""
_MEANT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(?::|//)")
"""What looks like a kind: ndb://host, qcow3:disk.img, nbd//host."""
_CALLED = {"vpc": "vhd", "s3": "repo+s3"}
"""What others call it."""
_PARTITION = re.compile(r"(.*)~p([0-9]+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed SOURCE.

    Attributes:
        text: as it was given.
        scheme: format, repository or hypervisor kind; "" for an image to be probed.
        location: path or URI, without scheme, selector and partition.
        selector: what follows ``#`` in a repository or hypervisor, or "".
        partition: N of ``~pN``, or None for the whole disk.
    """

    text: str
    kind: Kind
    scheme: str
    location: str
    selector: str = ""
    partition: int | None = None


def is_native(text: str) -> bool:
    """Does a TARGET name a repository of ours?"""
    scheme, colon, _ = text.partition(":")
    return bool(colon) and scheme in NATIVE


def is_nbd(text: str) -> bool:
    """Is it an NBD URI, or meant to be one?"""
    return bool(_NBD.match(text))


def unknown_kind(path: str) -> str | None:
    """Of a path that is not there: what is wrong with the kind it begins with, if it has one."""
    match = _MEANT.match(path)
    if match is None:
        return None
    known = ["nbd", "nbds", "nbd+unix", "nbds+unix", *FORMATS, *REPOSITORIES, *HYPERVISORS]
    name = match[1].lower()
    near = [_CALLED[name]] if name in _CALLED else get_close_matches(name, known, 2)
    hint = f"did you mean {': or '.join(near)}:?" if near else "docs/usage.md has all of them"
    return f"no such file, and no SOURCE begins with {match[0]!r}; {hint}"


def parse_source(text: str) -> Source:
    """Parse one SOURCE.

    Raises:
        ConfigError: empty, or a partition number that makes no sense.
    """
    rest, partition = text, None
    if match := _PARTITION.fullmatch(text):
        rest = match[1]
        partition = int(match[2]) if len(match[2]) < 9 else 0  # int() has a limit of its own
        if not 1 <= partition <= 128:
            raise ConfigError(f"{text}: partitions are numbered from 1 to 128")
    if not rest:
        raise ConfigError("an empty SOURCE; give an image, for instance disk.img")
    if is_nbd(rest):
        return Source(text, Kind.NBD, rest.partition(":")[0].lower(), rest, "", partition)
    match = _SCHEME.fullmatch(rest)
    scheme = match[1] if match else ""
    for kind, schemes in _KINDS.items():
        if match and scheme in schemes:
            location, _, selector = match[2].partition("#")
            if not location:
                raise ConfigError(f"{text}: nothing behind {scheme}:")
            return Source(text, kind, scheme, location, selector, partition)
    if match and scheme in FORMATS:
        if not match[2]:
            raise ConfigError(f"{text}: nothing behind {scheme}:")
        return Source(text, Kind.IMAGE, scheme, match[2], "", partition)
    return Source(text, Kind.IMAGE, "", rest, "", partition)


_KINDS = {Kind.REPOSITORY: REPOSITORIES, Kind.HYPERVISOR: HYPERVISORS}
