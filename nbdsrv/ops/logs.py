"""Log lines on standard error: one event each.

::

    text    nbdsrv: session.open export='disk' tls=False
    json    {"time": "...", "level": "info", "logger": "nbdsrv.net.server",
             "event": "session.open", "message": "session.open export='disk' tls=False"}

What a record was given as ``extra={"fields": {...}}`` is in JSON as it is, so that nobody has to
take messages apart.
"""

import json
import logging
import sys
from datetime import UTC, datetime

from nbdsrv.ops.log_stream import LogStream

__all__ = ["AUDIT", "JsonFormatter", "set_up"]

AUDIT = "nbdsrv.audit"
"""The logger of who attached what."""

_LEVELS = {0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Never fails: what JSON cannot say is said as text."""
        message = record.getMessage()
        said: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": message.partition(" ")[0],
            "message": message,
        }
        said |= getattr(record, "fields", {})
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


def set_up(verbosity: int, form: str = "text") -> None:
    """Log to standard error: warnings, and with each ``-v`` more. ``form``: "text" or "json"."""
    root = logging.getLogger()
    handler = next((each for each in root.handlers if isinstance(each, LogStream)), None)
    handler = handler or LogStream(sys.stderr.fileno())  # one: it may have lines to write still
    if form == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("nbdsrv: %(message)s"))
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS.get(verbosity, logging.DEBUG))
    logging.getLogger("asyncio").setLevel(logging.WARNING)
