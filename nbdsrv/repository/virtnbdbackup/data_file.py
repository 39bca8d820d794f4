"""A data file of a backup directory: what its name and its meta frame say.

::

    vda.full.data                    all of the disk; a checkpoint is made
    vda.copy.data                    all of it, no checkpoint; or the plain image of a raw disk
    vda.inc.virtnbdbackup.3.data     what has changed since checkpoint 2; a checkpoint is made
    vda.diff.1764120000.data         what has changed since the latest checkpoint; none is made
    ....data.partial                 being written, or given up
    ....data.chksum                  Adler-32 of the file, decimal

Rule: the name tells only what the meta frame does not (copy, difference, when). A file that is
called an increment may be a full backup: virtnbdbackup makes one when it does not trust the
checkpoint. What a file is made from is what its meta frame says, never what is beside it.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.repository.virtnbdbackup.stream import Meta, is_stream, read_meta, read_tail
from nbdsrv.store.tree import Node, Tree

__all__ = ["CHECKSUM", "PARTIAL", "DataFile", "Level", "data_name", "open_data", "read_data_file"]

PARTIAL = ".partial"
CHECKSUM = ".chksum"
_NAME = re.compile(r"(.+?)\.(?:(full|copy)|(inc|diff)\.(.+))\.data")


class Level(StrEnum):
    """What a file holds; the values are what ``ls`` shows."""

    FULL = "full"
    COPY = "copy"
    INCREMENT = "incremental"
    OFFLINE = "incremental, offline"
    DIFFERENCE = "differential"


_BY_NAME = {
    "full": Level.FULL,
    "copy": Level.COPY,
    "inc": Level.INCREMENT,
    "diff": Level.DIFFERENCE,
}


@dataclass(frozen=True, slots=True)
class DataFile:
    """One data file.

    Attributes:
        path: below the root.
        node: name, size and time of the file.
        disk: the libvirt target.
        level: what it holds.
        mark: what its name has behind ``inc.`` or ``diff.``, or "".
        meta: None for a plain image, and where it cannot be read.
        reason: why nothing can be read of it, or "".
        cut: what is missing at its end, or "".
    """

    path: str
    node: Node
    disk: str
    level: Level
    mark: str
    meta: Meta | None
    reason: str = ""
    cut: str = ""

    @property
    def plain(self) -> bool:
        """Is it the image itself?"""
        return self.meta is None and not self.reason

    @property
    def size(self) -> int:
        """Of the disk, bytes."""
        return self.node.size if self.meta is None else self.meta.size

    @property
    def created(self) -> float:
        """When the backup began, seconds since 1970; when it ended where nothing else tells."""
        if self.meta is None or self.meta.created is None:
            return self.node.modified
        return self.meta.created

    @property
    def checkpoint(self) -> str:
        """The checkpoint that was made, or that there is one of the same name."""
        return self.meta.checkpoint if self.meta else ""

    @property
    def since(self) -> str:
        """The checkpoint it is a change since; "" for a whole disk."""
        if self.meta is None or not self.meta.incremental:
            return ""
        # Driven without a list of checkpoints, an offline increment names its parent only once.
        return self.meta.parent or self.meta.checkpoint

    @property
    def makes(self) -> str:
        """The checkpoint that later increments may be a change since; "" if there is none."""
        return self.checkpoint if self.level in {Level.FULL, Level.INCREMENT} else ""


def data_name(name: str) -> tuple[str, str, str] | None:
    """Disk, level (full, copy, inc, diff) and mark of a file's name; None for other files."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return found[1], found[2] or found[3], found[4] or ""


def open_data(tree: Tree, path: str) -> ImageFile:
    """The file, open. Blocking.

    Raises:
        DiskError: it cannot be opened.
    """
    descriptor = tree.open_file(path)
    if descriptor is None:
        raise DiskError(f"{tree.full(path)}: is no file of this host")
    return ImageFile.from_descriptor(tree.full(path), descriptor)


def read_data_file(tree: Tree, path: str, node: Node) -> DataFile:
    """What a file says of itself: its first and its last bytes are read. Blocking.

    A file that cannot be read is no error: ``DataFile.reason`` says why.
    """
    named = data_name(node.name)
    assert named is not None, path
    disk, level, mark = named
    try:
        file = open_data(tree, path)
        try:
            # An end of a stream behind no beginning of one is a broken stream, and no image.
            plain = level in {"full", "copy"} and not is_stream(file) and not read_tail(file)
            if plain:
                cut = _cut_image(file)
                return DataFile(path, node, disk, _BY_NAME[level], mark, None, cut=cut)
            meta = read_meta(file)
            tail = read_tail(file)
        finally:
            file.close()
    except DiskError as error:
        return DataFile(path, node, disk, _BY_NAME[level], mark, None, reason=str(error))
    wanted = b"comp" if meta.packed else b"stop"
    cut = "" if tail is not None and tail.kind == wanted else f"{file.path} was cut short"
    return DataFile(path, node, meta.disk, _level(level, meta), mark, meta, cut=cut)


def _level(named: str, meta: Meta) -> Level:
    if not meta.incremental:
        return Level.COPY if named == "copy" else Level.FULL
    if named == "diff":
        return Level.DIFFERENCE
    # Of a domain that is shut off: no checkpoint can be made, the last one's bitmap is read.
    return Level.INCREMENT if meta.parent not in {"", meta.checkpoint} else Level.OFFLINE


def _cut_image(file: ImageFile) -> str:
    if file.size % 512:
        return f"{file.path} was cut short: {file.size} bytes are no whole number of sectors"
    return ""


def corrupt_chain(path: str, text: str) -> CorruptImage:
    """The error for a file that cannot be put together with others."""
    return CorruptImage(f"corrupt image: {path}: {text}")
