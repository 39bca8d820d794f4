"""VHDX: Hyper-V's disk format; fixed, dynamic, differencing, with a log."""

from nbdsrv.formats.vhdx.reader import open_vhdx

__all__ = ["open_vhdx"]
