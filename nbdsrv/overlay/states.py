"""What an overlay knows of a block, and what a frame of its journal may say.

======= ======================== ============= ===== =======================================
state   the guest reads          dirty bitmap  hole  becomes
======= ======================== ============= ===== =======================================
BASE    the base                 0             as    DATA by a write, ZERO by a trim,
                                               base  COPIED by ``adopt``
DATA    the data file            1             no    ZERO
ZERO    zeroes                   1             yes   DATA
COPIED  the data file, which     0             no    DATA, ZERO; its page is *watched* first
        holds what the base does
======= ======================== ============= ===== =======================================

Nothing becomes BASE again: what the data file holds of a block was right once, and a map that is
older than the data must never make a guest see it.

A write to a DATA block needs no word in the journal. To a COPIED block it would: should the power
fail between the bytes and the word, a changed block would count as unchanged, and a backup miss
it. So a page is *watched* (``WATCH``, durably) before the first of its COPIED blocks changes; of a
watched page, replay takes all COPIED blocks for DATA. ``UNWATCH`` ends it when all is durable.
"""

__all__ = ["BASE", "COPIED", "DATA", "DIRTY", "IN_FILE", "UNWATCH", "WATCH", "ZERO"]

BASE = 0
DATA = 1
ZERO = 2
COPIED = 3

WATCH = 0x10
"""Only in frames: from now on COPIED blocks of these pages may be changing."""
UNWATCH = 0x11
"""Only in frames: they are not."""

DIRTY = frozenset({DATA, ZERO})
IN_FILE = frozenset({DATA, COPIED})
