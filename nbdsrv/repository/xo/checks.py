"""What proves the blocks of a disk, where something does.

Xen Orchestra keeps no checksum of a VHD's data. Our own backups put a file of them beside each
disk (``checksums``); then a block that was changed, exchanged with another, or that a damaged
table leaves out, is never served wrong.

A file of checksums that is itself damaged proves nothing: the disk is served without it, and
``verify`` tells. Otherwise a flipped bit in it would cost a good backup.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.xo.checksums import ChecksumFile
from nbdsrv.repository.xo.disk_file import DiskFile
from nbdsrv.repository.xo.layers import Layer
from nbdsrv.repository.xo.remote import Remote

__all__ = ["BlockChecks", "load_all_checks", "load_checks"]

log = logging.getLogger(__name__)

AT_ONCE = 16
"""Files of checksums asked for at a time where each is a request."""


class BlockChecks:
    """The checksums of one disk's own blocks. Thread-safe.

    Attributes:
        path: of the file they are in, in the repository; "" if it could not be read at all.
        damage: why it proves nothing, or None.
    """

    def __init__(self, file: ChecksumFile | None, name: str, damage: CorruptImage | None) -> None:
        """Args: file: of the disk. name: the disk's, for messages. damage: instead of a file."""
        self.path = file.path if file is not None else ""
        self.damage = damage
        self._file = file
        self._name = name
        if damage is not None:
            log.warning("xo.checksums disk=%r reason=%s", name, damage)

    def check(self, block: int, data: bytes) -> bool:
        """Look whether this is what was written as that block's data. Blocking.

        Returns:
            False if there is no checksum of it.

        Raises:
            CorruptImage: it is not.
            StoreError: the checksums cannot be read.
        """
        if self._file is None or self.damage is not None:
            return False
        try:
            known = self._file.check(block, data)
        except CorruptImage as error:
            self._give_up(error)
            return False
        if known is False:
            text = f"corrupt image: {self._name}: block {block} is not what was backed up"
            raise CorruptImage(f"{text}: its checksum is wrong")
        return known is not None

    def lost(self, layer: Layer) -> list[int]:
        """Blocks that were backed up, and that the disk's table does not name. Blocking.

        A table has no checksum of its own, and a bit that has flipped to 0 would let the parent's
        old content, or zeroes, through.

        Raises:
            CorruptImage: the table is damaged.
            StoreError: table or checksums cannot be read.
        """
        if self._file is None or self.damage is not None:
            return []
        if self._file.as_written({"bat": layer.table()}):
            return []  # no merge, and nothing else, has changed it
        present: set[int] = set()
        for first, end in layer.present(0, layer.blocks):
            present.update(range(first, end))
        try:
            return [block for block, _ in self._file.rows() if block not in present]
        except CorruptImage as error:
            self._give_up(error)
            return []

    def _give_up(self, error: CorruptImage) -> None:
        log.warning("xo.checksums disk=%r reason=%s", self._name, error)
        self.damage = error


def load_checks(remote: Remote, source: DiskFile) -> BlockChecks | None:
    """The checksums of a disk, if there are some. Blocking.

    Raises:
        StoreError: they cannot be read.
    """
    directory = source.path.rpartition("/")[0]
    try:
        uuid = str(source.unique_id)
        found = ChecksumFile.load(remote.tree, directory, uuid, remote.sealing)
    except CorruptImage as error:
        return BlockChecks(None, source.name, error)
    return None if found is None else BlockChecks(found, source.name, None)


def load_all_checks(remote: Remote, sources: Sequence[DiskFile]) -> dict[int, BlockChecks]:
    """The same of the disks of a chain, by number; without those that prove nothing. Blocking.

    Raises:
        StoreError: as ``load_checks``.
    """
    if remote.tree.distant and len(sources) > 1:
        with ThreadPoolExecutor(min(AT_ONCE, len(sources)), "nbdsrv-sums") as threads:
            loaded = list(threads.map(partial(load_checks, remote), sources))
    else:
        loaded = [load_checks(remote, source) for source in sources]
    return {
        number: each
        for number, each in enumerate(loaded)
        if each is not None and each.damage is None
    }
