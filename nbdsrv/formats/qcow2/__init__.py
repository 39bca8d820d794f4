"""qcow2, versions 2 and 3.

::

    structs -> header -> snapshots, bitmaps      what the image says of itself
    faults -> claims -> entries                  L2 entries to Segments
    compression                                  compressed clusters
    reader -> opening                            the Disk, and what it needs below it
"""

from nbdsrv.formats.qcow2.opening import open_qcow2

__all__ = ["open_qcow2"]
