"""Copy-on-write overlays: what a VM writes while it runs off a restore point or an image.

::

    guest ── Overlay ──┬── data      what was written          DIR/<export>/data
                       ├── map       which of it counts        DIR/<export>/map
                       └── base      everything else           never written
"""
