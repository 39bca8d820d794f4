"""From a directory's data files to chains and points.

::

    checkpoint    .0           .1            .2
    vda           full <────── inc <──────── inc          chains: by checkpoint names
                   ^────── offline inc
                                ^─── diff
    vdb           full <────── inc
    points        .0    +offline   .1   diff.1764120000   .2 (vda only)

A file that changes nothing but since a checkpoint stands on the one file that made it. The names
of checkpoints are the same in every directory, so that a file from another one would fit: that it
is not older than what it stands on is the only other thing to prove.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.virtnbdbackup.data_file import DataFile, Level, corrupt_chain
from nbdsrv.store.tree import Tree

__all__ = ["MAX_CHAIN", "Makers", "PointFiles", "chain_of", "makers_of", "points_of"]

MAX_CHAIN = 4096
"""Files of a chain: an increment each hour for half a year."""
CLOCK_SLACK_S = 2 * 3600
"""A local clock that is set back in autumn makes increments look older than what they change."""
SAME_RUN_S = 60
"""Differences of several disks that began within this belong together: they are named by the second
at which each disk's began."""


@dataclass(slots=True)
class PointFiles:
    """The files of a point: one for each disk.

    Attributes:
        id: a checkpoint's name, or what else tells it apart.
        files: in the order of the disks' names.
        twice: disks that have several files, and must not be guessed.
    """

    id: str
    files: list[DataFile] = field(default_factory=list)
    twice: set[str] = field(default_factory=set)

    @property
    def created(self) -> float:
        """When the first disk was begun, as far as that is known."""
        told = [each.created for each in self.files if each.meta is not None]
        return min(told or [each.created for each in self.files])

    def add(self, file: DataFile) -> None:
        """One more disk."""
        if any(each.disk == file.disk for each in self.files):
            self.twice.add(file.disk)
        else:
            self.files.append(file)


Makers = Mapping[tuple[str, str], Sequence[DataFile]]
"""The files that have made a checkpoint, by disk and checkpoint."""


def makers_of(files: Iterable[DataFile]) -> Makers:
    """What increments can stand on."""
    makers: dict[tuple[str, str], list[DataFile]] = {}
    for each in files:
        if each.makes:
            makers.setdefault((each.disk, each.makes), []).append(each)
    return makers


def chain_of(tree: Tree, file: DataFile, makers: Makers) -> Sequence[DataFile]:
    """What a file must be put together with: itself, what it stands on, ... the whole disk.

    Args:
        tree: for messages.
        file: the last one.
        makers: of its directory's checkpoints.

    Raises:
        CorruptImage: a file is missing, there are several, or one cannot be the parent.
    """
    chain = [file]
    seen = {file.path}
    while since := chain[-1].since:
        last = chain[-1]
        where = tree.full(last.path)
        found = [each for each in makers.get((file.disk, since), ()) if each is not last]
        if not found:
            text = f"it holds the changes since {since}, and no file that {file.disk} has made it"
            raise corrupt_chain(where, f"{text}; was it deleted?")
        if len(found) > 1:
            names = ", ".join(sorted(each.node.name for each in found[:4]))
            raise corrupt_chain(where, f"it holds the changes since {since}, made by {names}")
        parent = found[0]
        if parent.path in seen or len(chain) == MAX_CHAIN:
            raise corrupt_chain(where, "its chain of increments leads back to itself")
        _check_order(where, last, parent)
        chain.append(parent)
        seen.add(parent.path)
    for each in chain:
        if each.reason:
            raise CorruptImage(each.reason)
    return chain


def _check_order(where: str, file: DataFile, parent: DataFile) -> None:
    if file.meta is None or parent.meta is None:
        return
    mine, theirs = file.meta.created, parent.meta.created
    if mine is not None and theirs is not None and mine + CLOCK_SLACK_S < theirs:
        text = f"of {file.meta.date}, holds changes since {parent.node.name} of {parent.meta.date}"
        raise corrupt_chain(where, f"{text}: one of them is from another backup")


def points_of(files: Sequence[DataFile]) -> Sequence[PointFiles]:
    """The points of a directory, from old to new; unreadable files in those their names tell."""
    points: dict[str, PointFiles] = {}
    known = sorted(files, key=lambda each: each.disk)
    base = next((each.checkpoint for each in known if each.level is Level.FULL and each.meta), "")
    for file in known:
        if file.level is not Level.DIFFERENCE:
            id_ = _id(file, base)
            points.setdefault(id_, PointFiles(id_)).add(file)
    for point in _differences([each for each in known if each.level is Level.DIFFERENCE]):
        points[point.id] = point
    return sorted(points.values(), key=lambda point: (point.created, point.id))


def _id(file: DataFile, base: str) -> str:
    if file.meta is None and file.level is Level.INCREMENT:
        return file.mark
    if file.meta is None:
        # Raw disks are saved as they are, beside the others' full backup.
        return base or str(file.level)
    if file.level is Level.COPY:
        return str(file.level)
    if file.level is Level.OFFLINE:
        return f"{file.checkpoint}+offline"
    return file.checkpoint or str(file.level)


def _differences(files: Sequence[DataFile]) -> Iterable[PointFiles]:
    point: PointFiles | None = None
    first: DataFile | None = None
    for file in sorted(files, key=lambda each: (each.created, each.disk)):
        apart = (
            point is None
            or first is None
            or file.since != first.since
            or file.created > first.created + SAME_RUN_S
            or any(each.disk == file.disk for each in point.files)
        )
        if apart:
            if point is not None:
                yield point
            point, first = PointFiles(f"diff.{file.mark}"), file
        assert point is not None
        point.add(file)
    if point is not None:
        yield point
