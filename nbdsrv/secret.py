"""A secret the environment gives: never an argument, which others can see.

::

    VARIABLE            the secret itself
    VARIABLE_FILE       a file whose first line it is
"""

from collections.abc import Mapping

from nbdsrv.errors import ConfigError

__all__ = ["secret_of"]


def secret_of(
    environment: Mapping[str, str], variable: str, *, kind: str, wanted: str, limit: int
) -> str:
    """The secret that ``variable`` or ``variable_FILE`` gives. Blocking.

    Args:
        environment: where to look.
        variable: its name there.
        kind: what it is, for messages: "password".
        wanted: who asks for it, likewise.
        limit: characters of a line in a file.

    Raises:
        ConfigError: there is none, or the file cannot be read.
    """
    given = environment.get(variable)
    if given:
        return given
    path = environment.get(f"{variable}_FILE")
    if not path:
        raise ConfigError(f"{wanted}; set {variable} or {variable}_FILE")
    try:
        with open(path, encoding="utf-8") as file:
            line = file.readline(limit + 1).rstrip("\r\n")
    except OSError as error:
        raise ConfigError(f"{variable}_FILE {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{variable}_FILE {path}: {error}") from error
    if not line or len(line) > limit:
        raise ConfigError(f"{variable}_FILE {path}: its first line is no {kind}")
    return line
