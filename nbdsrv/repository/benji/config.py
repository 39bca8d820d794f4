"""Benji's own configuration, for what its storage does not tell: keys, their salts, the hash.

::

    benji:/srv/benji/data                       the storage's directory
    benji:/etc/benji     benji:/etc/benji.yaml  a configuration: the storage is the one it names
    NBDSRV_BENJI_CONFIG=/etc/benji.yaml         beside either

    storages:    path, hmac{key | password, kdfSalt, kdfIterations}
    transforms:  name -> module, masterKey | password, kdfSalt, kdfIterations | eccKey, dictDataFile

Without one everything that is not encrypted can be read, and what is encrypted by a master key,
which the passphrase may be.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbdsrv.errors import ConfigError

__all__ = ["DEFAULT_HASH", "FILE", "VARIABLE", "Configuration", "Storage", "find", "load"]

VARIABLE = "NBDSRV_BENJI_CONFIG"
FILE = "benji.yaml"
DEFAULT_HASH = "BLAKE2b,digest_bits=256"
MAX_CONFIG = 1 << 20
"""Bytes of a configuration."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage of module ``file``.

    Attributes:
        name: of it.
        path: its directory.
        hmac: what ``hmac`` says, or nothing.
    """

    name: str
    path: str
    hmac: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a ``benji.yaml`` says that matters for reading.

    Attributes:
        path: of the file, for messages; "" where there is none.
        storages: those that are directories.
        default: the name of the one that is meant where none is said.
        transforms: name to what is configured.
        hash_function: of blocks; "" if nothing is known.
    """

    path: str = ""
    storages: Sequence[Storage] = ()
    default: str = ""
    transforms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hash_function: str = ""

    def storage_at(self, directory: str) -> Storage | None:
        """The storage that lies there; the default one, or the only one, if it has been moved."""
        real = os.path.realpath(directory)
        for storage in self.storages:
            if os.path.realpath(storage.path) == real:
                return storage
        return self.default_storage()

    def default_storage(self) -> Storage | None:
        """The one that is meant where none is said."""
        for storage in self.storages:
            if storage.name == self.default:
                return storage
        return self.storages[0] if len(self.storages) == 1 else None


def find(location: str, environment: Mapping[str, str] = os.environ) -> tuple[str, Configuration]:
    """Where the storage is that a SOURCE names, and the configuration that goes with it. Blocking.

    Raises:
        ConfigError: the configuration cannot be read, or names no directory.
    """
    beside = os.path.join(location, FILE)
    given = ""
    if os.path.isfile(location):
        given = location
    elif os.path.isfile(beside) and not os.path.isdir(os.path.join(location, "versions")):
        given = beside
    named = environment.get(VARIABLE, "")
    if not given:
        return location, load(named) if named else Configuration()
    configuration = load(named or given)
    storage = configuration.default_storage()
    if storage is None:
        text = "names no storage of module file; name its directory"
        raise ConfigError(f"{configuration.path}: {text}")
    return storage.path, configuration


def load(path: str) -> Configuration:
    """Read a configuration. Blocking.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        text = "reading Benji's configuration needs PyYAML; pip install 'nbdsrv[benji]'"
        raise ConfigError(f"{path}: {text}") from error
    try:
        # O_NONBLOCK: what lies there may be a pipe.
        with open(path, "rb", opener=lambda at, how: os.open(at, how | os.O_NONBLOCK)) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_CONFIG:
                raise ConfigError(f"{path}: no file of at most {MAX_CONFIG} bytes")
            said = yaml.safe_load(file.read(MAX_CONFIG))
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = str(error).splitlines()[0] if str(error) else "no YAML"
        raise ConfigError(f"{path}: {text}") from error
    if not isinstance(said, dict) or not isinstance(said.get("storages"), list):
        raise ConfigError(f"{path}: is no configuration of Benji's: it has no storages")
    return Configuration(
        path,
        _storages(said["storages"]),
        _text(said.get("defaultStorage")),
        _transforms(said.get("transforms")),
        _text(said.get("hashFunction")) or DEFAULT_HASH,
    )


def _storages(said: list[Any]) -> Sequence[Storage]:
    found: list[Storage] = []
    for each in said:
        if not isinstance(each, dict) or each.get("module") != "file":
            continue
        settings = _map(each.get("configuration"))
        path = _text(settings.get("path"))
        if path:
            hmac = settings.get("hmac")
            found.append(Storage(_text(each.get("name")), path, _map(hmac)))
    return found


def _transforms(said: Any) -> Mapping[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for each in said if isinstance(said, list) else ():
        if isinstance(each, dict):
            found[_text(each.get("name"))] = _map(each.get("configuration"))
    return found


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
