"""A reader of native repositories that knows nothing but docs/repository-format.md.

It imports nothing of nbdsrv. If it and nbdsrv disagree, one of them does not do what the page says.
Directories only; whole objects in memory; no mercy on damage.
"""

import base64
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from hashlib import sha256
from hmac import digest as hmac
from urllib.parse import quote
from uuid import UUID

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from xxhash import xxh3_128_digest

ZERO = bytes(32)
CHUNK, PAGE, ROOT, POINT = 0, 1, 2, 4


def spans(lengths: bytes, ulen: int) -> Iterator[tuple[int, int]]:
    """§5: (begin in the payload, bytes with its check) of each frame."""
    count = -(-ulen // 32768)
    at = 2 * count
    for number in range(count):
        (length,) = struct.unpack_from("<H", lengths, 2 * number)
        size = 16 + (length or min(32768, ulen - 32768 * number))
        yield at, size
        at += size


class Stranger:
    """§ numbers are the page's."""

    def __init__(self, path: str, passphrase: str = "") -> None:
        self.path = path
        raw = self.read("nbdrepo.json")
        config = json.loads(raw)
        assert (config["format"], config["version"]) == ("nbdrepo", 1)
        self.owner = UUID(config["id"]).bytes
        self.master = self.unlock(raw, passphrase) if config["cipher"] else None
        self.hash: Callable[[bytes], bytes] = {  # §4
            "blake3": lambda data: blake3(data).digest(),
            "sha256": lambda data: sha256(data).digest(),
        }[config["hash"]]
        self.id_of = self.hash
        if self.master is not None:
            key = self.derived(ZERO, b"nbdrepo v1 ids")
            self.id_of = {
                "blake3": lambda data: blake3(data, key=key).digest(),
                "sha256": lambda data: hmac(key, data, "sha256"),
            }[config["hash"]]

    def read(self, key: str) -> bytes:
        with open(os.path.join(self.path, key), "rb") as file:
            return file.read()

    def unlock(self, config: bytes, passphrase: str) -> bytes:  # §3
        for name in os.listdir(os.path.join(self.path, "keys")):
            slot = json.loads(self.read(f"keys/{name}"))
            salt, nonce, wrapped = (base64.b64decode(slot[n]) for n in ("salt", "nonce", "wrapped"))
            assert slot["kdf"] == "argon2id"
            kdf = Argon2id(
                salt=salt,
                length=32,
                iterations=slot["passes"],
                lanes=slot["lanes"],
                memory_cost=slot["memory_kib"],
            )
            try:
                return AESGCM(kdf.derive(passphrase.encode())).decrypt(nonce, wrapped, config)
            except InvalidTag:
                continue
        raise AssertionError("no slot opens")

    def derived(self, salt: bytes, info: bytes) -> bytes:
        """RFC 5869, one block of output."""
        assert self.master is not None
        return hmac(hmac(salt, self.master, "sha256"), info + b"\x01", "sha256")

    def entry(self, pack: bytes, at: int, kind: int, want: bytes | None = None) -> bytes:  # §5
        magic, _, cipher, owner, salt = struct.unpack("<8sBB6x16s32s", pack[:64])
        assert (magic, owner, cipher) == (b"NBDPACK1", self.owner, self.master is not None)
        head = pack[at : at + 48]
        mark, codec, found, ulen, clen, id_ = struct.unpack("<4sBB2xII32s", head)
        assert mark == b"CHNK"
        assert found == kind
        assert zlib.crc32(head) == struct.unpack("<I", pack[at + 48 : at + 52])[0]
        body = pack[at + 52 : at + 52 + clen]
        cipher_ = None
        if self.master is not None:
            cipher_ = AESGCM(self.derived(salt, b"nbdrepo v1 pack"))
        if codec == 2:
            lengths = body[: 2 * -(-ulen // 32768)]
            content = b"".join(self.frames(pack, at, id_, ulen, lengths, cipher_))
            assert clen == len(lengths) + sum(size for _, size in spans(lengths, ulen))
        else:
            if cipher_ is not None:
                body = cipher_.decrypt(struct.pack("<III", at, 0, 0), body, head)
            content = zstandard.decompress(body) if codec == 1 else body
        assert len(content) == ulen
        assert self.id_of(content) == id_
        assert want in {None, id_}
        return content

    def frames(
        self, pack: bytes, at: int, id_: bytes, ulen: int, lengths: bytes, cipher: AESGCM | None
    ) -> Iterator[bytes]:
        """Each by itself: nothing but the lengths is used of what lies around it."""
        for number, (start, size) in enumerate(spans(lengths, ulen)):
            stored = pack[at + 52 + start : at + 52 + start + size]
            count = struct.pack("<I", number)
            if cipher is not None:
                nonce = struct.pack("<II", at, number) + bytes(4)
                frame = cipher.decrypt(nonce, stored, id_ + count)
            else:
                frame = stored[:-16]
            raw = lengths[2 * number : 2 * number + 2] == b"\0\0"
            content = frame if raw else zstandard.decompress(frame)
            if cipher is None:
                seed = (int.from_bytes(id_[:8], "little") + number) % 2**64
                assert xxh3_128_digest(content, seed) == stored[-16:]
            assert len(content) == min(32768, ulen - 32768 * number)
            yield content

    def directory(self, pack: bytes) -> Iterator[tuple[bytes, int]]:
        count, length, crc, row, end = struct.unpack("<IIII8s", pack[-24:])
        rows = pack[-24 - length : -24]
        assert (end, crc, length) == (b"NBDPEND1", zlib.crc32(rows), row * count)
        for at in range(0, length, row):
            id_, offset = struct.unpack_from("<32sI", rows, at)
            yield id_, offset

    def fetch(self, prefix: str, name: bytes, offset: int, kind: int, id_: bytes) -> bytes:
        """§6: by its place, or wherever a pack says that it has it."""
        try:
            pack = self.read(f"{prefix}/{name.hex()[:2]}/{name.hex()}.pk")
        except FileNotFoundError:
            for folder, _, names in os.walk(os.path.join(self.path, prefix)):
                for other in names:
                    pack = self.read(os.path.join(folder, other))
                    for found, at in self.directory(pack):
                        if found == id_:
                            return self.entry(pack, at, kind, id_)
            raise
        assert self.hash(pack) == name
        return self.entry(pack, offset, kind, id_)

    def by_frames(self, name: bytes, at: int, id_: bytes, ulen: int, lengths: bytes) -> bytes:
        """§5: by the slot's lengths alone; from elsewhere if the pack is gone."""
        try:
            pack = self.read(f"packs/{name.hex()[:2]}/{name.hex()}.pk")
        except FileNotFoundError:
            return self.fetch("packs", name, at, CHUNK, id_)
        cipher = None
        if self.master is not None:
            cipher = AESGCM(self.derived(pack[32:64], b"nbdrepo v1 pack"))
        return b"".join(self.frames(pack, at, id_, ulen, lengths, cipher))

    def points(self, group: str) -> list[dict]:  # §7
        folder = f"points/{quote(group, safe='')}"
        found = []
        for name in sorted(os.listdir(os.path.join(self.path, folder))):
            point = json.loads(self.entry(self.read(f"{folder}/{name}"), 64, POINT))
            assert (f"{point['id']}.pt", point["group"], point["v"]) == (name, group, 1)
            found.append(point)
        return found

    def restore(self, point: dict, name: str) -> bytes:  # §6
        disk = next(disk for disk in point["disks"] if disk["name"] == name)
        ref, unhex = disk["root"], bytes.fromhex
        root = self.fetch("metas", unhex(ref["pack"]), ref["offset"], ROOT, unhex(ref["id"]))
        magic, size, chunk, slots, pages, packs = struct.unpack("<8sQIIII", root[:32])
        assert (magic, size) == (b"NBDROOT1", disk["size"])
        table, rows = root[32 : 32 + 32 * packs], root[32 + 32 * packs :]
        contents = b"".join(rows[at + 48 : at + 80] for at in range(0, 80 * pages, 80))
        image = struct.pack("<QII", size, chunk, slots) + contents
        assert disk["image_id"] == self.id_of(image).hex()
        parts = []
        for number in range(pages):
            end = min(size, (number + 1) * chunk * slots)
            parts.append(
                self.page(table, rows[80 * number : 80 * number + 80], number, end, chunk, slots)
            )
        return b"".join(parts)

    def page(
        self, table: bytes, row: bytes, number: int, end: int, chunk: int, slots: int
    ) -> bytes:
        start = number * chunk * slots
        if row[:32] == ZERO:
            return bytes(end - start)
        pack, offset = struct.unpack_from("<II", row, 32)
        page = self.fetch("metas", table[32 * pack : 32 * pack + 32], offset, PAGE, row[:32])
        magic, count, packs = struct.unpack("<8sII", page[:16])
        assert (magic, count) == (b"NBDPAGE1", -(-(end - start) // chunk))
        names, rows = page[16 : 16 + 32 * packs], page[16 + 32 * packs :]
        slot = 48 + 2 * -(-chunk // 32768)
        ids = b"".join(rows[at : at + 32] for at in range(0, slot * count, slot))
        assert row[48:] == self.id_of(ids)
        parts = []
        for at in range(start, end, chunk):
            here = (at - start) // chunk * slot
            id_, pack, offset, codec, lengths = struct.unpack_from(
                f"<32sII4xB3x{slot - 48}s", rows, here
            )
            length = min(chunk, end - at)
            if id_ == ZERO:
                parts.append(bytes(length))
                continue
            name = names[32 * pack : 32 * pack + 32]
            parts.append(self.fetch("packs", name, offset, CHUNK, id_))
            assert len(parts[-1]) == length
            if codec == 2:
                assert parts[-1] == self.by_frames(name, offset, id_, length, lengths)
        return b"".join(parts)
