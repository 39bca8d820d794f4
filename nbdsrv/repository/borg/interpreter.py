"""Which Python borg runs on: only that one can import it.

::

    NBDSRV_BORG_PYTHON=/opt/borg/bin/python3         said
    borg on PATH:  #!/usr/bin/python3                its first line
    /usr/bin/python3                                 where distributions install it
"""

import os
import shutil
from collections.abc import Mapping

from nbdsrv.errors import RepositoryError

__all__ = ["INSTALL", "VARIABLE", "borg_python"]

VARIABLE = "NBDSRV_BORG_PYTHON"
SYSTEM = "/usr/bin/python3"
INSTALL = (
    f"install borg 1.2 or 1.4 (package borgbackup), or set {VARIABLE} to the Python that has it"
)
MAX_LINE = 512


def borg_python(environment: Mapping[str, str] = os.environ) -> str:
    """The interpreter. Blocking.

    Raises:
        RepositoryError: there is none.
    """
    said = environment.get(VARIABLE)
    if said:
        if shutil.which(said) is None:
            raise RepositoryError(f"{VARIABLE}: {said} is no program")
        return said
    borg = shutil.which("borg", path=environment.get("PATH"))
    found = _first_line(borg) if borg else None
    if found is not None:
        return found
    if os.path.exists(SYSTEM):
        return SYSTEM
    raise RepositoryError(f"borg's repositories are read by borg itself: {INSTALL}")


def _first_line(path: str) -> str | None:
    """The interpreter a script names; None if it is a program by itself."""
    try:
        with open(path, "rb") as file:
            line = file.readline(MAX_LINE)
    except OSError:
        return None
    if not line.startswith(b"#!"):
        return None
    words = os.fsdecode(line[2:]).split()
    if not words:
        return None
    program = words[0]
    if os.path.basename(program) == "env":
        program = next((word for word in words[1:] if not word.startswith("-")), "")
    if "python" not in os.path.basename(program):
        return None
    return shutil.which(program)
