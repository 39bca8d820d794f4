"""What a point's JSON says, as far as it is of use here.

::

    {"mode": "delta", "timestamp": milliseconds, from which the file's own name is made,
     "vm":   {"uuid": .., "name_label": "web"},
     "vdis": {REF: {"uuid": .., "name_label": "root", "virtual_size": ..,
                    "$snapshot_of$uuid": the live VDI}},
     "vbds": {..: {"VDI": REF, "userdevice": "0", "device": "xvda"}},
     "vhds": {REF: "vdis/<job>/<vdi>/<stamp>.alias.vhd"}}        from the VM's directory
    {"mode": "full", "xva": "./<stamp>.xva", ...}

Names are for people and repeat: within a point a disk is called by its label, where that is empty
or taken with its device or the VDI's id behind it.

Not looked at: ``isVhdDifferencing`` (wrong after a merge) and ``cache.json.gz`` (of any day).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.xo.layout import POINT, stamp_of
from nbdsrv.repository.xo.remote import Remote

__all__ = ["MAX_JSON", "DiskRecord", "PointRecord", "named", "read_point"]

MAX_JSON = 32 << 20
"""Bytes of a point's JSON: some 20 KiB a disk."""
MAX_DISKS = 4096
"""Of a point; XAPI has at most 255."""
MAX_LABEL = 255
"""Characters of a label that are shown."""
_LAST_MOMENT = 253_402_300_799_000
"""Milliseconds until the end of the year 9999."""
_LAST = 1 << 16
"""Stands for the position of a disk that is on no bus."""


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """A disk of a point.

    Attributes:
        name: unique in the point.
        path: of its VHD or alias, in the repository; or of the XVA it is in.
        size: bytes, as the VDI's record has it; not what counts.
        aliases: what it may also be called: device, ids of VDIs.
        reference: of the VDI's record, or of the VDI in the XVA.
        device: xvda ...
        vdi: id of the VDI that was running.
        snapshot: id of the snapshot that was backed up: the unique id of the VHD. "" if unknown.
    """

    name: str
    path: str
    size: int
    aliases: tuple[str, ...] = ()
    reference: str = ""
    device: str = ""
    vdi: str = ""
    snapshot: str = ""


@dataclass(frozen=True, slots=True)
class PointRecord:
    """A point.

    Attributes:
        label: the VM's name at that time.
        mode: ``delta`` or ``full``.
        disks: in the VM's order; none yet if they are in an XVA.
        xva: path of the XVA, or "".
        facts: for ``ls`` and ``info``.
    """

    label: str
    mode: str
    disks: tuple[DiskRecord, ...]
    xva: str
    facts: Mapping[str, Any]


class _Vm(msgspec.Struct):
    uuid: Any = ""
    name_label: Any = ""


class _Vdi(msgspec.Struct):
    uuid: Any = ""
    name_label: Any = ""
    virtual_size: Any = 0
    live: Any = msgspec.field(default="", name="$snapshot_of$uuid")


class _Vbd(msgspec.Struct):
    vdi: Any = msgspec.field(default="", name="VDI")
    userdevice: Any = ""
    device: Any = ""


class _Point(msgspec.Struct, rename="camel"):
    mode: Any = ""
    version: Any = ""
    job_id: Any = ""
    schedule_id: Any = ""
    size: Any = None
    tags: Any = None
    timestamp: Any = None
    vm: _Vm | None = None
    vdis: dict[str, _Vdi] | None = None
    vbds: dict[str, _Vbd] | None = None
    vhds: dict[str, str] | None = None
    xva: Any = ""


_DECODER = msgspec.json.Decoder(_Point)


