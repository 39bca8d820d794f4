"""A reader of Xen Orchestra repositories, written from the description of the format alone.

It shares no line with what it checks: struct, the unpackers, the ciphers. Strict where a writer
must be exact: any liberty is an AssertionError.
"""

import gzip
import json
import re
import struct
import uuid
from pathlib import Path
from typing import Any

import brotli
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

__all__ = ["Decoder", "all_points"]

BLOCK = 2 * 1024 * 1024
STAMP = re.compile(r"\d{8}T\d{6}Z")


class Decoder:
    """One repository."""

    def __init__(self, root: Path, key: str = "") -> None:
        self.root = root
        note = root / "encryption.json"
        algorithm = json.loads(note.read_text())["algorithm"] if note.exists() else "none"
        raw = key.encode()
        self.cipher: Any = {
            "none": lambda: None,
            "chacha20-poly1305": lambda: ChaCha20Poly1305(raw),
            "aes-256-gcm": lambda: AESGCM(raw),
        }[algorithm]()

    def file(self, path: Path) -> bytes:
        data = path.read_bytes()
        return data if self.cipher is None else self.cipher.decrypt(data[:12], data[12:], None)

    def points(self) -> dict[str, dict[str, Any]]:
        """stamp -> metadata, of all VMs; with ``_dir``."""
        found: dict[str, dict[str, Any]] = {}
        vms = self.root / "xo-vm-backups"
        for vm in sorted(vms.iterdir()) if vms.exists() else []:
            if vm.name.startswith(".") or vm.name.endswith(".lock"):
                continue
            for path in sorted(vm.glob("[0-9]*.json")):
                assert STAMP.fullmatch(path.stem), path
                metadata = json.loads(self.file(path))
                assert metadata["version"] == "2.0.0"
                assert metadata["mode"] == "delta"
                assert metadata["vm"]["uuid"] == vm.name
                assert set(metadata["vhds"]) == set(metadata["vdis"])
                assert {vbd["VDI"] for vbd in metadata["vbds"].values()} == set(metadata["vdis"])
                found[path.stem] = {**metadata, "_dir": vm}
            self.cache(vm)
        return found

    def cache(self, vm: Path) -> None:
        """If there is one, it has exactly the points that are there."""
        path = vm / "cache.json.gz"
        if path.exists():
            cached = json.loads(gzip.decompress(self.file(path)))
            names = {f"/xo-vm-backups/{vm.name}/{each.name}" for each in vm.glob("[0-9]*.json")}
            assert set(cached) == names
            assert all(row["_filename"] == row["id"] == name for name, row in cached.items())

    def lineage(self, directory: Path) -> None:
        """Xen Orchestra gives a directory up in which a disk has two children, or an id two disks.

        A disk that a crash has left without its point does not count: it is removed.
        """
        named = {
            point["_dir"] / path
            for point in self.points().values()
            for path in point["vhds"].values()
        }
        disks = [Vhd(self, path) for path in sorted(directory.glob("[0-9]*.vhd")) if path in named]
        parents = [disk.name for disk in disks if disk.type == 4]
        assert len(set(parents)) == len(parents)
        assert len({disk.uuid for disk in disks}) == len(disks)

    def disks(self, stamp: str) -> dict[str, bytes]:
        """Content by the VBD's device."""
        metadata = self.points()[stamp]
        names = {vbd["VDI"]: vbd["device"] for vbd in metadata["vbds"].values()}
        found: dict[str, bytes] = {}
        for ref, relative in metadata["vhds"].items():
            path = metadata["_dir"] / relative
            disk = Vhd(self, path)
            assert str(disk.uuid) == metadata["vdis"][ref]["uuid"]
            assert metadata["isVhdDifferencing"][ref] == (disk.type == 4)
            assert path.parent.name == metadata["vdis"][ref]["$snapshot_of$uuid"]
            found[names[ref]] = disk.content()
        return found


