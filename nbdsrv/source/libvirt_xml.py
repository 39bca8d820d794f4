"""libvirt's XML, as far as a backup reads and writes it. Nothing here talks to libvirt.

::

    domain ──────────────> Domain: name, uuid, disks, is there an agent, who QEMU runs as
    domaincheckpoint ────> Checkpoint: name, which image each disk was then
    domainbackup ────────> where a running backup job has its socket and scratch files

    backup_xml      pull mode: a server, and per disk a scratch file and perhaps a checkpoint
    checkpoint_xml  the new checkpoint, with the same disks

Rule: what libvirt tells is bounded and has no document type, so no entities; what we tell it is
built as a tree, so that a path cannot become markup.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nbdsrv.source.hypervisor import SourceError

__all__ = [
    "Checkpoint",
    "Domain",
    "DomainDisk",
    "Listen",
    "backup_xml",
    "checkpoint_xml",
    "job_paths",
    "parse_checkpoint",
    "parse_domain",
]

MAX_XML = 16 << 20
"""Characters of a document. libvirt's own limit for a reply is 32 MiB; a domain has some 10 KiB."""
MAX_CHAIN = 256
"""Backing images of a disk, libvirt's own limit being 200."""
AGENT = "org.qemu.guest_agent.0"

_UNSUPPORTED = {
    "lun": "it is a SCSI device handed through",
    "vhostuser": "another process serves it",
    "vdpa": "its hardware serves it",
    "vhostvdpa": "its hardware serves it",
    "nvme": "it is an NVMe controller handed through",
}
"""Kinds of disks whose writes QEMU does not see, so that it cannot freeze them."""


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """A disk of a domain.

    Attributes:
        target: its name in the domain: ``vda``.
        images: where its content is, the top image first, then those it is backed by.
        format: of the top image: ``qcow2``, ``raw`` ...
        kind: what ``images`` are: ``file``, ``block``, ``network``, ``volume``.
        bus: ``virtio``, ``scsi`` ...
        serial: as the guest sees it, or "".
        read_only: the guest cannot write it.
        obstacle: why it cannot be backed up, or "".
    """

    target: str
    images: tuple[str, ...]
    format: str = "raw"
    kind: str = "file"
    bus: str = ""
    serial: str = ""
    read_only: bool = False
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain.

    Attributes:
        name: unique on its host.
        uuid: unique.
        disks: in its order; without drives that have a medium, like a CD.
        agent: does the guest's agent answer?
        owner: (uid, gid) that QEMU runs as, or None where libvirt does not tell.
    """

    name: str
    uuid: str
    disks: tuple[DomainDisk, ...]
    agent: bool = False
    owner: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint, whoever's.

    Attributes:
        name: unique in the domain.
        created: seconds since 1970.
        images: by disk that is tracked since then, its top image at that time; "" if unknown.
        description: free text.
    """

    name: str
    created: int
    images: Mapping[str, str]
    description: str = ""


@dataclass(frozen=True, slots=True)
class Listen:
    """Where QEMU serves a backup.

    Attributes:
        socket: path of a Unix socket, or "" for TCP.
        host: address on the hypervisor's host.
        port: TCP port.
        tls: with the certificates that libvirt has for backups (``backup_tls_x509_cert_dir``).
    """

    socket: str = ""
    host: str = ""
    port: int = 0
    tls: bool = False


# --- reading --------------------------------------------------------------------------------------


def parse_domain(text: str) -> Domain:
    """A domain, as it runs.

    Raises:
        SourceError: that is no domain.
    """
    root = _root(text, "domain")
    disks = tuple(_disks(root))
    targets = [disk.target for disk in disks]
    if len(set(targets)) < len(targets):
        raise SourceError("libvirt describes a domain with two disks of one name")
    channels = root.iterfind("devices/channel/target")
    agent = any(c.get("name") == AGENT and c.get("state") == "connected" for c in channels)
    return Domain(_text(root, "name"), _text(root, "uuid"), disks, agent, _owner(root))


def _disks(root: ET.Element) -> Iterator[DomainDisk]:
    for disk in root.iterfind("devices/disk"):
        target = disk.find("target")
        device = disk.get("device", "disk")
        if target is None or device in ("cdrom", "floppy"):
            continue
        kind = disk.get("type", "file")
        images = tuple(_images(disk))
        obstacle = _UNSUPPORTED.get(device) or _UNSUPPORTED.get(kind, "")
        if not images and not obstacle:
            continue  # an empty drive
        yield DomainDisk(
            target=target.get("dev", ""),
            images=images,
            format=_attribute(disk, "driver", "type") or "raw",
            kind=kind,
            bus=target.get("bus", ""),
            serial=_text(disk, "serial"),
            read_only=disk.find("readonly") is not None,
            obstacle=obstacle,
        )


