"""Damage: what was found broken, where, and whom it hurts.

::

    Finding   packs/0f/0fa9...pk at 81920: it was changed      broken content, one or many bytes
        Hurt      vm1/01HX... sda: 3 ranges, 786432 bytes      read as an error until it is mended
        copies    packs/77/77c1...pk                           the same content, intact elsewhere

    Note      not damage: garbage, a point that is missed, an index that must be made anew
    Check     what a verification did: findings, notes, and what the format cannot tell
"""

from dataclasses import dataclass, field

__all__ = ["MAX_RANGES", "Check", "Finding", "Hurt", "Note"]

MAX_RANGES = 64
"""Of one disk that are told; the bytes of all are counted."""


@dataclass(slots=True)
class Hurt:
    """What damage does to one disk of one point.

    Attributes:
        point: ``group/ulid``.
        disk: its name; "" for the whole point.
        ranges: (offset, length) of the disk that cannot be read, ascending, merged; the first of
            them.
        length: bytes of all.
    """

    point: str
    disk: str
    ranges: list[tuple[int, int]] = field(default_factory=list)
    length: int = 0

    def add(self, offset: int, length: int) -> None:
        """One more range; they come in ascending order."""
        self.length += length
        if self.ranges:
            last, size = self.ranges[-1]
            if last + size == offset:
                self.ranges[-1] = last, size + length
                return
        if len(self.ranges) < MAX_RANGES:
            self.ranges.append((offset, length))


@dataclass(slots=True)
class Finding:
    """Something is broken.

    Attributes:
        key: of the object.
        offset: in it; None: all of it, or where is not known.
        text: what is wrong.
        hurts: which disks cannot be read because of it.
        copies: keys of other packs that hold the same content.
        advice: what to do.
    """

    key: str
    offset: int | None
    text: str
    hurts: list[Hurt] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth knowing that is no damage."""

    key: str
    text: str


@dataclass(slots=True)
class Check:
    """What a verification of another tool's repository looked at, and found.

    Attributes:
        level: one of ``repository.LEVELS``.
        points: that were looked at.
        disks: of them.
        objects: files (of chunks, blocks, images) that were looked at.
        read_bytes: that were read for it.
        findings: what is broken.
        notes: what is not.
        unread: what could not be read: neither sound nor broken.
        unchecked: what this format has no means to check, a sentence each; or what this level
            left out.
    """

    level: str
    points: int = 0
    disks: int = 0
    objects: int = 0
    read_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
