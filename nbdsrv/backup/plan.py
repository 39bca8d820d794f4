"""How a disk is backed up, and why.

====== ============================== ========================= ===========
parent who tells what changed         does it begin there?      mode
====== ============================== ========================= ===========
none                                                            full
yes    nobody                                                   scan
yes    ``nbdsrv:changed-since:P``     the parent was made of P  incremental
yes    the same                       it was not                scan
yes    another context (a bitmap)     --since POINT says so     incremental
yes    the same                       --since auto              scan
yes    a hypervisor, since C          the parent is of C        incremental
yes    the same                       it is not                 scan
====== ============================== ========================= ===========

A scan reads all data of the source and stores what is new; an incremental backup reads what is said
to have changed, and a sample of the rest. A disk is never read in part without proof that what told
the changes began where the parent ends: a bitmap that was cleared in between tells too little.
Nor where its size has changed: not everybody who tracks changes counts what a disk has grown by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from nbdsrv.backup.parent import Parent
from nbdsrv.disk.disk import Disk
from nbdsrv.export.grammar import Kind, Source
from nbdsrv.repository.destination import KnownDisk, KnownPoint
from nbdsrv.repository.native.layout import ulid_of
from nbdsrv.repository.repository import CHANGED_SINCE

__all__ = ["CHANGED_SINCE", "Mode", "Plan", "Tracking", "identity", "plan_disk", "wanted_contexts"]


NAMED = "named"


class Mode(StrEnum):
    """What is read of the source."""

    FULL = "full"
    INCREMENTAL = "incremental"
    SCAN = "scan"


@dataclass(frozen=True, slots=True)
class Plan:
    """For one disk in one repository.

    Attributes:
        mode: what is read.
        reason: why.
        context: tells the changes, in an incremental backup.
        cbt: under which identity the next backup can be told its changes; None if there is none.
    """

    mode: Mode
    reason: str
    context: str = ""
    cbt: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Tracking:
    """What a hypervisor says of a disk that it froze.

    Attributes:
        kind: of hypervisor: ``qemu``, ``libvirt``, ``xapi``.
        context: tells what has changed since ``since``; "" if nothing does.
        since: the checkpoint that ``context`` begins at, or "".
        checkpoint: this moment's, or "" if changes are not tracked from here on.
        reason: why nothing tells what changed.
    """

    kind: str
    context: str = ""
    since: str = ""
    checkpoint: str = ""
    reason: str = ""

    @property
    def cbt(self) -> dict[str, str] | None:
        """What the point remembers."""
        return {"kind": self.kind, "id": self.checkpoint} if self.checkpoint else None

    def began_at(self, record: KnownDisk) -> bool:
        """Is this disk of a point the state that ``since`` was?"""
        return bool(self.since) and record.cbt == {"kind": self.kind, "id": self.since}


def identity(disk: Disk, source: Source | None) -> str | None:
    """The point a source is, if it is one of a repository of ours; None for anything else."""
    if source is None or source.partition is not None:
        return None
    if source.kind is Kind.REPOSITORY and disk.format == "repo":  # others' ids are not unique
        point = disk.facts.get("point")
        return point if isinstance(point, str) else None
    if source.kind is Kind.NBD:
        # Of whatever server: it only counts where one has a context for what changed since it.
        from protocol.uri import parse

        if not disk.facts.get("read_only", True):
            return None  # an overlay over that point: clients have written to it, or may
        _, at, name = parse(source.location).export.rpartition("@")
        return name if at and ulid_of(name) == name else None
    return None


def wanted_contexts(changed: str, disk: str, parents: Sequence[Parent]) -> list[str]:
    """The meta contexts the source of ``disk`` should be asked for."""
    wanted = [changed] if changed else []
    for parent in parents:
        for context in _provable(parent, disk):
            if context not in wanted:
                wanted.append(context)
    return wanted


def plan_disk(
    name: str,
    parent: Parent,
    source: Disk,
    changed: str,
    point: str | None,
    tracking: Tracking | None = None,
) -> Plan:
    """Decide.

    Args:
        name: of the disk.
        parent: what was chosen for its group.
        source: open.
        changed: the context the user names, or "".
        point: the source's ``identity``.
        tracking: of a disk that a hypervisor froze; ``changed`` and ``point`` then say nothing.
    """
    if tracking is not None:
        return _plan_tracked(name, parent, source, tracking)
    cbt = {"kind": CHANGED_SINCE, "id": point} if point is not None else None
    if parent.record is None:
        return Plan(Mode.FULL, parent.reason, cbt=cbt)
    record = parent.record.disk(name)
    if record is None:
        return Plan(Mode.FULL, f"point {parent.record.id} has no disk {name!r}", cbt=cbt)
    also = f"; {parent.reason}" if parent.reason else ""
    provable = _provable(parent, name)
    if not changed:
        changed = next((each for each in provable if each in source.contexts), "")
    if not changed:
        return Plan(Mode.SCAN, f"nothing tells what changed{also}", cbt=cbt)
    doubt = _doubt(changed, parent, record)
    if not doubt and changed not in source.contexts:
        doubt = f"the source has no context {changed}"
    if doubt:
        return Plan(Mode.SCAN, doubt + also, cbt=cbt)
    if not changed.startswith(CHANGED_SINCE):
        cbt = {"kind": NAMED, "id": changed}
    reason = f"{changed} tells what changed since {parent.record.id}{also}"
    return Plan(Mode.INCREMENTAL, reason, changed, cbt)


def _plan_tracked(name: str, parent: Parent, source: Disk, tracking: Tracking) -> Plan:
    if parent.record is None:
        return Plan(Mode.FULL, parent.reason, cbt=tracking.cbt)
    record = parent.record.disk(name)
    if record is None:
        return Plan(Mode.FULL, f"point {parent.record.id} has no disk {name!r}", cbt=tracking.cbt)
    also = f"; {parent.reason}" if parent.reason else ""
    if doubt := _doubt_tracked(parent.record, record, source, tracking):
        return Plan(Mode.SCAN, doubt + also, cbt=tracking.cbt)
    reason = f"checkpoint {tracking.since} tells what changed since {parent.record.id}{also}"
    return Plan(Mode.INCREMENTAL, reason, tracking.context, tracking.cbt)


def _doubt_tracked(point: KnownPoint, record: KnownDisk, source: Disk, tracking: Tracking) -> str:
    """Why what the hypervisor tells may not be everything since the parent; "" if it is."""
    if not tracking.since or not tracking.context:
        return tracking.reason or "the hypervisor has no checkpoint that this can build upon"
    if not tracking.began_at(record):
        began = f"what changed is known since checkpoint {tracking.since}"
        of = record.cbt["id"] if record.cbt else "none"
        return f"{began}, and {point.id} is of {of}"
    if record.size != source.size:
        return f"its size has changed from {record.size} to {source.size} bytes"
    if tracking.context not in source.contexts:
        return f"its server has no context {tracking.context}"
    return ""


def _origin(record: KnownDisk) -> str:
    """The point of another repository that a disk was made of; "" if it was not."""
    cbt = record.cbt or {}
    return cbt.get("id", "") if cbt.get("kind") == CHANGED_SINCE else ""


def _provable(parent: Parent, disk: str) -> list[str]:
    """Contexts that are known to begin where the parent ends."""
    record = parent.record.disk(disk) if parent.record else None
    if parent.record is None or record is None:
        return []
    # A ULID alone is unique: another tool's ids may well be those of its other repositories too.
    points = (_origin(record), parent.record.id)
    return [CHANGED_SINCE + point for point in points if point and ulid_of(point) == point]


def _doubt(changed: str, parent: Parent, record: KnownDisk) -> str:
    """Why ``changed`` may not tell everything since the parent; "" if it does."""
    assert parent.record is not None
    if changed.startswith(CHANGED_SINCE):
        if changed in _provable(parent, record.name):
            return ""
        origin = _origin(record)
        made = f"was made of {origin}" if origin else "was made of no such point"
        return f"{changed} does not begin at {parent.record.id}, which {made}"
    if parent.named:
        return ""
    return f"nothing proves that {changed} begins at {parent.record.id}; say so by --since"
