"""VHD: Virtual PC's, Hyper-V's older and XenServer's disk format; fixed, dynamic, differencing."""

from nbdsrv.formats.vhd.reader import open_vhd

__all__ = ["open_vhd"]
