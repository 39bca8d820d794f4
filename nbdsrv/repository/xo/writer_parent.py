"""What a new disk can lie upon: the tip of its parent's chain, if we know every block of it.

::

    point P ── disk ──> 20260102.. <── 20260103.. <── 20260104..   tip: the new disk's parent
                        told since        `----- stale: told again -----'
                        here

The sums of the tip and of all below it, the newest first, say what the disk reads as. So all of
them must be there; without, the next point is a full one.
"""

import logging
from contextlib import closing

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.xo.chain import open_chain
from nbdsrv.repository.xo.checksums import ChecksumFile, Sums
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.repository.xo.writer_disk import Base, zero_sum
from nbdsrv.repository.xo.writer_lineage import Lineage

__all__ = ["base_of", "chain_length"]

log = logging.getLogger(__name__)


def base_of(
    remote: Remote, lineage: Lineage, unique_id: str, size: int, layout: str, packing: str
) -> Base | None:
    """What can be built upon the disk ``unique_id`` of a point; None: nothing. Blocking.

    Args:
        remote: the repository.
        lineage: of the disk's directory.
        unique_id: of the disk in the point that changes are told since.
        size: bytes of it there.
        layout: that the new disk must have, or "".
        packing: likewise.

    Raises:
        StoreError: the repository cannot be read.
    """
    member = lineage.find(unique_id)
    if member is None or lineage.merging or lineage.broken:
        return None
    above = lineage.above(member)
    if above is None:
        return None
    tip = above[-1] if above else member
    if (layout and layout != tip.layout) or (packing and packing != tip.packing):
        return None
    try:
        # Every disk of it must be there, and be the one its child was made from.
        chain_length(remote, tip.path)
        found = ChecksumFile.load(
            remote.tree, lineage.directory, str(tip.unique_id), remote.sealing
        )
        if found is None or not found.complete:
            return None
        sums, stale = _composed(found, unique_id)
    except CorruptImage as error:
        log.warning("xo.no_parent disk=%s reason=%s", member.path, error)
        return None
    return Base(tip, sums, stale, size)


def chain_length(remote: Remote, path: str) -> tuple[int, str, str]:
    """Disks of a chain, and layout and packing of its newest. Blocking.

    Raises:
        CorruptImage: one of them is missing, damaged, or another than its child was made from.
        StoreError: one cannot be read.
    """
    with closing(open_chain(remote, path, {})) as chain:
        newest = chain.files[0]
        return len(chain.files), newest.layout, newest.compression


def _composed(tip: ChecksumFile, since: str) -> tuple[Sums, frozenset[int]]:
    """Sums of what is not zeroes, and the blocks of the disks above ``since``."""
    sums, stale = Sums(), set[int]()
    chain = tip.chain()
    ids = [each.about.uuid for each in chain]
    # A merge that took it in has left its sums: it is no disk of its own any more, but counts.
    later = chain[: ids.index(since)] if since in ids else chain
    for each in later:
        stale.update(block for block, _ in each.rows())
    for each in reversed(chain):
        for block, value in each.rows():
            if value == zero_sum():
                sums.drop(block)
            else:
                sums.put(block, value)
    return sums, frozenset(stale)
