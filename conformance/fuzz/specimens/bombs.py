"""Small things that unpack to much: a compressed cluster, a compressed grain, an XML document.

They are not mutated. Whatever a reader makes of them is fine, if it takes no more time and memory
than for an honest image. (Whole files that unpack to much: ``compressed``.)
"""

import struct
import zlib
from pathlib import Path

import zstandard

from conformance.fuzz.specimen import KIB, MIB, Specimen, guest_content
from conformance.fuzz.specimens.archives import archive
from conformance.fuzz.specimens.compressed import BOMB
from conformance.fuzz.specimens.hypervisors import Bench

__all__ = ["ova", "qcow2", "vmdk", "xva"]

SECTOR = 512
CLUSTER_BITS = 21


def _deflated(window: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, window)
    zeroes = bytes(MIB)
    return b"".join(packer.compress(zeroes) for _ in range(BOMB // MIB)) + packer.flush()


def qcow2(directory: Path) -> list[Specimen]:
    """The first cluster's entry points to the bomb behind the end: zlib and zstd."""
    bench = Bench(directory, guest_content(200 * KIB))
    packer = zstandard.ZstdCompressor(level=1).compressobj(size=BOMB)
    zeroes = bytes(MIB)
    zstd = b"".join(packer.compress(zeroes) for _ in range(BOMB // MIB)) + packer.flush()
    made = []
    for kind, bomb in {"zlib": _deflated(-12), "zstd": zstd}.items():
        name = f"bomb-{kind}.qcow2"
        bench.convert("qcow2", name, f"cluster_size=2M,compression_type={kind}", "-c")
        data = bytearray((directory / name).read_bytes())
        table = int.from_bytes(data[40:48], "big")
        entries = int.from_bytes(data[table : table + 8], "big") & 0x00FFFFFFFFFFFE00
        data += bytes(-len(data) % SECTOR)
        # Bit 62: compressed. The number of further sectors stands above the host's offset.
        shift = 62 - (CLUSTER_BITS - 8)
        more = -(-len(bomb) // SECTOR) - 1
        entry = 1 << 62 | more << shift | len(data)
        data[entries : entries + 8] = entry.to_bytes(8, "big")
        data += bomb + bytes(-len(bomb) % SECTOR)
        made.append(_bomb("qcow2", kind, {name: bytes(data)}, f"qcow2:{{}}/{name}"))
    return made


def _bomb(form: str, kind: str, files: dict[str, bytes], source: str) -> Specimen:
    return Specimen(form, f"bomb {kind}", files, source, None, bomb=True)


def vmdk(directory: Path) -> list[Specimen]:
    """A grain whose marker claims all the bytes of the grains behind it, too."""
    bench = Bench(directory, guest_content(16 * KIB) + _random(MIB))
    bench.convert("vmdk", "bomb.vmdk", "subformat=streamOptimized")
    data = bytearray((directory / "bomb.vmdk").read_bytes())
    marker = data.find(struct.pack("<Q", 128), MIB // 16)
    bomb = _deflated(15)[: MIB // 2]
    if marker > 0:
        struct.pack_into("<I", data, marker + 8, len(bomb))
        data[marker + 12 : marker + 12 + len(bomb)] = bomb
    return [_bomb("vmdk", "grain", {"bomb.vmdk": bytes(data)}, "vmdk:{}/bomb.vmdk")]


def _random(size: int) -> bytes:
    # The first pieces of 16 KiB of a guest's content are random ones; that is all we want.
    return b"".join(guest_content(16 * KIB, seed=n) for n in range(size // (16 * KIB)))


def _laughs() -> str:
    lines = ['<!ENTITY a0 "ha">']
    lines += [f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12)]
    return "<?xml version='1.0'?><!DOCTYPE x [" + "".join(lines) + "]><x>&a11;</x>"


def _deep() -> str:
    return "<?xml version='1.0'?>" + "<a>" * 100_000 + "</a>" * 100_000


def ova(directory: Path) -> list[Specimen]:
    """Entities that multiply, and elements within elements."""
    del directory
    return [
        _xml("ova", kind, "vm.ovf", text)
        for kind, text in {"entities": _laughs(), "depth": _deep()}.items()
    ]


def xva(directory: Path) -> list[Specimen]:
    """The same in an XVA's description."""
    del directory
    return [
        _xml("xva", kind, "ova.xml", text)
        for kind, text in {"entities": _laughs(), "depth": _deep()}.items()
    ]


def _xml(form: str, kind: str, name: str, text: str) -> Specimen:
    members = [(name, text.encode()), ("a.vmdk", b"KDMV")]
    made = archive(form, f"bomb {kind}", members, "", b"")
    made.bomb, made.content = True, None
    return made