def _images(disk: ET.Element) -> Iterator[str]:
    """The images of a chain, the top one first."""
    layer: ET.Element | None = disk
    for _ in range(MAX_CHAIN):
        source = layer.find("source") if layer is not None else None
        if layer is None or source is None:
            return
        place = _place(source)
        if place:
            yield place
        layer = layer.find("backingStore")


def _place(source: ET.Element) -> str:
    """One text for where an image is, of whatever kind; "" for nowhere."""
    for attribute in ("file", "dev", "dir"):
        if source.get(attribute):
            return source.get(attribute, "")
    if source.get("volume"):
        return f"{source.get('pool', '')}/{source.get('volume', '')}"
    if source.get("protocol"):
        host = source.find("host")
        where = "" if host is None else f"//{host.get('name', '')}:{host.get('port', '')}/"
        return f"{source.get('protocol', '')}:{where}{source.get('name', '')}"
    return ""


_LABEL = re.compile(r"\+?([0-9]{1,9}):\+?([0-9]{1,9})")


def _owner(root: ET.Element) -> tuple[int, int] | None:
    for label in root.iterfind("seclabel"):
        if label.get("model") == "dac":
            match = _LABEL.fullmatch(_text(label, "label"))
            if match:
                return int(match[1]), int(match[2])
    return None


def parse_checkpoint(text: str) -> Checkpoint:
    """A checkpoint.

    Raises:
        SourceError: that is none.
    """
    root = _root(text, "domaincheckpoint")
    then = {}
    domain = root.find("domain")
    if domain is not None:
        then = {disk.target: disk.images[0] for disk in _disks(domain) if disk.images}
    tracked = {
        disk.get("name", ""): then.get(disk.get("name", ""), "")
        for disk in root.iterfind("disks/disk")
        if disk.get("checkpoint", "bitmap") == "bitmap"
    }
    created = _text(root, "creationTime")
    seconds = int(created) if created.isdecimal() and len(created) < 16 else 0
    return Checkpoint(_text(root, "name"), seconds, tracked, _text(root, "description"))


def job_paths(text: str) -> list[str]:
    """The socket and the scratch files of a running backup job, as far as it has some.

    Raises:
        SourceError: that is no backup job.
    """
    root = _root(text, "domainbackup")
    paths = [_attribute(root, "server", "socket")]
    scratches = root.iterfind("disks/disk/scratch")
    paths += [scratch.get("file") or scratch.get("dev") or "" for scratch in scratches]
    return [path for path in paths if path]


def _root(text: str, tag: str) -> ET.Element:
    if len(text) > MAX_XML or "<!DOCTYPE" in text:
        raise SourceError(f"libvirt's XML of a {tag} has {len(text)} characters or a document type")
    try:
        root = ET.fromstring(text)  # noqa: S314 - bounded, and without a document type
    except ET.ParseError as error:
        raise SourceError(f"libvirt's XML of a {tag} cannot be read: {error}") from error
    if root.tag != tag:
        raise SourceError(f"libvirt has sent <{root.tag}> where <{tag}> was to be expected")
    return root


def _text(element: ET.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _attribute(element: ET.Element, path: str, name: str) -> str:
    found = element.find(path)
    return found.get(name, "") if found is not None else ""


# --- writing --------------------------------------------------------------------------------------


def backup_xml(
    listen: Listen,
    disks: Sequence[str],
    scratch: Mapping[str, str],
    since: Mapping[str, str],
) -> str:
    """A backup job in pull mode.

    Args:
        listen: where it is served.
        disks: to be backed up; each is exported under its own name. libvirt leaves the rest alone.
        scratch: by disk, the file that what the guest overwrites is kept in.
        since: by disk, the checkpoint whose changes are told as bitmap ``backup-DISK``; the
            others are served without one.
    """
    root = ET.Element("domainbackup", mode="pull")
    if listen.socket:
        ET.SubElement(root, "server", transport="unix", socket=listen.socket)
    else:
        server = ET.SubElement(
            root, "server", transport="tcp", name=listen.host, port=str(listen.port)
        )
        server.set("tls", "yes" if listen.tls else "no")
    listed = ET.SubElement(root, "disks")
    for name in disks:
        disk = ET.SubElement(listed, "disk", name=name, backup="yes", type="file", exportname=name)
        if name in since:
            disk.set("backupmode", "incremental")
            disk.set("incremental", since[name])
            disk.set("exportbitmap", f"backup-{name}")
        else:
            disk.set("backupmode", "full")
        ET.SubElement(disk, "driver", type="qcow2")
        ET.SubElement(disk, "scratch", file=scratch[name])
    return ET.tostring(root, encoding="unicode")


def checkpoint_xml(name: str, description: str, disks: Sequence[str]) -> str:
    """A checkpoint of these disks and no others."""
    root = ET.Element("domaincheckpoint")
    ET.SubElement(root, "name").text = name
    ET.SubElement(root, "description").text = description
    listed = ET.SubElement(root, "disks")
    for disk in disks:
        ET.SubElement(listed, "disk", name=disk, checkpoint="bitmap")
    return ET.tostring(root, encoding="unicode")
