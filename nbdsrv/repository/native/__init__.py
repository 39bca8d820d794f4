"""The native repository (docs/repository-format.md).

::

    Store ── config keys ── sealing ── pack ── entries      objects, encrypted and verified
                                        │
              index <── packs ──────────┤
                          │             slots (pages, roots) ── points
                        PointDisk                                the way from a point to bytes
"""
