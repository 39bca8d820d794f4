"""Raw disks compressed with gzip, xz or zstd, served without unpacking where that can be done."""

from nbdsrv.formats.compressed.opening import open_gzip, open_xz, open_zstd

__all__ = ["open_gzip", "open_xz", "open_zstd"]
