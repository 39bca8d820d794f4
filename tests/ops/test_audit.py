"""The audit file on a disk that is full for a while."""

import json
import logging
import os
from pathlib import Path

import pytest

from nbdsrv.export.access import Peer
from nbdsrv.ops.audit import Audit

PEER = Peer(address="192.0.2.7", port=40112)


def lines(path: Path) -> list[str]:
    """The names in the lines that are whole."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line)["export"])
        except ValueError:
            assert line.startswith('{"time": '), line
    return found


def test_half_a_line_is_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What fitted of it was taken for all of it, and the next line was put right behind it."""
    path, room, write = tmp_path / "audit", [10_000], os.write

    def on_a_small_disk(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, os.strerror(28))
        count = write(fd, data[: room[0]])
        room[0] -= count
        return count

    caplog.set_level(logging.INFO)
    audit = Audit(str(path))
    monkeypatch.setattr(os, "write", on_a_small_disk)
    audit.refused(PEER, "one", "not allowed")
    room[0] = 40
    audit.refused(PEER, "two", "not allowed")
    assert "audit.unwritten" in caplog.text
    assert "export='two'" in caplog.text, "the log has what the file has not"
    room[0] = 10_000
    audit.refused(PEER, "three", "not allowed")
    audit.refused(PEER, "four", "not allowed")
    audit.close()
    assert ["one", "three", "four"] == lines(path)


def test_half_a_line_of_another_day_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    path.write_text('{"time": "2026-11')
    audit = Audit(str(path))
    audit.refused(PEER, "one", "not allowed")
    audit.reopen(str(path))
    audit.refused(PEER, "two", "not allowed")
    audit.close()
    assert ["one", "two"] == lines(path)
    assert 3 == len(path.read_text().splitlines()), "no empty lines"
