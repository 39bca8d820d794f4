"""From a SOURCE that names a repository to the open repository."""

from collections.abc import Callable

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import UnsupportedImage
from nbdsrv.export.grammar import Source
from nbdsrv.repository.native.spans import SpanStore
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.passphrase import passphrase_of
from nbdsrv.repository.repository import Repository
from nbdsrv.store.opening import open_store

__all__ = ["NATIVE", "is_repository", "open_keyless", "open_repository", "open_vault"]

NATIVE = frozenset({"repo", "repo+s3"})


def is_repository(text: str) -> bool:
    """Does a TARGET name a repository of ours?"""
    scheme, colon, _ = text.partition(":")
    return bool(colon) and scheme in NATIVE


def open_vault(source: Source, passphrase: Callable[[], str] = passphrase_of) -> Vault:
    """A native repository, for what runs without an event loop. Blocking.

    Raises:
        ConfigError: no such place can be, or a passphrase is wanted.
        DiskError: it cannot be opened; ``UnsupportedImage`` for another tool's.
    """
    if source.scheme not in NATIVE:
        raise UnsupportedImage(f"{source.text}: only nbdsrv's own repositories can be used so")
    store = open_store(source.scheme, source.location)
    if store.distant:
        store = SpanStore(store)
    try:
        return Vault.open(store, passphrase)
    except BaseException:
        store.close()
        raise


def open_keyless(source: Source) -> Vault:
    """A native repository without its key: its objects can be hashed, and nothing be read.

    Raises:
        ConfigError, DiskError: as ``open_vault``.
    """
    if source.scheme not in NATIVE:
        raise UnsupportedImage(f"{source.text}: only nbdsrv's own repositories can be used so")
    store = open_store(source.scheme, source.location)
    try:
        return Vault.open_keyless(store)
    except BaseException:
        store.close()
        raise


async def open_repository(
    source: Source, workers: Workers, passphrase: Callable[[], str] = passphrase_of
) -> Repository:
    """The repository a SOURCE names, whatever its selector.

    Raises:
        ConfigError, DiskError: as ``open_vault``.
    """
    if source.scheme not in NATIVE:
        raise UnsupportedImage(f"{source.text}: repositories of this kind are not served yet")
    from nbdsrv.repository.native.repository import NativeRepository

    vault = await workers.look_up(open_vault, source, passphrase)
    return NativeRepository(vault, workers)
