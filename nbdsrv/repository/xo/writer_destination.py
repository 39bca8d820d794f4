"""A Xen Orchestra repository as one that backups go to: ``--to xo:/path``.

::

    /path            encryption.json ── key ── Remote ── points, parents
                     xo-vm-backups/             made if the directory is empty

Only directories: a remote in a bucket has no lock, and Xen Orchestra itself writes there without.
"""

import os
from collections.abc import Callable, Sequence

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError, RepositoryError
from nbdsrv.export.grammar import Source
from nbdsrv.repository.destination import Destination, KnownPoint, Occasion, Storage
from nbdsrv.repository.xo.layout import ENCRYPTION, METADATA, VM_BACKUPS
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.repository.xo.sealing import read_sealing
from nbdsrv.repository.xo.writer import XoPointWriter, begin
from nbdsrv.repository.xo.writer_parent import chain_length
from nbdsrv.repository.xo.writer_place import Place
from nbdsrv.repository.xo.writer_points import XoPoint, keys_of_group, read_point
from nbdsrv.repository.xo.writer_vessel import FILE
from nbdsrv.repository.xo.writer_vhd import BLOCK
from nbdsrv.store.directory_tree import DirectoryTree

__all__ = ["MAX_DELTAS", "XoDestination", "open_xo_destination"]

MAX_DELTAS = 30
"""Deltas upon a full disk, then there is a full one again: each one more is opened by every read,
and any that is lost takes all later ones with it."""
MAX_GROUP = 200


class XoDestination(Destination):
    """One remote.

    Attributes:
        remote: to be read.
        writing: to be written.
        storage: how disks are stored.
    """

    granularity = BLOCK

    def __init__(self, remote: Remote, writing: Place, storage: Storage) -> None:
        """Becomes the owner of ``remote``'s tree."""
        self.name = remote.name
        self.place = f"xo {os.path.realpath(writing.root)}"
        self.remote = remote
        self.writing = writing
        self.storage = storage

    def check_group(self, group: str) -> None:
        """As promised."""
        if not 0 < len(group.encode(errors="replace")) <= MAX_GROUP or not group.isprintable():
            text = f"a group's name has 1 to {MAX_GROUP} bytes, all of them printable"
            raise RepositoryError(f"{self.name}: {text}")

    def stored(self, group: str) -> Sequence[str]:
        """As promised; the latest point of each VM is read for the VM's name."""
        return keys_of_group(self.remote, group)

    def point(self, key: str) -> XoPoint:
        """As promised."""
        return read_point(self.remote, key)

    def prove(self, point: KnownPoint, disk: str) -> None:
        """Its chain is there, each disk the one its child was made from."""
        assert isinstance(point, XoPoint)
        found = point.disk(disk)
        if found is not None:
            chain_length(self.remote, found.path)

    def renewal(self, group: str) -> str:
        """A chain must not grow for ever, and has one layout."""
        for key in reversed(self.stored(group)):
            try:
                point = self.point(key)
                for disk in point.disks:
                    length, layout, packing = chain_length(self.remote, disk.path)
                    if length > MAX_DELTAS:
                        return f"{disk.name} of {point.id} lies upon {length - 1} others"
                    if self.storage.layout not in {"", layout}:
                        return f"--layout {self.storage.layout}, and {point.id} has a {layout}"
                    if self.storage.packing not in {"", packing} and layout != FILE:
                        return f"--packing {self.storage.packing}, and {point.id} has {packing}"
            except DiskError:
                continue  # whoever chooses the parent says so
            if point.disks:
                break
        return ""

    async def begin(
        self, workers: Workers, occasion: Occasion, parent: KnownPoint | None
    ) -> XoPointWriter:
        """As promised."""
        assert parent is None or isinstance(parent, XoPoint)
        self.check_group(occasion.group)
        return await begin(self.writing, self.remote, workers, occasion, self.storage, parent)

    def close(self) -> None:
        """As promised."""
        self.remote.tree.close()


def open_xo_destination(
    source: Source, storage: Storage, passphrase: Callable[[], str]
) -> XoDestination:
    """The remote in a directory; an empty directory becomes one. Blocking.

    Raises:
        ConfigError: it is encrypted, and there is no key, or plain VHDs were asked for.
        RepositoryError: it is no remote, or the key is wrong.
        DiskError: it cannot be read.
    """
    tree = DirectoryTree(source.location)
    try:
        names = {node.name for node in tree.entries()}
        if names and not names & {ENCRYPTION, METADATA, VM_BACKUPS}:
            text = f"{source.text}: neither empty nor a backup repository of Xen Orchestra"
            raise RepositoryError(f"{text}; give the directory that holds {VM_BACKUPS}")
        remote = Remote(tree, read_sealing(tree, passphrase))
        if remote.encrypted and storage.layout == FILE:
            text = f"{source.text}: is encrypted, which VHDs in one file cannot be"
            raise ConfigError(f"{text}; use --layout vhd-directory")
        return XoDestination(remote, Place(source.location), storage)
    except BaseException:
        tree.close()
        raise