def read_point(remote: Remote, path: str) -> PointRecord:
    """Read a point's JSON. Blocking.

    Raises:
        ObjectMissing: it has just been removed.
        CorruptImage: it is damaged, another point's, or leads out of the repository.
        StoreError: it cannot be read.
    """
    where = remote.full(path)
    try:
        said = _DECODER.decode(remote.read(path, MAX_JSON))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptImage(
            f"corrupt repository: {where}: no metadata of a point: {error}"
        ) from error
    if len(said.vhds or ()) > MAX_DISKS:
        raise CorruptImage(f"corrupt repository: {where}: more than {MAX_DISKS} disks")
    xva = remote.beside(path, said.xva) if isinstance(said.xva, str) and said.xva else ""
    _check_name(where, said, [xva] if xva else [*(said.vhds or {}).values()])
    facts: dict[str, Any] = {
        "mode": _text(said.mode),
        "job": _text(said.job_id),
        "schedule": _text(said.schedule_id),
        "vm_uuid": _text(said.vm.uuid) if said.vm is not None else "",
        "metadata_version": _text(said.version),
        "tags": [_text(tag) for tag in said.tags] if isinstance(said.tags, list) else [],
    }
    if (size := _number(said.size)) is not None:
        facts["new_bytes"] = size
    return PointRecord(
        label=_text(said.vm.name_label) if said.vm is not None else "",
        mode=_text(said.mode) or ("full" if xva else "delta"),
        disks=() if xva else named(_disks(remote, path, said)),
        xva=xva,
        facts=facts,
    )


def _check_name(where: str, said: _Point, disks: Sequence[str]) -> None:
    """Raises CorruptImage if all of it is about another point than the file's name.

    Xen Orchestra makes that name, and those of the disks, from the time in it, and goes by the
    latter. A file that only the time or only the names speak against is left alone.
    """
    moment = _number(said.timestamp)
    if moment is None or moment > _LAST_MOMENT:
        return
    stamp = stamp_of(moment // 1000)
    names = {disk.rpartition("/")[2].partition(".")[0] for disk in disks}
    if names == {stamp} and where.rpartition("/")[2] != stamp + POINT:
        text = f"it is the metadata of {stamp}, under another point's name"
        raise CorruptImage(f"corrupt repository: {where}: {text}: was it copied or renamed?")


def _disks(remote: Remote, path: str, said: _Point) -> Sequence[DiskRecord]:
    vdis, vhds = said.vdis or {}, said.vhds or {}
    devices = {_text(vbd.vdi): vbd for vbd in (said.vbds or {}).values()}
    found: list[tuple[int, str, DiskRecord]] = []
    for reference, relative in vhds.items():
        vdi = vdis.get(reference, _Vdi())
        vbd = devices.get(reference, _Vbd())
        position, device = _text(vbd.userdevice), _text(vbd.device)
        order = int(position) if position.isdecimal() and len(position) < 5 else _LAST
        live, snapshot = _text(vdi.live), _text(vdi.uuid)
        record = DiskRecord(
            name=_text(vdi.name_label),
            path=remote.beside(path, relative),
            size=_number(vdi.virtual_size) or 0,
            aliases=tuple(dict.fromkeys(filter(None, (device, live, snapshot)))),
            reference=reference,
            device=device,
            vdi=live,
            snapshot=snapshot,
        )
        found.append((order, record.path, record))
    return [record for _, _, record in sorted(found, key=lambda each: each[:2])]


def named(disks: Sequence[DiskRecord]) -> tuple[DiskRecord, ...]:
    """The same disks with names that are unique among them."""
    labels = Counter(disk.name for disk in disks)
    taken: set[str] = set()
    found: list[DiskRecord] = []
    for disk in disks:
        name = disk.name
        if not name:
            name = disk.device or disk.vdi or disk.reference
        elif labels[name] > 1:
            name = f"{name} ({disk.device or disk.vdi or disk.reference})"
        number, base = 2, name
        while name in taken:
            name, number = f"{base} {number}", number + 1
        taken.add(name)
        aliases = tuple(alias for alias in disk.aliases if alias != name)
        found.append(replace(disk, name=name, aliases=aliases))
    return tuple(found)


def _text(value: object) -> str:
    """A field that should be text, fit for a name."""
    if not isinstance(value, str | int):
        return ""
    text = str(value)[:MAX_LABEL]
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _number(value: object) -> int | None:
    """A field that should be a number of bytes; XML-RPC made text of some."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, int | float) and 0 <= value < 1 << 63:
        return int(value)
    return None
