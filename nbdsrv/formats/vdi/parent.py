"""The parent of a differencing VDI: no name is written down, only UUIDs.

::

    machine/base.vdi                    identity A   modified X
    machine/Snapshots/{....}.vdi        parent   A   parent_modified X

Looked for where VirtualBox keeps them: beside the child, and if that is in a folder ``Snapshots``,
one folder up. An image whose ``modified`` is not what the child remembers has been written to
since: what the child holds no longer fits, and it is refused.
"""

import os
from collections.abc import Iterator

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.image_file import ImageFile, open_image_file
from nbdsrv.formats.vdi.header import NIL, Header, read_header

__all__ = ["find_parent", "prove_parent"]

MAX_LOOKED_AT = 4096
"""Files whose headers are read in the search; each takes some 50 microseconds."""


def find_parent(child: ImageFile, header: Header) -> str:
    """The parent's name, relative to the child's folder. Blocking.

    Raises:
        CorruptImage: only images that were changed since the child was made.
        DiskError: no such image.
    """
    folder = os.path.dirname(child.path)
    changed: CorruptImage | None = None
    for name in _candidates(folder):
        found = _header_of(os.path.join(folder, name))
        if found is None or found.identity != header.parent:
            continue
        try:
            prove_parent(child, header, os.path.join(folder, name), found)
        except CorruptImage as error:
            changed = error
            continue
        return name
    if changed is not None:
        raise changed
    where = folder or "."
    raise DiskError(
        f"{child.path}: its parent, the VDI with UUID {header.parent}, is not in {where};"
        " put it there"
    )


def prove_parent(child: ImageFile, header: Header, path: str, parent: Header) -> None:
    """Is this the image the child was made on, and unchanged?

    Raises:
        CorruptImage: no; names both.
    """
    if parent.identity != header.parent:
        what = f"its parent has UUID {header.parent}, but {path} has {parent.identity}"
        raise CorruptImage(f"corrupt image: {child.path} at {0x1A8}: {what}")
    if header.parent_modified not in {NIL, parent.modified}:
        what = f"its parent {path} has been changed since the child was made"
        raise CorruptImage(f"corrupt image: {child.path} at {0x1B8}: {what}")


def _candidates(folder: str) -> Iterator[str]:
    """Names to look at, with a leading ``./`` or ``../`` so that no name can pass for a URI."""
    here = os.path.basename(os.path.abspath(folder))
    looked_at = 0
    for place in (".", "..") if here.lower() == "snapshots" else (".",):
        try:
            names = os.listdir(os.path.join(folder, place))
        except OSError:
            continue
        for name in sorted(names):
            if not name.lower().endswith(".vdi"):
                continue
            looked_at += 1
            if looked_at > MAX_LOOKED_AT:
                return
            yield os.path.join(place, name)


def _header_of(path: str) -> Header | None:
    """Its header; None for what is no VDI of ours."""
    try:
        file = open_image_file(path)
    except DiskError:
        return None
    try:
        return read_header(file)
    except DiskError:
        return None
    finally:
        file.close()
