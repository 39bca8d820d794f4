"""A running VM as exports: its disks as they were when the server started, until it stops.

::

    serve qemu:/run/qmp.sock ── Moment ──> web/vda  web/vdb        both of the same moment
    SIGTERM ─────────────────── thawed     the checkpoints of backups are what they were

A VM with one disk, or a SOURCE that names one, is also the export ``""``.
"""

from collections.abc import Sequence
from functools import partial

from nbdsrv.disk.workers import Workers
from nbdsrv.export.exports import Collection, Export, is_name
from nbdsrv.source.moment import Moment
from nbdsrv.source.opening import Machine

__all__ = ["FrozenExports"]


class FrozenExports(Collection):
    """The disks of one VM at one moment."""

    def __init__(
        self, moment: Moment, name: str, *, prefix: str = "", tls_only: bool = False
    ) -> None:
        """Use ``open``."""
        self.name = name
        self.tls_only = tls_only
        self._moment = moment
        exports = [
            Export(
                f"{prefix}{moment.vm}/{disk.name}",
                partial(moment.disk, disk.name),
                f"disk {disk.name} of {moment.vm}, as it was",
                tls_only=tls_only,
            )
            for disk in moment.disks
        ]
        self._exports = {export.name: export for export in exports if is_name(export.name)}

    @classmethod
    async def open(
        cls, machine: Machine, workers: Workers, name: str, prefix: str = "", *, tls_only: bool
    ) -> "FrozenExports":
        """Freeze a VM.

        Raises:
            SourceError: it cannot be frozen.
        """
        moment = await Moment.open(machine, workers)
        return cls(moment, name, prefix=prefix, tls_only=tls_only)

    async def find(self, name: str) -> Export | None:
        """By name; the only disk also without one."""
        if not name and len(self._exports) == 1:
            return next(iter(self._exports.values()))
        return self._exports.get(name)

    async def listed(self) -> Sequence[tuple[str, str]]:
        """In the VM's order."""
        return [(export.name, export.description) for export in self._exports.values()]

    async def close(self) -> None:
        """Thaw; what is still open of it can no longer be read.

        Raises:
            SourceError: as ``Moment.close``.
        """
        await self._moment.close()
