"""A Xen Orchestra repository as files that are decrypted: a tree and its cipher.

::

    read("xo-vm-backups/../20260101T020304Z.json") ── tree.read ── Sealing.open ──> content
    part(path, ...)                                   only where nothing is encrypted
"""

import errno as os_errno
import posixpath

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.xo.sealing import Sealing
from nbdsrv.store.store import StoreError
from nbdsrv.store.tree import Tree, joined

__all__ = ["Remote"]


class Remote:
    """What is read through. Thread-safe; all methods block.

    Attributes:
        tree: where the files are.
        sealing: how they are encrypted.
        name: for messages.
        identity: what stays when the remote is moved, or "".
    """

    def __init__(self, tree: Tree, sealing: Sealing, identity: str = "") -> None:
        self.tree = tree
        self.sealing = sealing
        self.identity = identity
        self.name = tree.name

    @property
    def encrypted(self) -> bool:
        """Must a file be read whole to know any of it?"""
        return self.sealing.overhead > 0

    def full(self, path: str) -> str:
        """For messages: where it is, and the path."""
        return self.tree.full(path)

    def read(self, path: str, limit: int) -> bytes:
        """A file's content, decrypted; at most ``limit`` bytes of it.

        Raises:
            ObjectMissing: there is no such file.
            CorruptImage: it is longer, damaged, or outside of the repository.
            StoreError: it cannot be read.
        """
        try:
            sealed = self.tree.read(path, limit + self.sealing.overhead)
        except StoreError as error:
            if error.errno == os_errno.EFBIG:
                text = f"corrupt image: {self.full(path)} at 0: longer than {limit} bytes"
                raise CorruptImage(text) from error
            raise
        return self.sealing.open(sealed, self.full(path))

    def beside(self, path: str, name: str) -> str:
        """What ``name``, found in the file ``path``, leads to from its directory.

        Raises:
            CorruptImage: out of the repository.
        """
        return joined(self.tree.name, posixpath.dirname(path), name)
