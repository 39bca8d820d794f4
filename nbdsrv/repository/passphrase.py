"""Where a repository's passphrase comes from: never from an argument, which others can see.

::

    NBDSRV_PASSPHRASE            the passphrase itself
    NBDSRV_PASSPHRASE_FILE       a file whose first line it is
"""

import os
from collections.abc import Mapping

from nbdsrv.errors import ConfigError

__all__ = ["MAX_PASSPHRASE", "VARIABLE", "passphrase_of"]

VARIABLE = "NBDSRV_PASSPHRASE"
MAX_PASSPHRASE = 4096


def passphrase_of(environment: Mapping[str, str] = os.environ, variable: str = VARIABLE) -> str:
    """The passphrase the environment gives.

    Raises:
        ConfigError: it gives none, or names a file that cannot be read. Blocking.
    """
    given = environment.get(variable)
    if given:
        return given
    path = environment.get(f"{variable}_FILE")
    if not path:
        text = f"the repository is encrypted; set {variable} or {variable}_FILE"
        raise ConfigError(text)
    try:
        with open(path, encoding="utf-8") as file:
            line = file.readline(MAX_PASSPHRASE + 1).rstrip("\r\n")
    except OSError as error:
        raise ConfigError(f"{variable}_FILE {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{variable}_FILE {path}: {error}") from error
    if not line or len(line) > MAX_PASSPHRASE:
        raise ConfigError(f"{variable}_FILE {path}: its first line is no passphrase")
    return line
