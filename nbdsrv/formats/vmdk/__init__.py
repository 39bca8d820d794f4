"""VMDK, VMware's disk images: read them all, write streams."""

from nbdsrv.formats.vmdk.reader import open_vmdk

__all__ = ["open_vmdk"]
