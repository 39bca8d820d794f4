"""Starting a backup job: all disks at one moment, with as much as libvirt can tell of what changed.

::

    checkpoint and bitmaps ── libvirt cannot use one ──> an older one, in the end none: full
                           ── cannot keep new ones ────> none: every backup is a full one
                           ── the port is taken ───────> the next port

Each of these is an answer of libvirt's, not a guess: it is tried, and what libvirt said becomes the
reason in the report. All else is an error. After an attempt that failed nothing is left of it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.libvirt_address import LibvirtAddress
from nbdsrv.source.libvirt_checkpoints import PREFIX, Choice, choose
from nbdsrv.source.libvirt_line import CHECKPOINT_INCONSISTENT, NO_CHECKPOINT, Refused
from nbdsrv.source.libvirt_link import Link
from nbdsrv.source.libvirt_remains import end_job
from nbdsrv.source.libvirt_workplace import Workplace
from nbdsrv.source.libvirt_xml import (
    Checkpoint,
    DomainDisk,
    Listen,
    backup_xml,
    checkpoint_xml,
)

__all__ = ["Start", "untracked"]

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 1200
"""More than there are ports and checkpoints to try."""
MAGIC, OLD_VERSION = b"QFI\xfb", b"\0\0\0\2"


@dataclass(slots=True)
class Start:
    """How a backup is started; ``begin`` does it.

    Attributes:
        address: of the domain.
        place: the directory on this host.
        disks: to be backed up.
        known: by disk, what could be built upon, the best first.
        checkpoints: that libvirt has, by name.
        reasons: by disk that cannot be tracked, why.
        present: all disks that the domain has now.
        broken: checkpoints that libvirt could not use, and what it said.
        choices: by disk, once it has begun.
        listen: where it is served, once it has begun.
    """

    address: LibvirtAddress
    place: Workplace
    disks: Sequence[DomainDisk]
    known: Mapping[str, Sequence[str]]
    checkpoints: Mapping[str, Checkpoint]
    reasons: dict[str, str]
    present: Sequence[str]
    broken: dict[str, str] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    listen: Listen = field(default_factory=Listen)

    @property
    def checkpoint(self) -> str:
        """Name of the new checkpoint; "" if no disk can be tracked."""
        return PREFIX + self.place.token if self.tracked else ""

    @property
    def tracked(self) -> list[str]:
        """Disks with a bitmap from now on."""
        return [disk.target for disk in self.disks if disk.target not in self.reasons]

    async def begin(self, link: Link) -> None:
        """Start it.

        Cancellation may leave a job and a checkpoint of this token.

        Raises:
            SourceError: libvirt refuses; nothing is left of it.
        """
        ports = list(self.address.ports)
        for _ in range(MAX_ATTEMPTS):
            self.choices = {disk.target: self._choice(disk) for disk in self.disks}
            self.listen = self._listen(ports)
            try:
                await link.begin(self._backup(), self._new_checkpoint())
            except Refused as error:
                await self._take_back(link)
                if not self._learn(error, ports):
                    raise SourceError(f"{error}{self._hint(error)}") from error
                log.info("libvirt.again reason=%s", error)
            else:
                return
        raise SourceError(f"libvirt refuses again and again to back {self.address.domain} up")

    def _choice(self, disk: DomainDisk) -> Choice:
        reason = self.reasons.get(disk.target, "")
        if reason:
            return Choice(reason=reason)
        return choose(disk, self.known.get(disk.target, ()), self.checkpoints, self.broken)

    def _listen(self, ports: Sequence[int]) -> Listen:
        if not self.address.host:
            return Listen(socket=self.place.socket)
        return Listen(host=self.address.host, port=ports[0], tls=bool(self.address.tls))

    def _backup(self) -> str:
        names = [disk.target for disk in self.disks]
        scratch = {name: self._scratch(name) for name in names}
        since = {name: choice.since for name, choice in self.choices.items() if choice.since}
        return backup_xml(self.listen, names, scratch, since)

    def _scratch(self, disk: str) -> str:
        if not self.address.remote:
            return self.place.scratch(disk)
        return f"{self.address.scratch}/nbdsrv-libvirt-{self.place.token}.{disk}.scratch"

    def _new_checkpoint(self) -> str | None:
        if not self.tracked:
            return None
        return checkpoint_xml(self.checkpoint, "made by nbdsrv backup", self.tracked)

    async def _take_back(self, link: Link) -> None:
        await end_job(link, self.place.token)
        await link.delete_checkpoint(PREFIX + self.place.token)

    # --- what an error teaches --------------------------------------------------------------

    def _learn(self, error: Refused, ports: list[int]) -> bool:
        """Ask for less next time; False if there is nothing to be learnt of this error."""
        words = error.words
        used = {choice.since for choice in self.choices.values() if choice.since}
        about_bitmaps = "bitmap" in words.lower() or "checkpoint" in words.lower()
        if used and (error.code in (CHECKPOINT_INCONSISTENT, NO_CHECKPOINT) or about_bitmaps):
            named = {name for name in used if name in words} or used
            self.broken.update(dict.fromkeys(named, words))
            return True
        if self.tracked and about_bitmaps:
            self.reasons.update(dict.fromkeys(self.tracked, f"changes are not tracked: {words}"))
            return True
        if len(ports) > 1 and "address already in use" in words.lower():
            del ports[0]
            return True
        return False

    def _hint(self, error: Refused) -> str:
        """What the reader can do, where libvirt does not say it."""
        if "permission denied" in error.words.lower():
            home = self.address.scratch
            return f": QEMU must be allowed to write in {home}, by AppArmor and SELinux too"
        return ""


def untracked(disk: DomainDisk, *, persistent: bool, remote: bool) -> str:
    """Why changes of a disk cannot be tracked, as far as that is known before. Blocking.

    Args:
        disk: of the domain.
        persistent: is the domain?
        remote: are its images on another host?
    """
    if disk.read_only:
        return "changes are not tracked: the guest cannot write this disk"
    if disk.format != "qcow2":
        return f"changes are not tracked: the image is {disk.format}, and only qcow2 keeps bitmaps"
    if not persistent:
        return "changes are not tracked: the domain is transient, and libvirt forgets it"
    if not remote and disk.kind in ("file", "block") and _is_old(disk.images[0]):
        return (
            "changes are not tracked: the image is qcow2 version 2, which keeps no bitmaps;"
            f" `qemu-img amend -o compat=1.1 {disk.images[0]}` while the VM is shut off"
        )
    return ""


def _is_old(path: str) -> bool:
    """Is that qcow2 version 2? What cannot be read is taken for a new one: libvirt will say."""
    try:
        with open(path, "rb") as file:
            return file.read(8) == MAGIC + OLD_VERSION
    except OSError:
        return False
