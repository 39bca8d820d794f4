"""OVA and XVA: tar archives with a description and disks.

::

    disk.ova    disk.ovf  disk.mf  disk1.vmdk            VMware, VirtualBox
    disk.xva    ova.xml  Ref:1/00000000  Ref:1/00000000.checksum ...   XenServer: 1 MiB chunks
"""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from conformance.fuzz.mending import mend_tar
from conformance.fuzz.specimen import MIB, Specimen, guest_content
from conformance.fuzz.specimens.hypervisors import SMALL, Bench

__all__ = ["archive", "ova", "xva"]

_OVF = """<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
<References>{files}</References>
<DiskSection><Info>disks</Info>{disks}</DiskSection>
<VirtualSystem ovf:id="vm"><Info>a VM</Info><Name>vm</Name></VirtualSystem>
</Envelope>
"""
_STREAM = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"


def _tar(members: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def ova(directory: Path) -> list[Specimen]:
    """One disk in ustar; two in pax, of which the second is opened by its name."""
    bench = Bench(directory, guest_content(SMALL))
    bench.convert("vmdk", "stream.vmdk", "subformat=streamOptimized")
    bench.convert("vmdk", "sparse.vmdk", "subformat=monolithicSparse")
    stream, sparse = ((directory / f"{n}.vmdk").read_bytes() for n in ("stream", "sparse"))
    one = [("vm-disk1.vmdk", stream)]
    two = [("vm-disk1.vmdk", stream), (f"{'long' * 40}.vmdk", sparse)]
    return [
        _ova(bench, "one disk", one, "", tarfile.USTAR_FORMAT),
        _ova(bench, "two disks", two, f"#{two[1][0]}", tarfile.PAX_FORMAT),
        _ova(bench, "gnu", two, "#vm-disk1.vmdk", tarfile.GNU_FORMAT),
    ]


def _ova(
    bench: Bench, label: str, members: list[tuple[str, bytes]], suffix: str, form: int
) -> Specimen:
    files = "".join(
        f'<File ovf:id="file{n}" ovf:href="{name}" ovf:size="{len(data)}"/>'
        for n, (name, data) in enumerate(members)
    )
    disks = "".join(
        f'<Disk ovf:diskId="disk{n}" ovf:fileRef="file{n}" ovf:capacity="{len(bench.content)}"'
        f' ovf:format="{_STREAM}"/>'
        for n in range(len(members))
    )
    description = _OVF.format(files=files, disks=disks).encode()
    sums = "".join(f"SHA256({n})= {hashlib.sha256(d).hexdigest()}\n" for n, d in members)
    content = [("vm.ovf", description), ("vm.mf", sums.encode()), *members]
    return archive("ova", label, content, suffix, bench.content, form)


def archive(
    kind: str,
    label: str,
    members: Sequence[tuple[str, bytes]],
    suffix: str,
    content: bytes,
    form: int = tarfile.USTAR_FORMAT,
) -> Specimen:
    """An archive of these members, the first being its description, as a specimen."""
    name = f"vm.{kind}"
    files = {name: _tar(members, form)}
    return Specimen(kind, label, files, f"{kind}:{{}}/{name}{suffix}", content, mend_tar)


_VALUE = "<member><name>{}</name><value>{}</value></member>"


def _record(kind: str, reference: str, **snapshot: str) -> str:
    fields = "".join(_VALUE.format(key, value) for key, value in snapshot.items())
    inside = _VALUE.format("class", kind) + _VALUE.format("id", reference)
    inside += _VALUE.format("snapshot", f"<struct>{fields}</struct>")
    return f"<value><struct>{inside}</struct></value>"


def xva(directory: Path) -> list[Specimen]:
    """One disk with a chunk left out, and two disks."""
    del directory
    size = 4 * MIB
    content = bytearray(size)
    content[: 16 << 10] = guest_content(16 << 10)
    content[-(16 << 10) :] = guest_content(16 << 10, seed=2)
    whole = bytes(content)
    return [
        archive("xva", "one disk", _xva({"Ref:3": whole}, ".checksum"), "", whole),
        archive(
            "xva",
            "two disks",
            _xva({"Ref:3": whole, "Ref:7": whole[:MIB]}, ".xxhash"),
            "#Ref:7",
            whole[:MIB],
        ),
    ]


def _xva(disks: dict[str, bytes], suffix: str) -> list[tuple[str, bytes]]:
    records = [_record("VM", "Ref:0", name_label="vm", uuid="a", other_config="<struct></struct>")]
    members: list[tuple[str, bytes]] = []
    for number, (reference, data) in enumerate(disks.items()):
        label, vbd = f"disk {number}", f"Ref:1{number}"
        fields = {"uuid": f"uuid-{number}", "name_label": label, "virtual_size": str(len(data))}
        records.append(_record("VDI", reference, **fields, type="user"))
        records.append(
            _record("VBD", vbd, VDI=reference, type="Disk", userdevice=str(number), VM="Ref:0")
        )
        members += _chunks(reference, data, suffix)
    objects = _VALUE.format("objects", f"<array><data>{''.join(records)}</data></array>")
    version = _VALUE.format("version", "<struct></struct>")
    text = f"<?xml version='1.0'?><value><struct>{version}{objects}</struct></value>"
    return [("ova.xml", text.encode()), *members]


def _chunks(reference: str, data: bytes, suffix: str) -> list[tuple[str, bytes]]:
    members = []
    last = len(data) // MIB - 1
    for number in range(last + 1):
        piece = data[number * MIB : (number + 1) * MIB]
        if any(piece) or number in (0, last):  # the first and the last are always there
            name = f"{reference}/{number:08d}"
            members += [(name, piece), (name + suffix, hashlib.sha1(piece).hexdigest().encode())]
    return members