class Vhd:
    """One disk of a chain, and its parents."""

    def __init__(self, decoder: Decoder, path: Path) -> None:
        self.decoder, self.path = decoder, path
        self.plain = not path.name.endswith(".alias.vhd")
        if self.plain:
            assert decoder.cipher is None
            self.raw = path.read_bytes()
            footer, header = self.raw[:512], self.raw[512:1536]
            assert self.raw[-512:] == footer
        else:
            text = decoder.file(path).decode()
            assert re.fullmatch(r"data/[0-9TZ]{16}\.vhd", text), text
            self.directory = path.parent / text
            filters = self.directory / "chunk-filters.json"
            self.filters = json.loads(decoder.file(filters)) if filters.exists() else []
            footer, header = self.part("footer"), self.part("header")
        self._footer(footer)
        self._header(header)
        parent = self.name.decode("utf-16-be").rstrip("\0")
        self.parent: Vhd | None = None
        if self.type == 4:
            assert parent < path.name, "sorted, or Xen Orchestra refuses the chain"
            self.parent = Vhd(decoder, path.parent / parent)
            assert self.parent.uuid == self.parent_uuid
        else:
            assert self.type == 3
            assert parent == ""
            assert self.parent_uuid.int == 0

    def _footer(self, raw: bytes) -> None:
        assert len(raw) == 512
        (cookie, features, version, offset, _, creator, _, _, original, current, geometry, kind) = (
            struct.unpack(">8sIIQI4sI4sQQ4sI", raw[:64])
        )
        assert cookie == b"conectix"
        assert features == 2
        assert version == 0x10000
        assert offset == 512
        assert original <= current
        assert struct.unpack(">I", raw[64:68])[0] == checksum(raw, 64)
        cylinders, heads, sectors = struct.unpack(">HBB", geometry)
        assert cylinders * heads * sectors * 512 <= current
        assert creator == b"tap\0"
        assert raw[84:] == bytes(428)
        self.size, self.type, self.uuid = current, kind, uuid.UUID(bytes=raw[68:84])

    def _header(self, raw: bytes) -> None:
        assert len(raw) == 1024
        cookie, none, table, version, entries, size, total = struct.unpack(">8sQQIIII", raw[:40])
        assert cookie == b"cxsparse"
        assert none == (1 << 64) - 1
        assert table == 1536
        assert version == 0x10000
        assert entries == max(1, -(-self.size // BLOCK))
        assert size == BLOCK
        assert total == checksum(raw, 36)
        self.entries = entries
        self.parent_uuid = uuid.UUID(bytes=raw[40:56])
        self.name = raw[64:576]
        assert raw[576:] == bytes(448), "no locators"

    def part(self, name: str) -> bytes:
        data = self.decoder.file(self.directory / name)
        for each in self.filters:
            data = {"brotli": brotli.decompress, "gzip": gzip.decompress}[each](data)
        return data

    def blocks(self) -> dict[int, bytes]:
        """Those that are in this file, 2 MiB each."""
        found = dict(self._plain_blocks() if self.plain else self._directory_blocks())
        for block, data in found.items():
            assert len(data) == 512 + BLOCK
            assert data[:512] == b"\xff" * 512
            assert block < self.entries
        return {block: data[512:] for block, data in found.items()}

    def _plain_blocks(self) -> Any:
        table = struct.unpack(f">{self.entries}I", self.raw[1536 : 1536 + 4 * self.entries])
        end = 1536 + -(-4 * self.entries // 512) * 512
        places = sorted(512 * sector for sector in table if sector != 0xFFFFFFFF)
        assert places == [end + n * (512 + BLOCK) for n in range(len(places))]
        assert len(self.raw) == end + len(places) * (512 + BLOCK) + 512
        for block, sector in enumerate(table):
            if sector != 0xFFFFFFFF:
                yield block, self.raw[512 * sector : 512 * sector + 512 + BLOCK]

    def _directory_blocks(self) -> Any:
        bat = self.part("bat")
        assert len(bat) == self.entries
        files = set()
        for path in self.directory.glob("blocks/*/*"):
            files.add(int(path.parent.name) * 1000 + int(path.name))
        present = {n for n in range(self.entries) if bat[n // 8] & (0x80 >> (n % 8))}
        assert files == present
        for block in present:
            yield block, self.part(f"blocks/{block // 1000}/{block % 1000}")

    def content(self) -> bytes:
        content = bytearray(self.entries * BLOCK)
        if self.parent is not None:
            below = self.parent.content()
            content[: len(below)] = below
        for block, data in self.blocks().items():
            content[block * BLOCK : (block + 1) * BLOCK] = data
        assert not any(content[self.size :]), "padded by zeroes"
        return bytes(content[: self.size])


def checksum(raw: bytes, at: int) -> int:
    return ~sum(raw[:at] + raw[at + 4 :]) & 0xFFFFFFFF


def all_points(root: Path, key: str = "") -> dict[str, dict[str, bytes]]:
    """stamp -> device -> content, of all VMs."""
    decoder = Decoder(root, key)
    for directory in root.glob("xo-vm-backups/*/vdis/*/*"):
        decoder.lineage(directory)
    return {stamp: decoder.disks(stamp) for stamp in decoder.points()}
