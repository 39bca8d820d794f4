"""OVF, the XML in front of an OVA: which disks there are and in which files.

::

    <Envelope>
      <References>   <File ovf:id="file1" ovf:href="disk1.vmdk" ovf:compression="gzip"/>
      <DiskSection>  <Disk ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:format="...vmdk..."/>

Names are compared without their namespaces, which differ between versions. A document type is
refused: OVF has none, and only there could entities that grow without bound be declared.

Facts relied on: DMTF DSP0243, "Open Virtualization Format Specification".
"""

from dataclasses import dataclass
from urllib.parse import unquote
from xml.parsers import expat

from nbdsrv.formats.image_file import ImageFile

__all__ = ["MAX_OVF", "OvfDisk", "parse_ovf"]

MAX_OVF = 4 << 20
"""Bytes; real ones have 10 to 100 KiB."""
MAX_DISKS = 1024
"""Disks, and files. A VM has at most 256 disks; an OVA may hold several VMs."""


@dataclass(frozen=True, slots=True)
class OvfDisk:
    """One disk of the package.

    Attributes:
        disk_id: as virtual hardware refers to it.
        file_name: of the file with its content, relative to the OVF.
        compression: of that file, "" for none.
        chunked: is the file cut into several?
        disk_format: a URI; says vmdk where it is one.
        parent: diskId of the disk it is a delta to, "" where it is complete.
    """

    disk_id: str
    file_name: str
    compression: str
    chunked: bool
    disk_format: str
    parent: str


def parse_ovf(file: ImageFile, position: int, data: bytes) -> tuple[OvfDisk, ...]:
    """The disks that have content, in order; ``data`` lies at ``position`` of ``file``.

    Raises:
        CorruptImage: not well-formed, or it contradicts itself.
    """
    files: dict[str, dict[str, str]] = {}
    disks: list[dict[str, str]] = []

    def element(name: str, attributes: dict[str, str]) -> None:
        local = {key.rpartition(" ")[2]: value for key, value in attributes.items()}
        match name.rpartition(" ")[2]:
            case "File" if local.get("id"):
                if files.setdefault(local["id"], local) is not local:
                    raise file.corrupt(position, f"two files with the id {local['id'][:60]!r}")
            case "Disk" if local.get("diskId"):
                disks.append(local)
        if len(files) + len(disks) > 2 * MAX_DISKS:
            raise file.corrupt(position, f"more than {MAX_DISKS} disks")

    def document_type(*_: object) -> None:
        raise file.corrupt(position, "the OVF has a document type")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = element
    parser.StartDoctypeDeclHandler = document_type
    parser.EntityDeclHandler = document_type
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        where = position + parser.ErrorByteIndex
        raise file.corrupt(where, f"the OVF is no XML: {error}") from error
    except (ValueError, LookupError) as error:  # an encoding Python does not know
        raise file.corrupt(position, f"the OVF cannot be decoded: {error}") from error
    return tuple(_disk(file, position, disk, files) for disk in disks if disk.get("fileRef"))


def _disk(
    file: ImageFile, position: int, disk: dict[str, str], files: dict[str, dict[str, str]]
) -> OvfDisk:
    reference = disk["fileRef"]
    found = files.get(reference)
    if found is None or not found.get("href"):
        raise file.corrupt(
            position,
            f"disk {disk['diskId'][:60]!r} is in a file {reference[:60]!r} that is not there",
        )
    compression = found.get("compression", "")
    return OvfDisk(
        disk_id=disk["diskId"],
        file_name=unquote(found["href"]),
        compression="" if compression == "identity" else compression,
        chunked="chunkSize" in found,
        disk_format=disk.get("format", ""),
        parent=disk.get("parentRef", ""),
    )
