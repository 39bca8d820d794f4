"""Golden images that can be compressed: the same pieces as an ``Image``, but text."""

from pathlib import Path

from tests.formats.images import Image
from tests.formats.qcow2.peer import qemu_img

__all__ = ["compressed"]


def compressed(directory: Path, image: Image, *options: str) -> tuple[Path, bytes]:
    """A compressed qcow2 image, and its content."""
    content = bytearray(image.golden())
    for offset, length in image.data:
        lines = b"".join(b"line %d of %d\n" % (n, offset) for n in range(length // 8))
        content[offset : offset + length] = lines[:length]
    raw, path = directory / "text.raw", directory / "disk.qcow2"
    raw.write_bytes(content)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", *options, raw, path)
    assert ", 0.00% compressed" not in qemu_img("check", path)
    return path, bytes(content)
