"""What ``info`` tells of a qcow2 image."""

from collections.abc import Mapping, Sequence

from nbdsrv.formats.qcow2.bitmaps import Bitmap
from nbdsrv.formats.qcow2.header import Header
from nbdsrv.formats.qcow2.snapshots import Snapshot
from nbdsrv.formats.qcow2.structs import Autoclear, BitmapFlag, Incompatible

__all__ = ["describe"]


def describe(
    header: Header,
    snapshots: Sequence[Snapshot],
    bitmaps: Sequence[Bitmap],
    snapshot: Snapshot | None,
) -> Mapping[str, object]:
    """JSON values; names an image may hold in any bytes are shown escaped."""
    facts: dict[str, object] = {
        "version": header.version,
        "cluster_size": header.cluster_size,
        "refcount_bits": 1 << header.refcount_order,
        "compression": header.compression_type.name.lower(),
        "extended_l2": header.extended,
        "lazy_refcounts": header.lazy_refcounts,
        "dirty": Incompatible.DIRTY in header.incompatible_features,
        "corrupt": Incompatible.CORRUPT in header.incompatible_features,
    }
    if header.backing_file:
        facts["backing_file"] = _shown(header.backing_file)
        facts["backing_format"] = _shown(header.backing_format) or None
    if header.has_data_file:
        facts["data_file"] = _shown(header.data_file)
        facts["data_file_raw"] = header.has_autoclear(Autoclear.DATA_FILE_RAW)
    if snapshot is not None:
        facts["snapshot"] = _snapshot(snapshot)
    facts["snapshots"] = [_snapshot(each) for each in snapshots]
    facts["bitmaps"] = [_bitmap(each) for each in bitmaps]
    return facts


def _snapshot(snapshot: Snapshot) -> dict[str, object]:
    return {
        "id": _shown(snapshot.id),
        "name": _shown(snapshot.name),
        "size": snapshot.disk_size,
        "taken_at": snapshot.taken_at,
        "vm_state_size": snapshot.vm_state_size,
    }


def _bitmap(bitmap: Bitmap) -> dict[str, object]:
    return {
        "name": bitmap.name,
        "granularity": 1 << bitmap.granularity_bits,
        "enabled": BitmapFlag.AUTO in bitmap.flags,
        "in_use": BitmapFlag.IN_USE in bitmap.flags,
        "served": bitmap.usable,
    }


def _shown(text: str) -> str:
    """As it is if it can be printed, escaped if not (surrogates are bytes that are not UTF-8)."""
    return text if text.isprintable() else ascii(text)[1:-1]
