"""Images with a table that says where each block lies: what qcow2, VHD, VMDK ... have in common.

::

    table ── _read_page ──> Segments ──> runs, extents      ``PagedDisk`` does everything
                |                                           behind the arrow
    file   ..==|......|....|=====|##|..                     one own file that segments lie in,
                                                            unless they name another
"""

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.residency import Stored
from nbdsrv.disk.runs import FileRun
from nbdsrv.disk.workers import Workers
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.paged import PagedDisk

__all__ = ["MappedDisk"]


class MappedDisk(PagedDisk):
    """A ``PagedDisk`` with a file of its own.

    Attributes:
        file: the image's own file; more files are the subclass's to keep and close.
    """

    def __init__(self, workers: Workers, file: ImageFile, backing: Disk | None = None) -> None:
        """Becomes the owner of ``file`` and ``backing``."""
        super().__init__(workers, file.path, backing)
        self.file = file

    def _packed(self, key: int) -> tuple[int, int] | None:
        """Position and length, at most, of the block in ``file`` if decoding it is quick.

        Quick is a tenth of a millisecond: the loop may do it. Never blocks.
        """
        del key
        return None

    def _stored(self, key: int) -> Stored | None:
        where = self._packed(key)
        if where is None:
            return None
        file, (position, length) = self.file, where
        length = min(length, file.size - position)
        if length <= 0:
            return None
        return file.fd, file.base + position, length, file.residency

    def _file_run(self, file: ImageFile | None, position: int, length: int) -> FileRun:
        return (file or self.file).run(position, length)

    def _close_files(self) -> None:
        """Close every file, blocking; called once."""
        self.file.close()
