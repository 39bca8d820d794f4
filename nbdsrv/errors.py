"""What can go wrong on our side of the wire.

::

    NbdsrvError
    ├── ConfigError           what was asked for makes no sense: exit code 2
    ├── ListenError           cannot accept connections there
    └── DiskError             a disk cannot be opened, or an operation on it failed
        ├── CorruptImage      the file is broken; says where
        ├── UnsupportedImage  the file is fine, but not (yet) for us
        ├── StoreError        an object cannot be read or written (``store.store``)
        └── RepositoryError   a repository cannot be used: not ours, locked, wrong passphrase
            ├── PointMissing  it has no such point or disk
            └── PointDamaged  it has, and it cannot be read

Every message is one line that says what, where, and what the reader can do.
"""

import errno as os_errno
import os

__all__ = [
    "ConfigError",
    "CorruptImage",
    "DiskError",
    "ListenError",
    "NbdsrvError",
    "PointDamaged",
    "PointMissing",
    "RepositoryError",
    "UnsupportedImage",
]

MAX_TEXT = 1000
"""Characters of a message: room for two long paths; a name from inside an image can have any
number."""


class NbdsrvError(Exception):
    """Base of this package's errors."""


class ConfigError(NbdsrvError):
    """The command line or configuration asks for something impossible."""


class ListenError(NbdsrvError):
    """An address cannot be listened on."""


class DiskError(NbdsrvError):
    """An operation on a disk failed.

    Attributes:
        errno: the operating system's number, EIO if there was none.
        offset: first byte of the disk that is affected, or None. For a read, everything
            before it was read well.
    """

    def __init__(self, text: str, errno: int = os_errno.EIO, offset: int | None = None) -> None:
        super().__init__(_one_line(text))
        self.errno = errno
        self.offset = offset

    @classmethod
    def from_os(cls, what: str, error: OSError, offset: int | None = None) -> "DiskError":
        """Name the thing that failed: ``what`` is a path, or a verb and a path."""
        number = error.errno or os_errno.EIO
        return cls(f"{what}: {os.strerror(number)}", number, offset)


def _one_line(text: str) -> str:
    """What may hold names from inside an image, made fit for a line in a terminal or a log."""
    if len(text) > MAX_TEXT:
        text = f"{text[: MAX_TEXT * 2 // 3]} ... {text[-MAX_TEXT // 4 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class CorruptImage(DiskError):
    """An image contradicts itself. Message: ``corrupt image: FILE at OFFSET: what``."""


class UnsupportedImage(DiskError):
    """An image of a kind we do not serve."""


class RepositoryError(DiskError):
    """A repository cannot be opened, or not be used like that."""


class PointMissing(RepositoryError):
    """A repository has no restore point, or no disk in it, of that name."""


class PointDamaged(RepositoryError):
    """A restore point, or that disk of it, is damaged."""
