"""What may be a key, and what may be asked for in a listing.

::

    packs/0f/0fa9...pk      components of [A-Za-z0-9._%-], divided by single slashes
    packs/                  a prefix: "" for everything, or a key and a slash
    .tmp/1234  a/../b  /a   never keys: hidden from listings, refused by every call

Rule: all stores ask here, so that a key one of them takes is taken by every other.
"""

import errno as os_errno
import re

from nbdsrv.store.store import StoreError

__all__ = ["check_key", "check_prefix", "is_key"]

MAX_KEY = 700
"""Bytes of a key: S3 stops at 1024 with the repository's prefix before it."""

_COMPONENT = r"[A-Za-z0-9_%-][A-Za-z0-9._%-]{0,254}"  # a file name, on every file system
_KEY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")


def is_key(text: str) -> bool:
    """Could an object have this key?"""
    return len(text) <= MAX_KEY and _KEY.fullmatch(text) is not None


def check_key(name: str, key: str) -> None:
    """Refuse what is no key.

    Args:
        name: the store's, for the message.
        key: what was asked for.

    Raises:
        StoreError: EINVAL; the caller has a bug, or trusts a key that it read somewhere.
    """
    if not is_key(key):
        raise StoreError(f"{name}: {key!r} cannot be the key of an object", os_errno.EINVAL)


def check_prefix(name: str, prefix: str) -> None:
    """Refuse what is neither "" nor a key and a slash; as ``check_key``."""
    if prefix and not (prefix.endswith("/") and is_key(prefix[:-1])):
        raise StoreError(f"{name}: {prefix!r} is not a prefix to list", os_errno.EINVAL)
