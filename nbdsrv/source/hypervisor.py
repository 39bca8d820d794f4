"""The seam to a hypervisor: a VM's disks, frozen at one moment, and what changed since another.

::

    async with source.freeze(known) as frozen:    from now on changes are tracked anew
        frozen.disks ── NBD URI ── read           the VM runs on
        await frozen.succeed()                    the next backup builds upon this moment
    # left without it, or by an error: the old checkpoint is in force again, no change is lost

Rule: whatever happens to us (an error, kill -9, the host), the next backup sees every change since
the last one that succeeded. Where that cannot be promised the next one is told why it is full.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError

__all__ = ["Frozen", "FrozenDisk", "Hypervisor", "OpenFrozen", "SourceError"]

OpenFrozen = Callable[[Workers, Sequence[str]], AbstractAsyncContextManager[Disk]]
"""Opens a frozen disk, asking its server for these meta contexts besides its own."""


class SourceError(DiskError):
    """A hypervisor cannot be reached, or refuses. Says which, what, and what to do."""


@dataclass(frozen=True, slots=True)
class FrozenDisk:
    """One disk of a VM at one moment.

    Attributes:
        name: as the hypervisor calls it: ``vda``, ``xvda``; unique in the VM.
        uri: where it is served; with secrets in it, never to be shown.
        size: bytes.
        context: the meta context whose extents with flag 1 have changed since ``since``; "" if
            nothing tells.
        since: identity of the checkpoint that ``context`` begins at; "" if none.
        checkpoint: identity of this moment, for the next backup; "" if changes are not tracked.
        reason: why nothing tells what changed, where that is so.
        tls: for the connection, by the names of ``net.client_tls.Credentials``: ``ca``, ``cert``,
            ``key`` (files), ``exact`` (the server's certificate, PEM text), ``hostname``.
        connections: at most so many to this server, with its other disks together; 0: no limit.
        facts: what else is known, for the point.
        open: opens it, where ``uri`` alone does not tell everything; None: by ``uri``.
    """

    name: str
    uri: str
    size: int
    context: str = ""
    since: str = ""
    checkpoint: str = ""
    reason: str = ""
    tls: Mapping[str, str] = field(default_factory=dict)
    connections: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    open: OpenFrozen | None = None


class Frozen(ABC):
    """The disks of one VM, frozen. Belongs to one event loop.

    Attributes:
        vm: its name.
        disks: in the VM's order.
        consistency: ``crash``, or ``filesystem`` if the guest's file systems were frozen.
        facts: the VM's configuration and what else a restore needs; JSON.
    """

    vm: str
    disks: Sequence[FrozenDisk]
    consistency: str
    facts: Mapping[str, Any]

    def hurry(self) -> None:
        """We are to end soon: a hypervisor that says nothing is not waited for as long as usual."""

    async def still_frozen(self) -> None:
        """Ask before anything that was read is committed.

        Raises:
            SourceError: the moment is lost (the scratch space is full, the VM has ended): what
                was read may be of a later one.
        """

    @abstractmethod
    async def succeed(self, needed: Collection[str] = ()) -> None:
        """Everything is stored: the checkpoint advances.

        Args:
            needed: older checkpoints that a repository which failed this time will want to build
                upon; they are kept if that can be. All others may go.

        Raises:
            SourceError: it could not. The points stored are good; the next backup may be full.
        """


class Hypervisor(ABC):
    """A VM that can be frozen."""

    @abstractmethod
    async def vm(self) -> str:
        """Its name, as in ``Frozen.vm``: where its points are kept unless the user says otherwise.

        Raises:
            SourceError: it cannot be asked, or there is no such VM.
        """

    @abstractmethod
    def freeze(
        self, known: Mapping[str, Sequence[str]], disks: Sequence[str] = ()
    ) -> AbstractAsyncContextManager[Frozen]:
        """Freeze the VM's disks at one moment, until the end of the block.

        Args:
            known: by disk, the checkpoints that repositories have points of, the best first: those
                that all repositories know, from new to old, then the others. The first that the
                hypervisor still has and can vouch for is ``since``.
            disks: names of those wanted; all without any.

        Raises:
            SourceError: the VM cannot be frozen; nothing is left behind.
        """

    @abstractmethod
    async def clean(self) -> Sequence[str]:
        """Remove what crashed backups left (jobs, snapshots, exports, scratch files).

        Returns:
            What was removed, one line each.
        """
