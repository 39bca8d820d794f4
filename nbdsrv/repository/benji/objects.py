"""Objects of a storage: their metadata, and what they were before Benji's transforms.

::

    blocks/94/70/0000000000000001-0000000000000001          94 70: the MD5 of the name begins so
    blocks/94/70/0000000000000001-0000000000000001.meta
        {object_size, size, checksum, transforms: [{name, module, materials}], hmac}

    read ──> envelope key, AES-256-GCM's keystream ──> zstd ──> size bytes    the last one first

Rule: nothing is larger than the metadata says, and the metadata no larger than a bound, so that no
object can fill the memory. Without a tag decryption proves nothing: checksums do.
"""

import base64
import errno as os_errno
import hashlib
import hmac
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol, cast

import msgspec
import zstandard
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from nbdsrv.errors import CorruptImage, RepositoryError, UnsupportedImage
from nbdsrv.repository.benji.keys import Keys
from nbdsrv.store.store import ObjectMissing, StoreError
from nbdsrv.store.tree import Tree

__all__ = ["META", "Metadata", "Objects", "Reader", "object_path"]

META = ".meta"
MAX_META = 1 << 16
"""Bytes of an object's metadata; it has some 600."""
MAX_TRANSFORMS = 8
MAX_DICTIONARY = 1 << 20
MAX_WINDOW = 1 << 27
"""Bytes zstd may look back: what its level 22 does."""
READ = 1 << 20
PIECE = 1 << 16
"""Bytes of an object that are read at a time: the head of a version needs no more."""
_DATA_KEYS = ("aes_256_gcm", "aes_256_gcm_ecc")


class Reader(Protocol):
    """What gives bytes in order."""

    def read(self, size: int = -1, /) -> bytes:
        """At most so many; none at the end."""
        ...


@dataclass(frozen=True, slots=True)
class Metadata:
    """The ``.meta`` of an object.

    Attributes:
        object_size: bytes of the object.
        size: bytes of what it was.
        checksum: of that, in hex, or "".
        transforms: (name, module, materials), the first one applied first.
    """

    object_size: int
    size: int
    checksum: str
    transforms: Sequence[tuple[str, str, Mapping[str, Any]]]


def object_path(prefix: str, key: str) -> str:
    """Where an object lies."""
    digest = hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()
    return f"{prefix}/{digest[:2]}/{digest[2:4]}/{key}"


