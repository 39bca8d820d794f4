"""Where a repository's passphrase comes from: never from an argument, which others can see.

::

    NBDSRV_PASSPHRASE            the passphrase itself
    NBDSRV_PASSPHRASE_FILE       a file whose first line it is
"""

import os
from collections.abc import Mapping

from nbdsrv.secret import secret_of

__all__ = ["MAX_PASSPHRASE", "VARIABLE", "passphrase_of"]

VARIABLE = "NBDSRV_PASSPHRASE"
MAX_PASSPHRASE = 4096


def passphrase_of(environment: Mapping[str, str] = os.environ, variable: str = VARIABLE) -> str:
    """The passphrase the environment gives.

    Raises:
        ConfigError: it gives none, or names a file that cannot be read. Blocking.
    """
    wanted = "the repository is encrypted"
    return secret_of(environment, variable, kind="passphrase", wanted=wanted, limit=MAX_PASSPHRASE)
