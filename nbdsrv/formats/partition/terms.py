"""What the partition readers share: a Partition, and reading a few bytes of a Disk.

::

    offset
      |<---------- length ---------->|         bytes of the Disk, whatever its sectors are
"""

from dataclasses import dataclass

from nbdsrv.disk.disk import Disk
from nbdsrv.errors import CorruptImage

__all__ = ["Partition", "corrupt", "read"]


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition.

    Attributes:
        number: from 1, as Linux counts; logical partitions from 5.
        offset: bytes.
        length: bytes.
        kind: the MBR's type (``0x83``) or the GPT's type GUID.
        name: GPT only.
        entry: where the disk says so, bytes; for messages.
        extended: is it the container of logical partitions?
    """

    number: int
    offset: int
    length: int
    kind: str
    name: str
    entry: int
    extended: bool = False


async def read(disk: Disk, offset: int, length: int) -> bytes:
    """These bytes of the disk, fewer where it ends before."""
    length = min(length, disk.size - offset)
    if offset < 0 or length <= 0:
        return b""
    buffer = bytearray(length)
    await disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def corrupt(disk: Disk, offset: int, what: str) -> CorruptImage:
    """The error to raise; ``offset`` counts from the beginning of the disk."""
    return CorruptImage(f"corrupt image: {disk.name} at {offset}: {what}")
