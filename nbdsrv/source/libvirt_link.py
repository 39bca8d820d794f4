"""One domain by libvirt: every call that a backup makes, and nothing of what it is made for.

::

    Link ── Line (a thread) ── libvirt.virDomain ── libvirtd ── QEMU's monitor

Everything is asked anew each time: between two calls a domain may be shut off, migrated away,
undefined, or backed up by somebody else. libvirtd may be restarted in a backup of many hours, which
QEMU and the backup do not notice: a call that finds its connection dead is made once more on a new
one, if doing it twice does no harm.
"""

import re
from typing import Any

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.libvirt_line import (
    CALL_S,
    NO_BACKUP,
    NO_CHECKPOINT,
    NO_DOMAIN,
    Line,
    Refused,
    bindings,
)
from nbdsrv.source.libvirt_xml import Checkpoint, parse_checkpoint

__all__ = ["Link"]

BEGIN_S = 300.0
"""For starting a backup: QEMU formats the scratch files, and drains what is being written."""
AGENT_S = 120.0
"""For the guest's agent: freezing writes out what the guest has not written yet."""
MAX_CHECKPOINTS = 10_000
"""Of a domain; a qcow2 image has at most 65 535 bitmaps."""

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_INACTIVE = 2
_METADATA_ONLY = 2
_TOPOLOGICAL = 2
"""VIR_DOMAIN_XML_INACTIVE and the like; numbers that libvirt has promised to keep."""


class Link:
    """A connection and a domain; ``close`` it.

    All methods raise ``Refused`` where libvirt says no, and ``SourceError`` where it says nothing.
    """

    def __init__(self, line: Line, module: Any, uri: str, domain: Any) -> None:
        """``module``: libvirt's; ``domain``: a virDomain of a connection to ``uri``."""
        self._line = line
        self._module = module
        self._uri = uri
        self._domain = domain

    @classmethod
    async def open(cls, uri: str, domain: str) -> "Link":
        """Connect, and find a domain by its name or UUID.

        Raises:
            ConfigError: libvirt's Python module is not installed.
            SourceError: no connection, or no such domain; says which there are.
        """
        module = bindings()
        line = Line(f"libvirt {uri}")
        try:
            connection = await line.call("connecting", module.open, uri)
            try:
                found = await line.call(f"looking up {domain}", _look_up, connection, domain)
            except Refused as error:
                if error.code != NO_DOMAIN:
                    raise
                names = await line.call("listing domains", _names, connection)
                there = f"there are {', '.join(names)}" if names else "it has none"
                raise SourceError(f"{line.name} has no domain {domain!r}; {there}") from error
        except BaseException:
            await line.close()
            raise
        return cls(line, module, uri, found)

    async def close(self) -> None:
        """Disconnect. Idempotent."""
        try:
            await self._line.call("disconnecting", self._disconnect)
        except SourceError:
            pass  # it is gone already
        finally:
            await self._line.close()

    def _disconnect(self) -> None:
        self._domain.connect().close()

    async def _call(
        self, what: str, name: str, *args: object, again: bool = True, deadline_s: float = CALL_S
    ) -> Any:
        """Call a method of the domain; ``again``: may it be called twice?"""
        return await self._line.call(what, self._do, name, args, again, deadline_s=deadline_s)

    def _do(self, name: str, args: tuple[object, ...], again: bool) -> Any:  # noqa: FBT001
        try:
            return getattr(self._domain, name)(*args)
        except self._module.libvirtError:
            if not again or self._domain.connect().isAlive():
                raise
        uuid = self._domain.UUIDString()
        self._domain = self._module.open(self._uri).lookupByUUIDString(uuid)
        return getattr(self._domain, name)(*args)

    # --- what there is ------------------------------------------------------------------------

    async def uuid(self) -> str:
        """Of the domain."""
        return str(await self._call("asking for the UUID", "UUIDString"))

    async def name(self) -> str:
        """Of the domain."""
        return str(await self._call("asking for the name", "name"))

    async def is_running(self) -> bool:
        """Is there a QEMU, even a paused one?"""
        return bool(await self._call("asking for the state", "isActive"))

    async def is_persistent(self) -> bool:
        """Does libvirt know the domain, and its checkpoints, when it does not run?"""
        return bool(await self._call("asking for persistence", "isPersistent"))

    async def xml(self) -> str:
        """The domain as it runs."""
        return str(await self._call("reading the domain's XML", "XMLDesc", 0))

    async def definition(self) -> str:
        """The domain as it will be started next time."""
        return str(await self._call("reading the domain's XML", "XMLDesc", _INACTIVE))

    async def size(self, target: str) -> int:
        """Bytes of a disk, as the guest sees it."""
        info = await self._call(f"asking for the size of {target}", "blockInfo", target)
        return int(info[0])

    # --- the backup job -----------------------------------------------------------------------

    async def job(self) -> str | None:
        """The XML of the backup job that is running, whoever's; None if there is none."""
        try:
            return str(await self._call("asking for backups", "backupGetXMLDesc"))
        except Refused as error:
            if error.code == NO_BACKUP:
                return None
            raise

    async def begin(self, backup: str, checkpoint: str | None) -> None:
        """Start a backup job, and with it a checkpoint.

        An error may leave the checkpoint: libvirt does not take it back if it was only the export
        that failed.
        """
        what = "starting a backup"
        await self._call(what, "backupBegin", backup, checkpoint, again=False, deadline_s=BEGIN_S)

    async def abort(self) -> None:
        """Tell whatever job there is to end; it does so a little later."""
        await self._call("ending the backup", "abortJob")

    # --- checkpoints --------------------------------------------------------------------------

    async def checkpoints(self) -> list[Checkpoint]:
        """All, whoever's, from old to new."""
        found = await self._call("listing checkpoints", "listAllCheckpoints", _TOPOLOGICAL)
        if len(found) > MAX_CHECKPOINTS:
            raise SourceError(f"{len(found)} checkpoints of a domain are more than can be right")
        texts = await self._line.call("reading checkpoints", _texts, found)
        return [parse_checkpoint(text) for text in texts]

    async def delete_checkpoint(self, name: str, *, bitmaps: bool = True) -> bool:
        """Delete a checkpoint; False if there is none of that name.

        Args:
            name: of the checkpoint.
            bitmaps: delete its bitmaps too, which takes a running domain. Without that what is in
                the images stays there, unused and out of date.
        """
        flags = 0 if bitmaps else _METADATA_ONLY
        try:
            found = await self._call("looking up a checkpoint", "checkpointLookupByName", name)
            await self._line.call(f"deleting checkpoint {name}", found.delete, flags)
        except Refused as error:
            if error.code == NO_CHECKPOINT:
                return False
            raise
        return True

    # --- the guest ----------------------------------------------------------------------------

    async def freeze_guest(self) -> int:
        """Have the guest's agent freeze all file systems; how many."""
        what = "freezing the guest"
        return int(await self._call(what, "fsFreeze", again=False, deadline_s=AGENT_S))

    async def thaw_guest(self) -> int:
        """Have it thaw them; how many. None being frozen is no error."""
        return int(await self._call("thawing the guest", "fsThaw", deadline_s=AGENT_S))


def _texts(checkpoints: list[Any]) -> list[str]:
    return [str(each.getXMLDesc()) for each in checkpoints]


def _look_up(connection: Any, domain: str) -> Any:
    if _UUID.fullmatch(domain):
        return connection.lookupByUUIDString(domain)
    return connection.lookupByName(domain)


def _names(connection: Any) -> list[str]:
    return sorted(str(each.name()) for each in connection.listAllDomains())[:20]
