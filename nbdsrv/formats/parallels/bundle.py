"""What lies below a Parallels image: only the bundle's ``DiskDescriptor.xml`` says.

::

    disk.hdd/DiskDescriptor.xml      Image:  GUID, Type, File          Shot:  GUID, ParentGUID
             disk.0.{a}.hds             a    Compressed  disk.0.{a}.hds        a     0
             disk.0.{b}.hds             b    Compressed  disk.0.{b}.hds        b     a

A delta alone looks like an image that is mostly empty. So where a descriptor lies beside an image
and lists it, the descriptor is followed; a broken one is an error. An image on its own is complete.
"""

import os
from typing import NamedTuple

from nbdsrv.errors import CorruptImage, UnsupportedImage
from nbdsrv.formats.image_file import ImageFile, open_image_file
from nbdsrv.formats.xml_tree import Node, XmlError, parse_xml

__all__ = ["Parent", "find_parent"]

DESCRIPTOR = "DiskDescriptor.xml"
MAX_DESCRIPTOR = 1 << 20
"""Bytes; one with a hundred snapshots has some 50 KiB."""
NO_PARENT = "{00000000-0000-0000-0000-000000000000}"
_KINDS = {"Compressed": "parallels", "Plain": "raw"}


class Parent(NamedTuple):
    """A file name, relative to the bundle, and the image's format."""

    name: str
    kind: str


def find_parent(file: ImageFile) -> Parent | None:
    """The image below ``file``; None if it is complete. Blocking.

    Raises:
        CorruptImage: the descriptor is broken, or knows no parent of that GUID.
        UnsupportedImage: the disk is split into several files.
    """
    folder, own = os.path.split(file.path)
    path = os.path.join(folder, DESCRIPTOR)
    if not os.path.exists(path):
        return None
    root = _read(path)
    data = root.find("StorageData")
    storages = list(data.all("Storage")) if data is not None else []
    for storage in storages:
        images = list(storage.all("Image"))
        mine = [image for image in images if os.path.basename(image.value("File")) == own]
        if not mine:
            continue
        if len(storages) > 1:
            raise UnsupportedImage(f"{path}: a disk split into {len(storages)} files; merge them")
        return _below(path, root, images, mine[0].value("GUID"))
    return None


def _below(path: str, root: Node, images: list[Node], guid: str) -> Parent | None:
    snapshots = root.find("Snapshots")
    shots = list(snapshots.all("Shot")) if snapshots is not None else []
    parents = [shot.value("ParentGUID") for shot in shots if shot.value("GUID") == guid]
    if not parents:
        if len(images) == 1:
            return None
        raise CorruptImage(f"corrupt image: {path} at 0: it does not say what lies below {guid}")
    if parents[0] == NO_PARENT:
        return None
    for image in images:
        if image.value("GUID") == parents[0]:
            kind = _KINDS.get(image.value("Type"))
            if kind is None:
                what = f"an image of type {image.value('Type')[:40]!r}"
                raise UnsupportedImage(f"{path}: {what} is not served")
            return Parent(os.path.join(".", image.value("File")), kind)
    raise CorruptImage(f"corrupt image: {path} at 0: no image {parents[0]}, the parent of {guid}")


def _read(path: str) -> Node:
    file = open_image_file(path)
    try:
        if file.size > MAX_DESCRIPTOR:
            raise file.corrupt(0, f"a descriptor of {file.size} bytes")
        return parse_xml(file.read(0, file.size, "the descriptor"))
    except XmlError as error:
        raise file.corrupt(0, str(error)) from error
    finally:
        file.close()
