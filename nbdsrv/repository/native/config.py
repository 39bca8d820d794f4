"""What a repository is: ``nbdrepo.json`` (docs/repository-format.md, "nbdrepo.json").

Written once and never changed. The keys are bound to its bytes: a repository whose configuration
was exchanged (so that a writer would no longer encrypt, say) cannot be unlocked.
"""

from typing import Annotated
from uuid import UUID, uuid4

import msgspec

from nbdsrv.errors import ConfigError, RepositoryError
from nbdsrv.repository.native.hashing import HASHES
from nbdsrv.repository.native.sealing import CIPHER

__all__ = ["DEFAULT_CHUNK", "FORMAT", "VERSION", "RepositoryConfig"]

FORMAT = "nbdrepo"
VERSION = 1
DEFAULT_CHUNK = 256 << 10
MIN_CHUNK, MAX_CHUNK = 64 << 10, 4 << 20
DEFAULT_PAGE_SLOTS = 512
MIN_PAGE_SLOTS, MAX_PAGE_SLOTS = 16, 4096
DEFAULT_PACK = 32 << 20
MIN_PACK, MAX_PACK = 1 << 20, 128 << 20


class RepositoryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields of ``nbdrepo.json``.

    Attributes:
        id: of the repository, a UUID.
        hash: one of ``hashing.HASHES``.
        cipher: ``sealing.CIPHER``, or None: not encrypted.
        chunk_size: bytes.
        page_slots: chunks of a map page.
        pack_target: bytes after which a pack is closed.
    """

    format: str = FORMAT
    version: int = VERSION
    id: UUID = msgspec.field(default_factory=uuid4)
    hash: str = HASHES[0]
    cipher: str | None = None
    chunk_size: Annotated[int, msgspec.Meta(ge=MIN_CHUNK, le=MAX_CHUNK)] = DEFAULT_CHUNK
    page_slots: Annotated[int, msgspec.Meta(ge=MIN_PAGE_SLOTS, le=MAX_PAGE_SLOTS)] = (
        DEFAULT_PAGE_SLOTS
    )
    pack_target: Annotated[int, msgspec.Meta(ge=MIN_PACK, le=MAX_PACK)] = DEFAULT_PACK

    def encode(self) -> bytes:
        """As it is stored: one line of JSON."""
        return msgspec.json.encode(self) + b"\n"

    @classmethod
    def parse(cls, data: bytes, where: str) -> "RepositoryConfig":
        """What is stored at ``where``.

        Raises:
            RepositoryError: it is not ours, or newer, or damaged.
        """
        try:
            head = msgspec.json.decode(data, type=_Head)
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise RepositoryError(f"{where}: no nbdsrv repository ({error})") from error
        if head.format != FORMAT:
            raise RepositoryError(f"{where}: a repository of format {head.format!r}, not {FORMAT}")
        if head.version != VERSION:
            text = f"{where}: a repository of version {head.version}, this nbdsrv knows {VERSION}"
            raise RepositoryError(f"{text}; use a newer nbdsrv")
        try:
            config = msgspec.json.decode(data, type=cls)
            config.check()
        except (msgspec.MsgspecError, UnicodeError, ConfigError) as error:
            raise RepositoryError(f"{where} is damaged: {error}; restore it from a copy") from error
        return config

    def check(self) -> None:
        """Raises ConfigError for what no repository can be."""
        if self.chunk_size & (self.chunk_size - 1):
            raise ConfigError("a chunk's size is a power of two")
        if not MIN_CHUNK <= self.chunk_size <= MAX_CHUNK:
            raise ConfigError(f"a chunk has {MIN_CHUNK >> 10} KiB to {MAX_CHUNK >> 20} MiB")
        if not MIN_PAGE_SLOTS <= self.page_slots <= MAX_PAGE_SLOTS:
            raise ConfigError(f"a page has {MIN_PAGE_SLOTS} to {MAX_PAGE_SLOTS} slots")
        if not MIN_PACK <= self.pack_target <= MAX_PACK:
            raise ConfigError(f"a pack has {MIN_PACK >> 20} to {MAX_PACK >> 20} MiB")
        if self.hash not in HASHES:
            raise ConfigError(f"hash {self.hash!r} is not one of {', '.join(HASHES)}")
        if self.cipher not in {None, CIPHER}:
            raise ConfigError(f"cipher {self.cipher!r} is not {CIPHER}")


class _Head(msgspec.Struct):
    format: str
    version: int
