"""One disk as a point's metadata or a child names it: a VHD, or an alias and a VHD directory.

::

    20260101T020304Z.vhd              the VHD itself
    20260101T020304Z.alias.vhd        "data/20260101T020304Z.vhd" ── a VHD directory, or a VHD
    20260101T020304Z.alias.vhd/       a directory by that name: seen in the wild, and read

Rules: an alias leads to no other alias, and not out of the repository. The name of what it leads
to need not resemble its own: merges change one and not the other.
"""

from dataclasses import dataclass
from uuid import UUID

from nbdsrv.errors import CorruptImage, UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.vhd.metadata import Footer, Header, read_footer, read_header
from nbdsrv.formats.vhd.structs import DiskType
from nbdsrv.repository.xo.layout import is_alias
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.repository.xo.vhd_directory import (
    MAX_BLOCK_SIZE,
    MAX_BLOCKS,
    VhdDirectory,
    open_vhd_directory,
)
from nbdsrv.store.tree import Tree

__all__ = ["DiskFile", "TreeFile", "open_disk_file"]

MAX_ALIAS = 1024
"""Characters, as Xen Orchestra has it."""


class TreeFile:
    """A file of a bucket, read by ranges: what ``formats.vhd.metadata`` calls Readable."""

    def __init__(self, tree: Tree, path: str, size: int) -> None:
        self.path = tree.full(path)
        self.size = size
        self._tree = tree
        self._where = path

    def read(self, position: int, length: int, what: str) -> bytes:
        """Exactly these bytes; CorruptImage if the file ends before."""
        if position < 0 or length < 0 or position + length > self.size:
            raise self.corrupt(position, f"{what} lies beyond the end of the file ({self.size})")
        return self._tree.read_range(self._where, position, length) if length else b""

    def read_up_to(self, position: int, length: int) -> bytes:
        """At most these bytes."""
        return self.read(position, max(0, min(length, self.size - position)), "data")

    def corrupt(self, position: int, what: str) -> CorruptImage:
        """The error to raise."""
        return CorruptImage(f"corrupt image: {self.path} at {position}: {what}")

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class DiskFile:
    """One that is open, its footer and header proven by their checksums.

    Attributes:
        path: in the repository, as it is named: the alias's, if there is one.
        place: in the repository, where the data is: the same, or what the alias leads to.
        name: ``path`` for messages.
        footer: what it says.
        header: what it says.
        directory: the VHD directory, or None.
        file: the VHD, or None.
    """

    path: str
    place: str
    name: str
    footer: Footer
    header: Header
    directory: VhdDirectory | None = None
    file: ImageFile | TreeFile | None = None

    @property
    def unique_id(self) -> UUID:
        """What children know it by."""
        return self.footer.unique_id

    @property
    def differencing(self) -> bool:
        """Has it a parent? The footer says so, nothing else does."""
        return self.footer.disk_type == DiskType.DIFFERENCING

    @property
    def from_copy(self) -> bool:
        """Is the footer at its end lost, so that the copy at the beginning had to do?"""
        return self.file is not None and self.footer.data_end == self.file.size

    @property
    def layout(self) -> str:
        """``vhd`` or ``vhd-directory``."""
        return "vhd" if self.directory is None else "vhd-directory"

    @property
    def compression(self) -> str:
        """How blocks are packed: ``none``, ``gzip``, ``brotli``."""
        return "none" if self.directory is None else self.directory.filter

    def parent(self, remote: Remote) -> str:
        """The path of the parent it names.

        Raises:
            CorruptImage: it names none, or one outside of the repository.
        """
        text = self.header.parent_name.decode("utf-16-be", "replace").partition("\0")[0]
        if not text or not text.isprintable():
            raise self.corrupt(f"its parent's name is {text!r}")
        return remote.beside(self.path, text.replace("\\", "/"))

    def corrupt(self, what: str) -> CorruptImage:
        """The error to raise."""
        return CorruptImage(f"corrupt image: {self.name} at 0: {what}")

    def close(self) -> None:
        """Close the file; idempotent."""
        if self.file is not None:
            self.file.close()


def open_disk_file(remote: Remote, path: str) -> DiskFile:
    """Open a disk by the name it goes by. Blocking.

    Raises:
        ObjectMissing: there is nothing of that name.
        CorruptImage: it is damaged, or an alias that leads nowhere.
        UnsupportedImage: a kind of VHD that backups are not made of.
        StoreError: it cannot be read.
    """
    place = path
    node = remote.tree.find(path)
    if node is not None and is_alias(path) and not node.directory:
        place = _target(remote, path)
        node = remote.tree.find(place)
        if node is None:
            text = f"the alias leads to {remote.full(place)}, where nothing is"
            raise CorruptImage(f"corrupt image: {remote.full(path)} at 0: {text}")
    name = remote.full(path)
    if node is not None and node.directory:
        found = open_vhd_directory(remote, place)
        return DiskFile(path, place, name, found.footer, found.header, directory=found)
    fd = None if remote.tree.distant else remote.tree.open_file(place)
    file: ImageFile | TreeFile
    if fd is None:
        file = TreeFile(remote.tree, place, node.size if node is not None else 0)
    else:
        file = ImageFile.from_descriptor(remote.full(place), fd)
    try:
        footer, header = _metadata(file)
    except BaseException:
        file.close()
        raise
    return DiskFile(path, place, name, footer, header, file=file)


def _metadata(file: ImageFile | TreeFile) -> tuple[Footer, Header]:
    footer = read_footer(file)
    if footer.disk_type == DiskType.FIXED:
        raise UnsupportedImage(f"{file.path}: a fixed VHD; backups are made of dynamic ones")
    header = read_header(file, footer)
    if header.block_size > MAX_BLOCK_SIZE or header.table_entries > MAX_BLOCKS:
        text = f"a table of {header.table_entries} blocks of {header.block_size} bytes"
        raise UnsupportedImage(f"{file.path}: {text}: more than is read")
    return footer, header


def _target(remote: Remote, path: str) -> str:
    """Where an alias leads."""
    where = remote.full(path)
    raw = remote.read(path, 4 * MAX_ALIAS)
    try:
        text = raw.decode().strip()
    except UnicodeDecodeError as error:
        raise CorruptImage(f"corrupt image: {where} at 0: the alias is no text") from error
    if not text or len(text) > MAX_ALIAS or not text.isprintable():
        shown = repr(text[:40]) if text else "empty"
        raise CorruptImage(f"corrupt image: {where} at 0: the alias is {shown}, not a path")
    target = remote.beside(path, text)
    if is_alias(target):
        raise CorruptImage(f"corrupt image: {where} at 0: the alias leads to an alias, {text!r}")
    return target
