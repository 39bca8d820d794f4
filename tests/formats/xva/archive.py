"""XVAs, built the way XAPI and Xen Orchestra stream them.

::

    ova.xml  Ref:2/00000000 [.checksum]  Ref:2/00000003 ...       first and last, others if not 0
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["CHUNK", "Vdi", "chunk_members", "manifest", "packed", "xva"]

CHUNK = 1 << 20


@dataclass(frozen=True)
class Vdi:
    """A disk of the machine."""

    reference: str
    label: str
    content: bytes
    uuid: str = ""


def member(name: str, value: str) -> str:
    """A member of an XML-RPC struct."""
    return f"<member><name>{name}</name><value>{value}</value></member>"


def _object(kind: str, reference: str, **record: object) -> str:
    fields = "".join(member(name, str(value)) for name, value in record.items())
    parts = member("class", kind) + member("id", reference)
    return (
        f"<value><struct>{parts}{member('snapshot', f'<struct>{fields}</struct>')}</struct></value>"
    )


def manifest(vdis: Iterable[Vdi], **more: object) -> bytes:
    """``ova.xml``."""
    objects = _object("VM", "Ref:0", name_label="the <b>vm</b>".replace("<", "&lt;"))
    for vdi in vdis:
        record = {
            "name_label": vdi.label,
            "virtual_size": f"<string>{len(vdi.content)}</string>",
            "uuid": vdi.uuid,
            **more,
        }
        objects += _object("VDI", vdi.reference, **record)
    version = (
        f"<struct>{member('product_brand', 'XCP-ng')}{member('product_version', '8.3')}</struct>"
    )
    array = f"<array><data>{objects}</data></array>"
    root = f"<value><struct>{member('version', version)}{member('objects', array)}</struct></value>"
    return f"<?xml version='1.0'?>\n{root}".encode()


def chunk_members(
    vdi: Vdi, *, checksums: bool = True, short_tail: bool = False, keep_alive: bool = False
) -> list[tuple[str, bytes]]:
    """(name, content) of each file; ``short_tail`` as XAPI, otherwise padded as Xen Orchestra."""
    members = []
    count = -(-len(vdi.content) // CHUNK)
    for number in range(count):
        chunk = vdi.content[number * CHUNK : (number + 1) * CHUNK]
        name = f"{vdi.reference}/{number:08d}"
        if any(chunk) or number in {0, count - 1}:
            stored = chunk if short_tail else chunk.ljust(CHUNK, b"\0")
            members.append((name, stored))
            if checksums:
                members.append((f"{name}.checksum", hashlib.sha1(stored).hexdigest().encode()))
        elif keep_alive:
            members.append((name, b""))
    return members


def packed(members: Iterable[tuple[str, bytes]]) -> bytes:
    """The members as a tar."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def xva(
    *vdis: Vdi, checksums: bool = True, short_tail: bool = False, keep_alive: bool = False
) -> bytes:
    """The whole archive."""
    members = [("ova.xml", manifest(vdis))]
    for vdi in vdis:
        members += chunk_members(
            vdi, checksums=checksums, short_tail=short_tail, keep_alive=keep_alive
        )
    return packed(members)
