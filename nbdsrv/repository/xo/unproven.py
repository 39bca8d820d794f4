"""What a verification could not prove, in sentences."""

from dataclasses import dataclass, field

from nbdsrv.repository.repository import LEVELS
from nbdsrv.repository.xo import filters
from nbdsrv.repository.xo.disk_file import DiskFile
from nbdsrv.repository.xo.remote import Remote

__all__ = ["Unproven"]

_NO_SUMS = "our own backups keep checksums beside"


@dataclass(slots=True)
class Unproven:
    """Collects while disks are looked at.

    Attributes:
        files: plain VHDs without checksums of ours.
        packed: VHD directories without them, by how they are packed.
        sealed: encrypted ones without them.
        sentences: of others.
    """

    files: int = 0
    packed: dict[str, int] = field(default_factory=dict)
    sealed: int = 0
    sentences: set[str] = field(default_factory=set)

    def add(self, remote: Remote, source: DiskFile, *, proven: bool) -> None:
        """One disk."""
        if proven:
            return
        if source.directory is None:
            self.files += 1
        elif remote.encrypted:
            self.sealed += 1
        else:
            self.packed[source.compression] = self.packed.get(source.compression, 0) + 1

    def told(self, level: str) -> list[str]:
        """All of it."""
        found = sorted(self.sentences)
        if level == LEVELS[0] or (level != LEVELS[-1] and (self.files or self.packed)):
            found.append("the content of blocks was not read; --level chunks does that")
        if self.files:
            text = f"{self.files} plain VHDs carry no checksum of their data: a flipped bit in a"
            found.append(f"{text} block cannot be seen ({_NO_SUMS})")
        if self.sealed:
            text = f"{self.sealed} encrypted VHD directories: nothing binds a block to its place,"
            found.append(f"{text} so two that were exchanged cannot be seen ({_NO_SUMS})")
        for packing, count in sorted(self.packed.items()):
            text = f"{count} VHD directories ({_PACKING[packing]}): "
            found.append(f"{text}{_LIMITS[packing]} ({_NO_SUMS})")
        return found


_PACKING = {filters.NONE: "not packed", filters.GZIP: "gzip", filters.BROTLI: "brotli"}
_LIMITS = {
    filters.NONE: "blocks carry no checksum: a flipped bit, or two exchanged, cannot be seen",
    filters.GZIP: "nothing binds a block to its place, two that were exchanged cannot be seen",
    filters.BROTLI: "brotli has no checksum: a flipped bit may unpack to other data, unseen",
}