class Objects:
    """A storage's objects. Thread-safe; all methods block.

    Attributes:
        tree: where they lie.
        authenticated: is the metadata's HMAC checked?
        encrypted: has any object been so?
    """

    def __init__(self, tree: Tree, keys: Keys, hmac_key: bytes | None) -> None:
        self.tree = tree
        self._keys = keys
        self._hmac_key = hmac_key
        self.authenticated = hmac_key is not None
        self.encrypted = False
        self._authentic = False  # has any HMAC been right?
        self._local = threading.local()
        self._dictionaries: dict[str, zstandard.ZstdCompressionDict] = {}

    def metadata(self, path: str) -> Metadata:
        """Of the object at ``path``.

        Raises:
            ObjectMissing: there is none.
            CorruptImage: it is broken, or its HMAC is wrong.
        """
        where = path + META
        raw = self._whole(where, MAX_META)
        try:
            said = msgspec.json.decode(raw, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise self.corrupt(where, f"the metadata, {error}") from error
        if self._hmac_key is not None:
            self._authenticate(where, said, self._hmac_key)
        version = said.get("metadata_version")
        if not isinstance(version, str):
            raise self.corrupt(where, "metadata without a version")
        if version.partition(".")[0] not in {"1", "2"}:
            raise UnsupportedImage(f"{self.tree.full(where)}: metadata of version {version!r:.20}")
        checksum = said.get("checksum") or ""
        if not isinstance(checksum, str):
            raise self.corrupt(where, "a checksum that is no text")
        return Metadata(
            self._number(where, said, "object_size"),
            self._number(where, said, "size"),
            checksum,
            self._transforms(where, said.get("transforms") or []),
        )

    def read(self, path: str, limit: int) -> tuple[Metadata, bytes]:
        """A whole object, and what it was: not yet compared with any checksum.

        Args:
            path: of the object.
            limit: bytes it may have been at most.

        Raises:
            ObjectMissing: it, or its metadata, is gone.
            CorruptImage: it is not what its metadata says.
        """
        metadata = self.metadata(path)
        self._check_size(path, metadata, limit)
        data = self._whole(path, metadata.object_size)
        if len(data) != metadata.object_size:
            text = f"{len(data)} bytes, the metadata says {metadata.object_size}"
            raise self.corrupt(path, text)
        for name, module, materials in reversed(metadata.transforms):
            if module in _DATA_KEYS:
                data = self._decryptor(path, name, module, materials).update(data)
            else:
                data = self._unpack(path, name, materials, data, limit)
        if len(data) != metadata.size:
            text = f"{len(data)} bytes of content, the metadata says {metadata.size}"
            raise self.corrupt(path, text)
        return metadata, data

    def stream(self, path: str, limit: int) -> tuple[Metadata, Reader]:
        """What an object was, piece by piece, for those that are too large to be in memory.

        Errors and limits as ``read``; what is read may raise CorruptImage too.
        """
        metadata = self.metadata(path)
        self._check_size(path, metadata, limit)
        reader: Reader = _ObjectReader(self.tree, path, metadata.object_size)
        for name, module, materials in reversed(metadata.transforms):
            if module in _DATA_KEYS:
                reader = _Deciphered(reader, self._decryptor(path, name, module, materials))
            else:
                # One of its own: it is left in the middle where the head is enough.
                source = cast("IO[bytes]", reader)  # nothing but read() is called
                reader = self._new_unpacker(name).stream_reader(source, read_size=PIECE)
        return metadata, _Bounded(reader, metadata.size, lambda text: self.corrupt(path, text))

    def corrupt(self, path: str, text: str) -> CorruptImage:
        """The error to raise."""
        return CorruptImage(f"corrupt repository: {self.tree.full(path)}: {text}")

    def _whole(self, path: str, limit: int) -> bytes:
        try:
            return self.tree.read(path, limit)
        except StoreError as error:
            if error.errno != os_errno.EFBIG:
                raise
            raise self.corrupt(path, f"more than the {limit} bytes it should have") from error

    # --- metadata ------------------------------------------------------------------------------

    def _number(self, path: str, said: Mapping[str, Any], name: str) -> int:
        value = said.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 50:
            raise self.corrupt(path, f"{name} {value!r:.40}")
        return value

    def _transforms(self, path: str, said: Any) -> Sequence[tuple[str, str, Mapping[str, Any]]]:
        found: list[tuple[str, str, Mapping[str, Any]]] = []
        if not isinstance(said, list) or len(said) > MAX_TRANSFORMS:
            raise self.corrupt(path, "transforms that make no sense")
        for each in said:
            row: dict[str, Any] = each if isinstance(each, dict) else {}
            name, module, materials = row.get("name"), row.get("module"), row.get("materials")
            if not isinstance(name, str) or not isinstance(materials, dict):
                raise self.corrupt(path, "a transform that makes no sense")
            if module not in {"zstd", *_DATA_KEYS}:
                text = f"transform {name!r:.40} of module {module!r:.40} is not known"
                raise UnsupportedImage(f"{self.tree.full(path)}: {text}")
            found.append((name, module, materials))
        return found

    def _authenticate(self, path: str, said: dict[str, Any], key: bytes) -> None:
        told = said.pop("hmac", None)
        digest = told.get("digest") if isinstance(told, dict) else None
        if not isinstance(told, dict) or told.get("algorithm") != "sha256" or not digest:
            raise self.corrupt(path, "it is not authenticated, and the configuration says it is")
        made = hmac.new(key, digestmod="sha256")
        _digest_into(made, said)
        if hmac.compare_digest(base64.b64encode(made.digest()), str(digest).encode()):
            self._authentic = True
            return
        text = "its HMAC is wrong: it was changed, or the HMAC key is another"
        if self._authentic:
            raise self.corrupt(path, text)
        raise RepositoryError(f"{self.tree.full(path)}: {text}")

    def _check_size(self, path: str, metadata: Metadata, limit: int) -> None:
        # Transforms that make nothing smaller are not applied, and encryption adds nothing.
        if metadata.size > limit or metadata.object_size > limit:
            size = max(metadata.size, metadata.object_size)
            raise self.corrupt(path, f"{size} bytes, where {limit} is the most there can be")

    # --- transforms ----------------------------------------------------------------------------

    def _decryptor(
        self, path: str, name: str, module: str, materials: Mapping[str, Any]
    ) -> CipherContext:
        self.encrypted = True
        try:
            wrapped = base64.b64decode(materials["envelope_key"], validate=True)
            iv = base64.b64decode(materials["iv"], validate=True)
        except (KeyError, TypeError, ValueError) as error:
            raise self.corrupt(path + META, "materials of encryption that make no sense") from error
        if len(iv) != 16:
            raise self.corrupt(path + META, f"an IV of {len(iv)} bytes")
        try:
            key = self._keys.envelope(module, name, wrapped)
        except CorruptImage as error:
            raise self.corrupt(path + META, str(error)) from error
        if len(key) != 32:
            raise self.corrupt(path + META, f"an envelope key of {len(key)} bytes")
        return Cipher(algorithms.AES(key), modes.GCM(iv)).decryptor()

    def _unpack(
        self, path: str, name: str, materials: Mapping[str, Any], data: bytes, limit: int
    ) -> bytes:
        size = materials.get("original_size")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= limit:
            raise self.corrupt(path + META, f"zstd of {size!r:.40} bytes")
        try:
            told = zstandard.frame_content_size(data)
            parameters = zstandard.get_frame_parameters(data)
            if told > size or parameters.window_size > MAX_WINDOW:
                raise self.corrupt(path, f"a zstd frame of {told} bytes in place of {size}")
            return self._unpacker(name).decompress(data, max_output_size=size)
        except zstandard.ZstdError as error:
            raise self.corrupt(path, f"zstd: {error}") from error

    def _unpacker(self, name: str) -> zstandard.ZstdDecompressor:
        found: dict[str, zstandard.ZstdDecompressor] | None
        found = getattr(self._local, "unpackers", None)
        if found is None:
            found = self._local.unpackers = {}
        if name not in found:
            found[name] = self._new_unpacker(name)
        return found[name]

    def _new_unpacker(self, name: str) -> zstandard.ZstdDecompressor:
        dictionary = self._dictionary(name)
        if dictionary is None:
            return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        return zstandard.ZstdDecompressor(dictionary, max_window_size=MAX_WINDOW)

    def _dictionary(self, name: str) -> zstandard.ZstdCompressionDict | None:
        configuration = self._keys.configuration
        path = configuration.transforms.get(name, {}).get("dictDataFile")
        if not isinstance(path, str) or not path:
            return None
        if path not in self._dictionaries:
            try:
                with open(path, "rb") as file:
                    raw = file.read(MAX_DICTIONARY)
                self._dictionaries[path] = zstandard.ZstdCompressionDict(
                    raw, dict_type=zstandard.DICT_TYPE_FULLDICT
                )
            except (OSError, ValueError, zstandard.ZstdError) as error:
                text = f"dictDataFile {path} of transform {name!r}: {error}"
                raise RepositoryError(f"{configuration.path}: {text}") from error
        return self._dictionaries[path]


def _digest_into(made: "hmac.HMAC", value: Any) -> None:
    """Benji's order: keys sorted, each before its value; numbers as Python writes them."""
    if isinstance(value, dict):
        for key in sorted(value):
            made.update(str(key).encode())
            _digest_into(made, value[key])
    elif isinstance(value, list):
        for each in value:
            _digest_into(made, each)
    else:
        made.update(str(value).encode())


class _ObjectReader:
    """An object's bytes; opened once where it is a file."""

    def __init__(self, tree: Tree, path: str, size: int) -> None:
        self._tree = tree
        self._path = path
        self._left = size
        self._position = 0
        node = tree.find(path)
        if node is None:
            raise ObjectMissing(f"{tree.full(path)}: no such file")
        if node.size != size:
            text = f"{node.size} bytes, the metadata says {size}"
            raise CorruptImage(f"corrupt repository: {tree.full(path)}: {text}")

    def read(self, size: int = -1, /) -> bytes:
        length = min(READ if size < 0 else size, self._left)
        if not length:
            return b""
        data = self._tree.read_range(self._path, self._position, length)
        self._position += length
        self._left -= length
        return data


class _Deciphered:
    def __init__(self, reader: Reader, decryptor: CipherContext) -> None:
        self._reader = reader
        self._decryptor = decryptor

    def read(self, size: int = -1, /) -> bytes:
        data = self._reader.read(size)
        return self._decryptor.update(data) if data else b""


class _Bounded:
    """As much as the metadata says, neither more nor less."""

    def __init__(self, reader: Reader, size: int, error: Callable[[str], CorruptImage]) -> None:
        self._reader = reader
        self._left = size
        self._error = error

    def read(self, size: int = -1, /) -> bytes:
        wanted = READ if size < 0 else size
        try:
            data = self._reader.read(wanted)
        except zstandard.ZstdError as error:
            raise self._error(f"zstd: {error}") from error
        self._left -= len(data)
        if self._left < 0 or (not data and self._left):
            raise self._error("its content has not the size that the metadata says")
        return data
