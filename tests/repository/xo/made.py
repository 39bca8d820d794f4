"""Xen Orchestra repositories made to measure, by an encoder of their own.

It shares no code with the reader: the format once more, from its description.
"""

import gzip
import json
import os
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import brotli
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

__all__ = ["BLOCK", "FULL", "KEY", "VM", "Encoder", "Layer", "Made", "bits", "disk_uuid"]

BLOCK = 2 << 20
KEY = "0123456789abcdef0123456789abcdef"
VM = "b0a7e4c2-5d1f-4c8e-9a53-0000000000aa"
JOB = "aaaaaaaa-0000-4000-8000-000000000001"
FULL = b"\xff" * 512


def disk_uuid(name: str, stamp: str) -> uuid.UUID:
    """The id of a disk's snapshot."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{name}/{stamp}")


def bits(sectors: Sequence[int]) -> bytes:
    """A sector bitmap with these sectors."""
    found = bytearray(512)
    for sector in sectors:
        found[sector // 8] |= 0x80 >> sector % 8
    return bytes(found)


def _summed(raw: bytearray, at: int) -> bytes:
    raw[at : at + 4] = bytes(4)
    raw[at : at + 4] = struct.pack(">I", ~sum(raw) & 0xFFFFFFFF)
    return bytes(raw)


@dataclass
class Layer:
    """One disk of one point.

    Attributes:
        blocks: number to 2 MiB of data.
        bitmaps: number to its sector bitmap, where it is not all ones.
        layout: ``vhd``, ``none``, ``gzip`` or ``brotli``: a file, or a directory so packed.
        parent: stamp of the point it is a delta to, or None.
    """

    stamp: str
    size: int
    blocks: dict[int, bytes] = field(default_factory=dict)
    bitmaps: dict[int, bytes] = field(default_factory=dict)
    layout: str = "brotli"
    parent: str | None = None
    name: str = "root"
    entries: int | None = None

    @property
    def file_name(self) -> str:
        return f"{self.stamp}.vhd" if self.layout == "vhd" else f"{self.stamp}.alias.vhd"


class Encoder:
    """Turns Layers into files."""

    def __init__(self, algorithm: str = "none", key: str = KEY) -> None:
        self.algorithm = algorithm
        ciphers = {"chacha20-poly1305": ChaCha20Poly1305, "aes-256-gcm": AESGCM}
        self._cipher = ciphers[algorithm](key.encode()) if algorithm != "none" else None

    def seal(self, data: bytes) -> bytes:
        if self._cipher is None:
            return data
        nonce = os.urandom(12)
        return nonce + self._cipher.encrypt(nonce, data, None)

    def footer(self, layer: Layer) -> bytes:
        raw = bytearray(512)
        struct.pack_into(
            ">8sIIQI4sI4s", raw, 0, b"conectix", 2, 1 << 16, 512, 0, b"xo  ", 0, b"Wi2k"
        )
        struct.pack_into(
            ">QQHBBI", raw, 40, layer.size, layer.size, 964, 8, 17, 3 + (layer.parent is not None)
        )
        raw[68:84] = disk_uuid(layer.name, layer.stamp).bytes
        return _summed(raw, 64)

    def header(self, layer: Layer, parent: str | None) -> bytes:
        raw = bytearray(1024)
        entries = layer.entries if layer.entries is not None else -(-layer.size // BLOCK)
        none = (1 << 64) - 1
        struct.pack_into(">8sQQIII", raw, 0, b"cxsparse", none, 1536, 1 << 16, entries, BLOCK)
        if layer.parent is not None:
            raw[40:56] = disk_uuid(layer.name, layer.parent).bytes
            name = (parent or "").encode("utf-16-be")
            raw[64 : 64 + len(name)] = name
        return _summed(raw, 36)

    def vhd(self, layer: Layer, parent: str | None) -> bytes:
        count = -(-layer.size // BLOCK)
        at = -(-(1536 + 4 * count) // 512)
        table, data = [0xFFFFFFFF] * count, []
        for block in sorted(layer.blocks):
            table[block] = at
            data.append(layer.bitmaps.get(block, FULL) + layer.blocks[block])
            at += 1 + BLOCK // 512
        footer = self.footer(layer)
        head = footer + self.header(layer, parent) + struct.pack(f">{count}I", *table)
        return head.ljust(-(-len(head) // 512) * 512, b"\0") + b"".join(data) + footer

    def pack(self, layout: str, data: bytes) -> bytes:
        if layout == "gzip":
            data = gzip.compress(data, 1)
        elif layout == "brotli":
            data = brotli.compress(data, quality=0)
        return self.seal(data)


class Made:
    """One repository below ``root``."""

    def __init__(self, root: Path, algorithm: str = "none") -> None:
        self.root = root
        self.encoder = Encoder(algorithm)
        self.layers: dict[tuple[str, str], Layer] = {}
        root.mkdir(parents=True, exist_ok=True)
        if algorithm != "none":
            self.file("encryption.json", json.dumps({"algorithm": algorithm}).encode())
            self.file("metadata.json", self.encoder.seal(b'{"random":"0"}'))

    def file(self, path: str, data: bytes) -> Path:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        return place

    def vm(self, vm: str = VM) -> str:
        return f"xo-vm-backups/{vm}"

    def vdi(self, name: str = "root", vm: str = VM) -> str:
        """The directory of a disk."""
        return f"{self.vm(vm)}/vdis/{JOB}/{disk_uuid(name, 'live')}"

    def disk(self, layer: Layer, vm: str = VM) -> None:
        """Write one disk."""
        self.layers[layer.name, layer.stamp] = layer
        above = self.layers.get((layer.name, layer.parent or ""))
        parent = above.file_name if above is not None else None
        directory, encoder = self.vdi(layer.name, vm), self.encoder
        if layer.layout == "vhd":
            self.file(f"{directory}/{layer.file_name}", encoder.vhd(layer, parent))
            return
        data = f"data/{layer.stamp}.vhd"
        self.file(f"{directory}/{layer.file_name}", encoder.seal(data.encode()))
        place = f"{directory}/{data}"
        if layer.layout != "none":
            filters = json.dumps([layer.layout]).encode()
            self.file(f"{place}/chunk-filters.json", encoder.seal(filters))
        table = bytearray(layer.entries or -(-layer.size // BLOCK))
        for block, content in layer.blocks.items():
            table[block // 8] |= 0x80 >> block % 8
            raw = layer.bitmaps.get(block, FULL) + content
            path = f"{place}/blocks/{block // 1000}/{block % 1000}"
            self.file(path, encoder.pack(layer.layout, raw))
        for name, part in (
            ("bat", bytes(table)),
            ("header", encoder.header(layer, parent)),
            ("footer", encoder.footer(layer)),
        ):
            self.file(f"{place}/{name}", encoder.pack(layer.layout, part))

    def point(
        self,
        stamp: str,
        layers: Sequence[Layer],
        *,
        vm: str = VM,
        label: str = "web",
        extra: Mapping[str, object] | None = None,
    ) -> None:
        """Write the disks and the JSON."""
        vdis, vbds, vhds = {}, {}, {}
        for number, layer in enumerate(layers):
            self.disk(layer, vm)
            reference = f"OpaqueRef:{layer.name}-{stamp}"
            vdis[reference] = {
                "uuid": str(disk_uuid(layer.name, layer.stamp)),
                "name_label": layer.name,
                "virtual_size": layer.size,
                "$snapshot_of$uuid": str(disk_uuid(layer.name, "live")),
            }
            device = f"xvd{'abcdefgh'[number]}"
            vbds[f"OpaqueRef:vbd{number}"] = {
                "VDI": reference,
                "userdevice": str(number),
                "device": device,
            }
            vhds[reference] = f"vdis/{JOB}/{disk_uuid(layer.name, 'live')}/{layer.file_name}"
        said = {
            "version": "2.0.0",
            "mode": "delta",
            "jobId": JOB,
            "vm": {"uuid": vm, "name_label": label},
            "vdis": vdis,
            "vbds": vbds,
            "vhds": vhds,
            "size": 12345,
            **(extra or {}),
        }
        self.json(stamp, said, vm)

    def json(self, stamp: str, said: object, vm: str = VM) -> Path:
        """Write a point's JSON alone."""
        sealed = self.encoder.seal(json.dumps(said).encode())
        return self.file(f"{self.vm(vm)}/{stamp}.json", sealed)

    def content(self, stamp: str, name: str = "root") -> bytes:
        """What a disk holds at a point, by the simplest way there is."""
        layer = self.layers[name, stamp]
        data = bytearray(layer.size)
        if layer.parent is not None:
            below = self.content(layer.parent, name)[: layer.size]
            data[: len(below)] = below
        for block, content in layer.blocks.items():
            bitmap = layer.bitmaps.get(block, FULL)
            for sector in range(BLOCK // 512):
                start = block * BLOCK + sector * 512
                if start < layer.size and bitmap[sector // 8] & 0x80 >> sector % 8:
                    end = min(start + 512, layer.size)
                    data[start:end] = content[sector * 512 : sector * 512 + end - start]
        return bytes(data)
