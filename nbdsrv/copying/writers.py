"""From a TARGET to its writer."""

import os
from dataclasses import dataclass

from nbdsrv.copying.in_place import DiskWriter
from nbdsrv.copying.nowhere import NullWriter
from nbdsrv.copying.target import Place, Target
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import FORMATS
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.target_file import TargetFile
from nbdsrv.formats.writer import ImageWriter

__all__ = [
    "Compression",
    "Making",
    "backing_of",
    "check_making",
    "image_writer",
    "open_in_place",
]

_METHODS = {"qcow2": ("zlib", "zstd"), "vmdk": ("zlib",)}
_LEVELS = {"zlib": 9, "zstd": 19}
"""The highest of each; zstd's higher ones take more memory than a copy may."""


@dataclass(frozen=True, slots=True)
class Compression:
    """``zlib``, ``zstd`` or ``none``, and how hard to try; None is our choice."""

    method: str
    level: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Compression":
        """``METHOD[:LEVEL]``.

        Raises:
            ConfigError: no such method or level.
        """
        method, colon, digits = text.partition(":")
        if method == "none" and not colon:
            return cls(method)
        highest = _LEVELS.get(method)
        if highest is None:
            raise ConfigError(f"--compress {text}: expected zlib, zstd or none")
        if not colon:
            return cls(method)
        level = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 3 else 0
        if not 1 <= level <= highest:
            raise ConfigError(f"--compress {text}: levels of {method} are 1 to {highest}")
        return cls(method, level)


@dataclass(frozen=True, slots=True)
class Making:
    """How a new image is to be made.

    Attributes:
        compression: None for the format's own way.
        backing: the image below the new one, FORMAT:PATH or PATH, "" for none.
        replace: may there be such a file already?
    """

    compression: Compression | None = None
    backing: str = ""
    replace: bool = False


def check_making(target: Target, making: Making) -> None:
    """Does what is asked for go together?

    Raises:
        ConfigError: no.
    """
    what = f"{target.text}: a {target.format} image"
    if target.in_place:
        if making.compression or making.backing:
            raise ConfigError(f"{target.text}: --compress and --backing are for new images")
        return
    method = making.compression.method if making.compression else "none"
    methods = _METHODS.get(target.format, ())
    if method != "none" and method not in methods:
        hint = f"only with {' or '.join(methods)}" if methods else "not"
        raise ConfigError(f"{what} is {hint} compressed; --compress {method} goes with qcow2")
    if making.compression and method == "none" and target.format == "vmdk":
        raise ConfigError(f"{what} is written compressed; leave out --compress none")
    if making.backing and target.format != "qcow2":
        raise ConfigError(f"{what} has no backing file; --backing goes with qcow2")
    if target.place is Place.PIPE and making.backing:
        raise ConfigError(f"{target.text}: --backing needs a file, not a pipe")
    if target.place is Place.PIPE and target.format == "qcow2" and method != "none":
        raise ConfigError(f"{target.text}: a compressed qcow2 image cannot go to a pipe")


def image_writer(
    target: Target, making: Making, workers: Workers, base: Disk | None
) -> ImageWriter:
    """The writer of a new image; ``base`` is the open disk of ``making.backing``.

    Raises:
        DiskError: there is such a file already.
    """
    if target.place is Place.POOL:
        from nbdsrv.source.xapi_import import pool_writer

        return pool_writer(target.location, workers)
    file = TargetFile(target.location, replace=making.replace)
    file.check()
    if target.format == "vhd":
        from nbdsrv.formats.vhd.writer import VhdWriter

        return VhdWriter(workers, file)
    if target.format == "vmdk":
        from nbdsrv.formats.vmdk.writer import DEFAULT_LEVEL, VmdkWriter

        level = making.compression.level if making.compression else None
        return VmdkWriter(workers, file, level=level or DEFAULT_LEVEL)
    if target.format == "qcow2":
        return _qcow2_writer(file, making, workers, base)
    from nbdsrv.formats.raw_writer import RawWriter

    return RawWriter(workers, file)


def _qcow2_writer(
    file: TargetFile, making: Making, workers: Workers, base: Disk | None
) -> ImageWriter:
    from nbdsrv.formats.qcow2 import structs
    from nbdsrv.formats.qcow2.writer import Backing, Qcow2Writer, Shape

    methods = {"zlib": structs.Compression.ZLIB, "zstd": structs.Compression.ZSTD}
    asked = making.compression or Compression("none")
    backing = None
    if base is not None:
        backing = Backing(_name_from(file.path, backing_of(making.backing)[1]), base.format, base)
    shape = Shape(compression=methods.get(asked.method), level=asked.level or 0, backing=backing)
    return Qcow2Writer(workers, file, shape)


def backing_of(text: str) -> tuple[str, str]:
    """The format, "" for whatever it turns out to be, and the path that --backing names.

    What a guest may write to is ``raw:PATH``: it could make itself an image of another format.
    """
    kind, colon, path = text.partition(":")
    return (kind, path) if colon and kind in FORMATS else ("", text)


def _name_from(image: str, backing: str) -> str:
    """The name of ``backing`` as ``image`` must call it: from its own directory."""
    if os.path.isabs(backing):
        return backing
    # "link/../base" is not "base": what relpath takes away must not be a link.
    directory, last = os.path.split(backing)
    found = os.path.join(os.path.realpath(directory), last)
    name = os.path.relpath(found, os.path.dirname(os.path.realpath(image)))
    if ":" in name.partition("/")[0]:
        return f"./{name}"  # or else it names a protocol
    return name


async def open_in_place(
    target: Target, workers: Workers, connections: int | None
) -> tuple[Disk | None, ImageWriter]:
    """The disk that is overwritten, if there is one, and its writer.

    Raises:
        DiskError: it is not there, or may not be written.
    """
    if target.place is Place.NOWHERE:
        return None, NullWriter()
    if target.place is Place.NBD:
        from nbdsrv.source.nbd import DEFAULT_CONNECTIONS, open_nbd

        count = connections or DEFAULT_CONNECTIONS
        disk: Disk = await open_nbd(target.location, workers, writable=True, connections=count)
    else:
        disk = await open_image(target.location, "raw", Opening(workers, writable=True))
    return disk, DiskWriter(disk)
