"""Partitions: a range of a disk found through its MBR or GPT."""

from nbdsrv.formats.partition.opening import open_partition, read_partitions
from nbdsrv.formats.partition.terms import Partition

__all__ = ["Partition", "open_partition", "read_partitions"]
