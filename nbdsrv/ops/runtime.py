"""Where processes of nbdsrv on one host find each other."""

import os
from collections.abc import Mapping

__all__ = ["ADMIN_SOCKET", "runtime_directories"]

ADMIN_SOCKET = "admin.sock"
"""The admin socket's name in such a directory."""


def runtime_directories(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Where to look, and to register, in this order: systemd's, the user's, the host's."""
    found = []
    if given := environ.get("RUNTIME_DIRECTORY"):
        found.append(given.partition(":")[0])
    if user := environ.get("XDG_RUNTIME_DIR"):
        found.append(os.path.join(user, "nbdsrv"))
    return [*dict.fromkeys([*found, "/run/nbdsrv"])]
