"""Opening an image and, through it, the images below it: a *chain*.

::

    top.qcow2 ── backing file ──> middle.vhdx ── parent ──> base.raw
    Opening                       below(...)                below(...)

Rules:

* A parent's name is resolved against the directory of the image that names it.
* A parent is opened read-only, whatever the child is.
* A chain is at most ``MAX_CHAIN`` images deep and visits no file twice.
* Formats prove the identity of a parent (UUID, CID, size) themselves: a wrong one is an error that
  names both files, never served.
"""

import os
import re
import unicodedata
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import cast

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError, UnsupportedImage
from nbdsrv.formats.image_file import ImageFile, open_image_file
from nbdsrv.formats.probe import probe_file

__all__ = ["MAX_CHAIN", "Opening", "is_name", "open_image"]

MAX_CHAIN = 64
"""Images in a chain. Backup chains reach 30 or so; each costs descriptors and a look-up."""

OpenFormat = Callable[[ImageFile, "Opening"], Awaitable[Disk]]

_FORMATS = {
    "raw": "nbdsrv.formats.raw:raw_disk",
    "qcow2": "nbdsrv.formats.qcow2:open_qcow2",
    "qcow": "nbdsrv.formats.qcow:open_qcow",
    "vhd": "nbdsrv.formats.vhd:open_vhd",
    "vhdx": "nbdsrv.formats.vhdx:open_vhdx",
    "vmdk": "nbdsrv.formats.vmdk:open_vmdk",
    "vdi": "nbdsrv.formats.vdi:open_vdi",
    "parallels": "nbdsrv.formats.parallels:open_parallels",
    "ova": "nbdsrv.formats.ova:open_ova",
    "xva": "nbdsrv.formats.xva:open_xva",
    "gzip": "nbdsrv.formats.compressed:open_gzip",
    "xz": "nbdsrv.formats.compressed:open_xz",
    "zstd": "nbdsrv.formats.compressed:open_zstd",
}
"""Format to ``module:function``; imported when the first such image is opened."""

_WITH_MEMBERS = frozenset({"ova", "xva", "gzip", "xz", "zstd"})
"""Archives, and what may hold one."""
_CONTROLS = frozenset({"Cc", "Zl", "Zp"})
"""Unicode's categories of control characters, and of separators of lines and paragraphs."""
_PROTOCOL = re.compile(r"(json:|[A-Za-z][A-Za-z0-9+.-]+:(?!\\))")


@dataclass(frozen=True, slots=True)
class Opening:
    """How an image is to be opened, and what has been opened above it.

    Attributes:
        writable: may the image be changed? Formats that cannot be written refuse.
        snapshot: name or id of an internal snapshot, "" for the current state.
        member: which disk of an archive (OVA, XVA), "" where there is only one.
        above: real paths of the images whose parent this one is, the top first.
    """

    workers: Workers
    writable: bool = False
    snapshot: str = ""
    member: str = ""
    above: tuple[str, ...] = ()

    async def below(self, child: ImageFile, name: str, kind: str = "") -> Disk:
        """Open the image ``child`` calls its parent, read-only.

        Args:
            child: who names it; relative names start from its directory.
            name: a file name, from inside the image.
            kind: the parent's format, "" to look.

        Raises:
            CorruptImage: a loop, or too deep.
            DiskError: it cannot be opened; the message names both files.
        """
        path = self.path_below(child, name)
        above = (*self.above, _real(child.path))
        if _real(path) in above:
            raise child.corrupt(0, f"its parent {path} is above it: a loop")
        if len(above) >= MAX_CHAIN:
            raise child.corrupt(0, f"more than {MAX_CHAIN} images in a chain")
        try:
            return await open_image(path, kind, Opening(self.workers, above=above))
        except DiskError as error:
            raise type(error)(f"{error} (the parent of {child.path})", error.errno) from error

    @staticmethod
    def path_below(child: ImageFile, name: str) -> str:
        """Where a parent of this name lies.

        Raises:
            UnsupportedImage: it is not a file: ``json:{...}``, ``nbd://...`` and the like.
        """
        if _PROTOCOL.match(name):
            if not name.startswith("file:"):
                raise UnsupportedImage(
                    f"{child.path}: its parent {name!r} is not a plain file name; not followed"
                )
            name = name.removeprefix("file:")
        if not is_name(name):
            raise child.corrupt(0, f"its parent's name is {name!r}")
        return os.path.join(os.path.dirname(child.path), name)

    def plain(self) -> "Opening":
        """The same without selectors, for an image within."""
        return replace(self, snapshot="", member="")


def is_name(name: str) -> bool:
    """May a file that an image asks for be called so?

    Any bytes and any letters, as files are; but nothing that would end a line or control a
    terminal where the name is shown.
    """
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half a character, out of UTF-16
        return False
    return bool(name) and not any(unicodedata.category(each) in _CONTROLS for each in name)


async def open_image(path: str, kind: str, opening: Opening) -> Disk:
    """Open one image of format ``kind``, or of whatever format it turns out to be ("").

    Raises:
        DiskError: it cannot be opened.
    """
    workers = opening.workers
    opened: list[ImageFile] = []  # also if we are cancelled while the thread opens it
    try:
        file = await workers.look_up(_open, path, opening.writable, opened)
        found = kind or await workers.look_up(probe_file, file)
        return await open_file(file, found, opening, probed=not kind)
    except BaseException:
        for file in opened:
            file.close()
        raise


async def open_file(file: ImageFile, kind: str, opening: Opening, *, probed: bool = False) -> Disk:
    """The same for a file that is open; the Disk owns it then, and without a Disk the caller.

    Raises:
        DiskError: it is not such an image, or a broken one.
    """
    where = _FORMATS.get(kind)
    if where is None:
        hint = f"; raw:{file.path} serves the file as it is" if probed else ""
        # The name may come from inside an image.
        shown = kind if kind.isidentifier() and len(kind) < 20 else repr(kind[:20])
        raise UnsupportedImage(f"{file.path}: {shown} images are not served{hint}")
    if opening.snapshot and kind != "qcow2":
        raise UnsupportedImage(f"{file.path}: {kind} images have no internal snapshots")
    if opening.member and kind not in _WITH_MEMBERS:
        raise UnsupportedImage(f"{file.path}: {kind} images have no members")
    if opening.writable and kind not in {"raw", "qcow2"}:
        raise UnsupportedImage(
            f"{file.path}: {kind} images are served read-only; raw and qcow2 can be written to"
        )
    module, _, name = where.partition(":")
    open_format = cast("OpenFormat", getattr(import_module(module), name))
    return await open_format(file, opening)


def _open(path: str, writable: bool, opened: list[ImageFile]) -> ImageFile:  # noqa: FBT001
    opened.append(open_image_file(path, writable=writable))
    return opened[0]


def _real(path: str) -> str:
    return os.path.realpath(path)
