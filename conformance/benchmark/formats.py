"""Images of other formats: made by qemu-img once, kept beside the raw ones.

::

    qcow2 vhd vhdx vmdk                   the raw cells' image: random data, all of it allocated
    qcow2-zlib qcow2-zstd vmdk-stream     *mixed* content, compressed by qemu-img
                                          in pieces of 1 MiB: 55 % holes, 30 % text, 15 % random

Options are qemu-img's defaults; but VHD keeps the exact size (``force_size``).
"""

import os
import random
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from conformance.benchmark.cells import COMPRESSED
from conformance.benchmark.report import BenchmarkError

__all__ = [
    "PIECE",
    "FormatImage",
    "convert_command",
    "make_images",
    "mixed",
    "text",
    "vocabulary",
]

PIECE = 1 << 20
HOLES, TEXT = 0.55, 0.30
SEED = 3
CONVERT_TIMEOUT_S = 600

_OPTIONS: dict[str, tuple[str, ...]] = {
    "raw": ("raw",),
    "qcow2": ("qcow2",),
    "vhd": ("vpc", "-o", "subformat=dynamic,force_size=on"),
    "vhdx": ("vhdx",),
    "vmdk": ("vmdk",),
    "qcow2-zlib": ("qcow2", "-c"),
    "qcow2-zstd": ("qcow2", "-c", "-o", "compression_type=zstd"),
    "vmdk-stream": ("vmdk", "-o", "subformat=streamOptimized"),
}
"""QEMU's name of the format, and options of ``qemu-img convert``."""


@dataclass(frozen=True, slots=True)
class FormatImage:
    """A file, QEMU's name of its format, and how large the disk in it is."""

    path: str
    form: str
    size: int


def convert_command(kind: str, source: str, source_kind: str, target: str) -> list[str]:
    """``qemu-img convert`` to an image of this kind."""
    form, *options = _OPTIONS[kind]
    source_form = _OPTIONS[source_kind][0]
    return ["qemu-img", "convert", "-f", source_form, "-O", form, *options, source, target]


def make_images(kinds: Iterable[str], path: str, directory: str) -> dict[str, FormatImage]:
    """The images of these kinds with the content of ``path``, or mixed content of its size."""
    size = os.path.getsize(path)
    made = {}
    for kind in kinds:
        source = mixed(directory, size) if kind in COMPRESSED else path
        target = os.path.join(directory, f"{os.path.basename(source)}.{kind}")
        if not _is_newer(target, source):
            partial = f"{target}.partial"
            _run(convert_command(kind, source, "raw", partial))
            os.rename(partial, target)
        made[kind] = FormatImage(target, _OPTIONS[kind][0], size)
    return made


def mixed(directory: str, size: int) -> str:
    """The path of a raw image of mixed content, made unless it is there."""
    path = os.path.join(directory, f"mixed-{size}.raw")
    if os.path.exists(path) and os.path.getsize(path) == size:
        return path
    os.makedirs(directory, exist_ok=True)
    source = random.Random(SEED)
    words = vocabulary(source)
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        for at in range(0, size, PIECE):
            length = min(PIECE, size - at)
            kind = source.random()
            if kind < HOLES:
                continue
            file.seek(at)
            is_text = kind < HOLES + TEXT
            file.write(text(source, words, length) if is_text else source.randbytes(length))
        file.truncate(size)
        os.fsync(file.fileno())
    os.rename(partial, path)
    return path


def vocabulary(source: random.Random) -> list[bytes]:
    """The words ``text`` is made of."""
    return [b"%x " % source.randrange(1 << 20) for _ in range(2000)]


def text(source: random.Random, words: list[bytes], length: int) -> bytes:
    """Words in random order: no two pieces are alike, and each shrinks to a third or so."""
    line = b"".join(source.choices(words, k=length // 4))
    return (line * 2)[:length]


def _is_newer(path: str, source: str) -> bool:
    return os.path.exists(path) and os.path.getmtime(path) >= os.path.getmtime(source)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchmarkError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
