"""From ``repo:/path`` or ``repo+s3://bucket/prefix`` to a store."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from nbdsrv.errors import ConfigError
from nbdsrv.store.directory import DirectoryStore
from nbdsrv.store.keys import is_key
from nbdsrv.store.store import Store

__all__ = ["bucket_of", "needing_obstore", "open_store"]

MAX_PREFIX = 300
"""Bytes of a prefix: with the longest key it still fits what S3 takes."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")  # also what S3 took once


def open_store(scheme: str, location: str) -> Store:
    """The store that a SOURCE or TARGET names. Asks nothing of it: it need not exist yet.

    Args:
        scheme: ``repo`` or ``repo+s3``.
        location: a directory's path, or ``//bucket/prefix``; what follows ``#`` is cut off before.

    Raises:
        ConfigError: the location cannot be one, or what S3 needs is not installed or set.
    """
    if scheme == "repo":
        return _open_directory(location)
    if scheme == "repo+s3":
        return _open_bucket(location)
    raise ConfigError(f"{scheme}:{location}: not a kind of store; repo: and repo+s3: are")


def _open_directory(path: str) -> Store:
    if not path or "\0" in path:
        raise ConfigError(f"repo:{path}: not a directory's path")
    return DirectoryStore(path)


@contextmanager
def needing_obstore(text: str) -> Iterator[None]:
    """Around an import that needs it: whoever lacks it is told what to install.

    Args:
        text: what the user asked for.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != "obstore":
            raise
        raise ConfigError(f"{text}: S3 needs obstore; pip install 'nbdsrv[s3]'") from error


def bucket_of(scheme: str, location: str) -> tuple[str, str]:
    """Bucket and prefix of ``//bucket/prefix``.

    Raises:
        ConfigError: it is not of that form.
    """
    text = f"{scheme}:{location}"
    bucket, _, prefix = location.removeprefix("//").partition("/")
    prefix = prefix.removesuffix("/")
    if not location.startswith("//") or not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"{text}: not of the form {scheme}://bucket/prefix")
    if prefix and not (is_key(prefix) and len(prefix) <= MAX_PREFIX):
        raise ConfigError(
            f"{text}: {prefix!r} cannot be a prefix; letters, digits and . _ - % between slashes"
        )
    return bucket, prefix


def _open_bucket(location: str) -> Store:
    text = f"repo+s3:{location}"
    bucket, prefix = bucket_of("repo+s3", location)
    with needing_obstore(text):
        from nbdsrv.store.s3 import S3Store
    return S3Store(bucket, prefix)
