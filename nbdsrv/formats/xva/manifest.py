"""``ova.xml``: which disks an XVA holds.

::

    <value><struct> version ...
                    objects  array of  { class: VM,  id: Ref:0, snapshot: { name_label ... } }
                                       { class: VDI, id: Ref:2, snapshot: { uuid, name_label,
                                                                            virtual_size ... } }

It is XML-RPC: a struct is a list of members, each with a name and a value. Names are the XAPI's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.tar import Member
from nbdsrv.formats.xml_tree import Node, XmlError, parse_xml

__all__ = ["Manifest", "Vdi", "read_manifest"]

MAX_XML = 16 << 20
"""Bytes; a machine with snapshots of 16 disks has some 500 KiB."""
MAX_SIZE = 1 << 62
"""Bytes of a disk; so that no sum overflows."""


@dataclass(frozen=True, slots=True)
class Vdi:
    """A disk.

    Attributes:
        reference: ``Ref:2``, the folder its chunks are in.
        uuid: as on the host it came from.
        label: its name for people.
        size: bytes.
    """

    reference: str
    uuid: str
    label: str
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``ova.xml`` says.

    Attributes:
        machine: the VM's name.
        product: who exported it.
        vdis: by reference.
    """

    machine: str
    product: str
    vdis: dict[str, Vdi]


def read_manifest(file: ImageFile, member: Member) -> Manifest:
    """Read ``ova.xml``. Blocking.

    Raises:
        CorruptImage: it is broken.
        UnsupportedImage: it lists no disks: an XVA of the kind before XenServer 4.
    """
    if member.size > MAX_XML:
        raise file.corrupt(member.position, f"ova.xml of {member.size} bytes")
    try:
        root = parse_xml(file.read(member.position, member.size, "ova.xml"))
    except XmlError as error:
        raise file.corrupt(member.position, f"ova.xml: {error}") from error
    vdis: dict[str, Vdi] = {}
    machine = ""
    for kind, reference, record in _objects(root):
        if kind == "VM" and not machine:
            machine = _text(record, "name_label")
        elif kind == "VDI":
            vdis[reference] = _vdi(file, member, reference, record)
    if not vdis:
        raise UnsupportedImage(f"{file.path}: its ova.xml lists no disks")
    version = _field(root, "version")
    product = [_text(version, name) for name in ("product_brand", "product_version")]
    return Manifest(machine, " ".join(filter(None, product)), vdis)


def _vdi(file: ImageFile, member: Member, reference: str, record: Node | None) -> Vdi:
    digits = _text(record, "virtual_size")
    size = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 20 else -1
    if not 0 <= size <= MAX_SIZE:
        what = f"ova.xml: {reference[:40]!r} has a virtual_size of {digits[:40]!r}"
        raise file.corrupt(member.position, what)
    return Vdi(reference, _text(record, "uuid"), _text(record, "name_label"), size)


def _objects(root: Node) -> Iterator[tuple[str, str, Node | None]]:
    """Class, reference and record of each object."""
    objects = _field(root, "objects")
    data = objects.find("array/data") if objects is not None else None
    for value in data.all("value") if data is not None else ():
        yield _text(value, "class"), _text(value, "id"), _field(value, "snapshot")


def _field(value: Node | None, name: str) -> Node | None:
    """The value of a struct's member."""
    struct = value.find("struct") if value is not None else None
    for member in struct.all("member") if struct is not None else ():
        if member.value("name") == name:
            return member.find("value")
    return None


def _text(value: Node | None, name: str) -> str:
    """The text of a struct's member, with or without its type: ``<string>``, ``<int>``."""
    field = _field(value, name)
    if field is None:
        return ""
    return (field.children[0] if field.children else field).text.strip()
