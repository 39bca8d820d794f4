r"""Finding the parent of a differencing VHD or VHDX by the names it goes by, and proving it.

::

    relative       .\base.vhd           from the child's directory
    absolute       C:\disks\base.vhd    /disks/base.vhd here, else base.vhd beside the child
    volume         \\?\Volume{..}\..    the same
    file URI       file://./base.vhd    from the child's directory
    plain name     base.vhd             the same

Rule: a name is only where to look. The first file that is what the child was made from, by its
unique id, is the parent; a file of another identity is not, whatever its name.
"""

import errno as os_errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from urllib.parse import unquote
from uuid import UUID

from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import ImageFile, open_image_file
from nbdsrv.formats.opening import Opening
from nbdsrv.formats.vhd.metadata import Header
from nbdsrv.formats.vhd.structs import MAX_NAME, Platform

__all__ = ["find_parent", "parent_names", "windows_names"]

_ORDER = (Platform.W2RU, Platform.W2KU, Platform.MACX)
"""Of trying locators: what moves along with the child comes first."""

_WINDOWS_ROOT = re.compile(r"(//\?/|//\./)?(UNC/[^/]+/[^/]+|Volume\{[^}/]*\}|[A-Za-z]:|)(?=/)")
_FILE_URI = re.compile(r"file:(//(localhost(?=/))?)?")


def find_parent(
    child: ImageFile,
    at: int,
    names: Iterable[str],
    wanted: Sequence[UUID],
    identify: Callable[[ImageFile], UUID],
) -> str:
    """The first of ``names`` under which there is an image ``identify`` calls ``wanted``. Blocking.

    Raises:
        CorruptImage: what is there is something else; names both files and both ids. ``at``: where
            the child says what it wants.
        DiskError: nothing is there.
    """
    refusals: list[str] = []
    missing = True
    for name in names:
        try:
            path = Opening.path_below(child, name)
            file = open_image_file(path)
        except DiskError as error:
            refusals.append(str(error))
            continue
        missing = False
        try:
            found = identify(file)
            if found in wanted:
                return name
            refusals.append(f"{path} is {found}")
        except DiskError as error:
            refusals.append(str(error))
        finally:
            file.close()
    identity = " or ".join(map(str, wanted)) or "it does not say which"
    text = f"its parent ({identity}) is not to be found: "
    text += "; ".join(refusals) or "it has no name"
    if missing:
        raise DiskError(f"{child.path}: {text}", os_errno.ENOENT)
    raise child.corrupt(at, text)


def parent_names(file: ImageFile, header: Header) -> Sequence[str]:
    """Where a VHD's parent may be, most likely first. Blocking."""
    names: list[str] = []
    for wanted in _ORDER:
        for platform, position, length in header.locators:
            if platform == wanted:
                names += _located(file, Platform(platform), position, length)
    plain = _text(header.parent_name, "utf-16-be")
    names += windows_names(plain)
    return list(dict.fromkeys(names))


def _located(file: ImageFile, platform: Platform, position: int, length: int) -> Iterator[str]:
    if not 0 < length <= MAX_NAME or position + length > file.size:
        return  # a name that is not there: another may be
    raw = file.read(position, length, "a parent locator")
    if platform != Platform.MACX:
        yield from windows_names(_text(raw, "utf-16-le"))
        return
    name = _FILE_URI.sub("", _text(raw, "utf-8"), count=1)
    for text in (name, unquote(name)):  # tapdisk escapes nothing
        if text:
            yield text


def _text(raw: bytes, encoding: str) -> str:
    """Up to the first NUL; "" if it is no text at all."""
    if encoding != "utf-8":
        raw = raw[: len(raw) // 2 * 2]
    try:
        return raw.decode(encoding).partition("\0")[0]
    except UnicodeError:
        return ""


def windows_names(name: str) -> Iterator[str]:
    """What a name from Windows may be called here."""
    name = name.replace("\\", "/")
    root = _WINDOWS_ROOT.match(name)
    candidates = (name,) if root is None else (name[root.end() :], os.path.basename(name))
    for candidate in candidates:
        if candidate:
            yield candidate
