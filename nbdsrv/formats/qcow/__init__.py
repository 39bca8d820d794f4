"""qcow, version 1: what QEMU wrote before qcow2."""

from nbdsrv.formats.qcow.reader import open_qcow

__all__ = ["open_qcow"]
