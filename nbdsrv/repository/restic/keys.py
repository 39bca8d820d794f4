"""Opening a restic repository with a password.

::

    keys/<id>   {kdf: scrypt, N, r, p, salt, data}     one for each password; any of them will do
                     password ── scrypt ── 64 bytes ── opens data ── the key of everything else
    config      sealed with that key: {version, id}

The password is NBDSRV_PASSPHRASE, or RESTIC_PASSWORD or RESTIC_PASSWORD_FILE where that is not set.
``RESTIC_PASSWORD_COMMAND`` is not run.
"""

import hashlib
import os
from collections.abc import Callable, Sequence

from nbdsrv.errors import ConfigError, CorruptImage, DiskError, RepositoryError
from nbdsrv.repository.passphrase import passphrase_of
from nbdsrv.repository.restic.records import ConfigRecord, KeyRecord, MasterRecord, decoded
from nbdsrv.repository.restic.sealed import Broken, SealKey, plain_json
from nbdsrv.store.store import ObjectMissing
from nbdsrv.store.tree import Tree

__all__ = ["open_keys", "password_of"]

MAX_KEY = 1 << 20
"""Bytes of a key file or of config."""
MAX_KEYS = 64
"""Passwords that are tried, each may take a second."""
MAX_MEMORY = 256 << 20
"""Bytes scrypt may take; restic's own choice is 32 MiB."""
MAX_PARALLEL = 64
VERSIONS = frozenset({1, 2})
OWN_VARIABLE = "RESTIC_PASSWORD"


def password_of(passphrase: Callable[[], str]) -> str:
    """Ours, else restic's own. Blocking.

    Raises:
        ConfigError: nobody gives any.
    """
    try:
        return passphrase()
    except ConfigError as error:
        try:
            return passphrase_of(variable=OWN_VARIABLE)
        except ConfigError as other:
            if any(os.environ.get(name) for name in (OWN_VARIABLE, f"{OWN_VARIABLE}_FILE")):
                raise other from None
            raise error from None


def open_keys(tree: Tree, password: Callable[[], str]) -> tuple[SealKey, ConfigRecord]:
    """The key of a repository, and what it says of itself. Blocking, for about a second.

    Args:
        tree: where it lies.
        password: gives it.

    Raises:
        RepositoryError: no restic repository, none for us, or not its password.
        CorruptImage: its keys or config are damaged.
        StoreError: it cannot be read.
        ConfigError: there is no password.
    """
    try:
        config = tree.read("config", MAX_KEY)
    except ObjectMissing as error:
        text = f"{tree.name}: no restic repository: it has no file named config"
        raise RepositoryError(text) from error
    key = _key(tree, password)
    where = f"corrupt repository: {tree.full('config')}"
    try:
        record = decoded(plain_json(key.opened(config), MAX_KEY), ConfigRecord)
    except Broken as error:
        raise CorruptImage(f"{where}: {error}") from error
    if record.version not in VERSIONS:
        text = f"{tree.name}: a restic repository of version {record.version}"
        raise RepositoryError(f"{text}; this nbdsrv reads 1 and 2")
    return key, record


def _key(tree: Tree, password: Callable[[], str]) -> SealKey:
    names = [node.name for node in tree.entries("keys") if not node.directory]
    if not names:
        raise RepositoryError(f"{tree.name}: the restic repository has no key in keys/")
    records: list[KeyRecord] = []
    damaged: list[DiskError] = []
    for name in names[:MAX_KEYS]:
        path = f"keys/{name}"
        try:
            records.append(_checked(decoded(tree.read(path, MAX_KEY), KeyRecord)))
        except Broken as error:
            text = f"corrupt repository: {tree.full(path)}: {error}"
            damaged.append(CorruptImage(text))
        except DiskError as error:
            damaged.append(error)
    if not records:
        raise damaged[0]
    return _first_opened(tree, records, password().encode(), damaged)


def _first_opened(
    tree: Tree, records: Sequence[KeyRecord], password: bytes, damaged: Sequence[DiskError]
) -> SealKey:
    for record in records:
        try:
            secret = hashlib.scrypt(
                password,
                salt=record.salt,
                n=record.N,
                r=record.r,
                p=record.p,
                maxmem=MAX_MEMORY + (1 << 20),
                dklen=64,
            )
            master = decoded(SealKey.derived(secret).opened(record.data), MasterRecord)
            return _master(master)
        except (Broken, ValueError):
            continue
    text = f"{tree.name}: the passphrase opens none of its {len(records)} keys"
    more = f"; {len(damaged)} more are damaged: {damaged[0]}" if damaged else ""
    raise RepositoryError(text + more)


def _checked(record: KeyRecord) -> KeyRecord:
    if record.kdf != "scrypt":
        raise Broken(f"a key derived by {record.kdf[:60]!r}, not by scrypt")
    power_of_two = record.N > 1 and not record.N & (record.N - 1)
    if not power_of_two or not 1 <= record.p <= MAX_PARALLEL or record.r < 1:
        raise Broken(f"scrypt with N={record.N}, r={record.r}, p={record.p} makes no sense")
    if 128 * record.r * (record.N + record.p) > MAX_MEMORY:
        raise Broken(f"scrypt with N={record.N}, r={record.r} takes more than {MAX_MEMORY} bytes")
    return record


def _master(record: MasterRecord) -> SealKey:
    if (len(record.encrypt), len(record.mac.k), len(record.mac.r)) != (32, 16, 16):
        raise Broken("the key has another length")
    return SealKey(record.encrypt, record.mac.k, record.mac.r)
