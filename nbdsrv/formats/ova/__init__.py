"""OVA, a VM in a tar archive: its disks, served where they lie."""

from nbdsrv.formats.ova.reader import open_ova

__all__ = ["open_ova"]
