"""The tables of a chain's disks: made into layers, read ahead, and mended by what is known better.

::

    Chain ── make_layers ── read_tables ── mend_tables ──> layers of a ``XoDisk``
                            several at      blocks that our checksums know of
                            a time
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from nbdsrv.errors import DiskError, UnsupportedImage
from nbdsrv.repository.xo.chain import Chain
from nbdsrv.repository.xo.checks import BlockChecks
from nbdsrv.repository.xo.layers import (
    BlockLayer,
    DirectoryLayer,
    FileLayer,
    Layer,
    RemoteLayer,
)

__all__ = ["make_layers", "mend_tables", "read_tables"]

MAX_TABLES = 128 << 20
"""Bytes of the tables of a chain of VHD directories together: 1 PiB of disk times 2."""
TABLES_AT_ONCE = 8


def make_layers(chain: Chain, checks: Mapping[int, BlockChecks], *, distant: bool) -> list[Layer]:
    """The layers of a chain. Blocking: block tables of files are looked at.

    Args:
        chain: open.
        checks: by number of the disk in the chain.
        distant: are files in a bucket?

    Raises:
        UnsupportedImage: their tables do not fit memory.
        CorruptImage: one of them is damaged.
    """
    layers: list[Layer] = []
    size = chain.files[0].footer.size
    tables = 0
    for number, source in enumerate(chain.files):
        size = min(size, source.footer.size)
        if source.directory is not None:
            layers.append(DirectoryLayer(source, size))
            tables += source.header.blocks // 8
        elif distant or number in checks:
            layers.append(RemoteLayer(source, size))
        else:
            layers.append(FileLayer(source, size))
        if tables > MAX_TABLES:
            raise UnsupportedImage(f"{source.name}: the tables of its chain are too large")
    return layers


def read_tables(layers: Sequence[Layer]) -> None:
    """Read the tables of VHD directories, several at a time. Blocking.

    A hole is known once all have been looked at, and each takes half a millisecond to unpack, or a
    request. One that cannot be read is no error yet.
    """

    def read(layer: DirectoryLayer) -> None:
        with suppress(DiskError):
            layer.load()

    wanted = [layer for layer in layers if isinstance(layer, DirectoryLayer)]
    if len(wanted) > 1:
        with ThreadPoolExecutor(min(TABLES_AT_ONCE, len(wanted)), "nbdsrv-tables") as threads:
            list(threads.map(read, wanted))


def mend_tables(layers: Sequence[Layer], checks: Mapping[int, BlockChecks]) -> None:
    """Blocks that were backed up, and that a damaged table leaves out, count as there. Blocking.

    In a VHD directory they are, and are served; elsewhere reading them is an error.
    """
    for number, each in checks.items():
        layer = layers[number]
        with suppress(DiskError):  # of a table that cannot be read: whoever reads is told
            lost = each.lost(layer)
            if lost and isinstance(layer, BlockLayer):
                layer.insist(lost)
