"""Log lines on standard error: one event each, ``session.open export='disk' tls=False``."""

import logging
import sys

__all__ = ["set_up"]

_LEVELS = {0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}


def set_up(verbosity: int) -> None:
    """Log to standard error: warnings, and with each ``-v`` more."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("nbdsrv: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS.get(verbosity, logging.DEBUG))
    logging.getLogger("asyncio").setLevel(logging.WARNING)
