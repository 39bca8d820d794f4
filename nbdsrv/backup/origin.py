"""SOURCEs that are restore points of another tool's repository: what they keep in ours.

::

    xo:/remote#web/xvda@2026-01-02 ── selected ──> disk "root" of "web" at 2026-01-02T02:03:04Z
                                                     name      group        time, and labels

With ``backup`` such disks become a point as any others do; but that it is of today, and of a VM
that is called like a disk, nobody would expect. The labels are those of a migration, so that
``copy`` knows later that this point is there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nbdsrv.backup.migrate import CREATED, KIND, POINT, REPOSITORY, identity_of
from nbdsrv.disk.workers import Workers
from nbdsrv.export.grammar import Kind, Source
from nbdsrv.repository.opening import NATIVE, open_repository
from nbdsrv.repository.repository import Repository
from nbdsrv.repository.selector import select

__all__ = ["Origin", "is_foreign", "origins"]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a SOURCE is.

    Attributes:
        group: its VM.
        disk: its name there, with the partition's number behind it.
        created: seconds since 1970.
        labels: of a point that is made of it alone.
    """

    group: str
    disk: str
    created: float
    labels: Mapping[str, str] = field(default_factory=dict)


def is_foreign(source: Source) -> bool:
    """Is it a restore point that another tool has made?"""
    return source.kind is Kind.REPOSITORY and source.scheme not in NATIVE


async def origins(sources: Sequence[Source], workers: Workers) -> dict[str, Origin]:
    """What each of them is, by its text. Each repository is opened once.

    Raises:
        ConfigError: a passphrase is wanted.
        DiskError: there is no such point, or a repository cannot be opened.
    """
    found: dict[str, Origin] = {}
    places = {(source.scheme, source.location): source for source in sources}
    for place, any_of in places.items():
        repository = await open_repository(any_of, workers)
        try:
            for source in sources:
                if (source.scheme, source.location) == place:
                    found[source.text] = await _origin(repository, source)
        finally:
            await repository.close()
    return found


async def _origin(repository: Repository, source: Source) -> Origin:
    selected = await select(repository, source.selector)
    point, name = selected.point, selected.disk
    if source.partition is not None:
        return Origin(point.group, f"{name}-p{source.partition}", point.created)
    labels = {
        KIND: repository.kind,
        REPOSITORY: identity_of(repository),
        POINT: point.id,
        CREATED: repr(point.created),
    }
    return Origin(point.group, name, point.created, labels)
