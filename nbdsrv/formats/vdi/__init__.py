"""VDI, VirtualBox's image format."""

from nbdsrv.formats.vdi.reader import VdiDisk, open_vdi

__all__ = ["VdiDisk", "open_vdi"]
