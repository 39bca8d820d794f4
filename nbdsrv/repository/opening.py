"""From a SOURCE that names a repository to the open repository."""

from collections.abc import Awaitable, Callable
from importlib import import_module

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, UnsupportedImage
from nbdsrv.export.grammar import NATIVE, Source
from nbdsrv.repository.destination import Destination, Storage
from nbdsrv.repository.native.spans import SpanStore
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.passphrase import passphrase_of
from nbdsrv.repository.repository import Repository
from nbdsrv.store.directory_tree import DirectoryTree
from nbdsrv.store.opening import bucket_of, needing_obstore, open_store
from nbdsrv.store.tree import Tree

__all__ = [
    "NATIVE",
    "WRITTEN",
    "open_destination",
    "open_keyless",
    "open_repository",
    "open_tree",
    "open_vault",
]

WRITTEN = NATIVE | {"xo"}
"""What backups go to."""
S3 = "+s3"


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


def open_destination(
    source: Source, storage: Storage, passphrase: Callable[[], str] = passphrase_of
) -> Destination:
    """A repository that backups go to. Blocking.

    Args:
        source: names it.
        storage: how another tool's stores disks.
        passphrase: called if it is encrypted.

    Raises:
        ConfigError: no such place can be, a passphrase is wanted, or ``storage`` cannot be there.
        DiskError: it cannot be opened; ``UnsupportedImage`` for one that is only read.
    """
    if source.scheme in NATIVE:
        from nbdsrv.repository.native.destination import NativeDestination

        return NativeDestination(open_vault(source, passphrase))
    if source.scheme == "xo":
        from nbdsrv.repository.xo.writer_destination import open_xo_destination

        return open_xo_destination(source, storage, passphrase)
    raise UnsupportedImage(f"{source.text}: repositories of this kind are only read")


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
    passphrase = _telling(source, passphrase)
    if source.scheme in NATIVE:
        from nbdsrv.repository.native.repository import NativeRepository

        vault = await workers.look_up(open_vault, source, passphrase)
        return NativeRepository(vault, workers)
    if source.scheme not in OTHERS:
        raise UnsupportedImage(f"{source.text}: repositories of this kind are not served yet")
    return await _opener(OTHERS[source.scheme])(source, workers, passphrase)


def _telling(source: Source, passphrase: Callable[[], str]) -> Callable[[], str]:
    """The same, saying which repository it is that wants one: a server may have several."""

    def told() -> str:
        try:
            return passphrase()
        except ConfigError as error:
            raise ConfigError(f"{source.text}: {error}") from error

    return told


def open_tree(source: Source) -> Tree:
    """The directory or bucket where another tool's repository lies. Blocking.

    Raises:
        ConfigError: no such place can be, or what S3 needs is not installed or set.
        StoreError: there is no such directory.
    """
    if not source.scheme.endswith(S3):
        return DirectoryTree(source.location)
    bucket, prefix = bucket_of(source.scheme, source.location)
    with needing_obstore(source.text):
        from nbdsrv.store.s3_tree import S3Tree
    return S3Tree(bucket, prefix)


Opener = Callable[[Source, Workers, Callable[[], str]], Awaitable[Repository]]

OTHERS = {
    "xo": "xo",
    "xo+s3": "xo",
    "pbs": "pbs",
    "virtnbdbackup": "virtnbdbackup",
    "casync": "casync",
    "benji": "benji",
    "restic": "restic",
    "borg": "borg",
}
"""Schemes of other tools' repositories; ``open_KIND`` of the package ``KIND`` opens them."""


def _opener(kind: str) -> Opener:
    """Imported when it is needed: each has libraries of its own."""
    module = import_module(f"nbdsrv.repository.{kind}.repository")
    opener: Opener = getattr(module, f"open_{kind}")
    return opener
