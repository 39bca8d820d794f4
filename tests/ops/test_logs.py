"""Log lines: where they go, and how many."""

import json
import subprocess
import sys
from datetime import datetime

import pytest

SCRIPT = """
import logging, sys
from nbdsrv.ops.logs import set_up
set_up(int(sys.argv[1]))
set_up(int(sys.argv[1]))
log = logging.getLogger("nbdsrv.net.server")
log.debug("request.read offset=%d", 1)
log.info("session.open export=%r", "disk")
log.warning("accept.pause reason=%s", "full")
logging.getLogger("asyncio").info("chatter")
"""
WARNING, INFO, DEBUG = (
    "nbdsrv: accept.pause reason=full",
    "nbdsrv: session.open export='disk'",
    "nbdsrv: request.read offset=1",
)


@pytest.mark.parametrize(
    ("verbosity", "lines"),
    [
        (0, [WARNING]),
        (1, [INFO, WARNING]),
        (2, [DEBUG, INFO, WARNING]),
        (7, [DEBUG, INFO, WARNING]),
    ],
)
def test_each_v_shows_more_once_and_on_standard_error(verbosity: int, lines: list[str]) -> None:
    command = [sys.executable, "-c", SCRIPT, str(verbosity)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == ""
    assert done.stderr.splitlines() == lines


JSON_SCRIPT = """
import logging
from nbdsrv.ops.logs import set_up
set_up(0, "json")
log = logging.getLogger("nbdsrv.net.server")
log.warning("accept.pause reason=%s", "full\\nof it", extra={"fields": {"reason": b"full"}})
try:
    1 / 0
except ZeroDivisionError as error:
    log.error("session.bug", exc_info=error)
"""


def test_json_is_one_object_a_line_whatever_it_holds() -> None:
    command = [sys.executable, "-c", JSON_SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    first, second = map(json.loads, done.stderr.splitlines())
    assert (first["level"], first["event"], first["reason"]) == (
        "warning",
        "accept.pause",
        "b'full'",
    )
    assert first["logger"] == "nbdsrv.net.server"
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    assert "ZeroDivisionError" in second["traceback"]
