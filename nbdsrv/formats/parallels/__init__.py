"""Parallels (Virtuozzo, OpenVZ ploop) expandable images."""

from nbdsrv.formats.parallels.reader import ParallelsDisk, open_parallels

__all__ = ["ParallelsDisk", "open_parallels"]
