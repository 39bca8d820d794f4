"""Running backups that are seen by status: files of live processes, and nothing else."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.ops.jobs import Job, registered, running
from nbdsrv.ops.runtime import runtime_directories


def test_seen_while_it_runs_and_not_after(tmp_path: Path) -> None:
    with registered("web", [str(tmp_path)]) as registration:
        (job,) = running([str(tmp_path)])
        assert (job.pid, job.what, job.done, job.total) == (os.getpid(), "web", None, None)
        registration._next = 0.0  # a second has passed
        registration.tell(5, 10)
        registration.tell(6, 10)  # too soon
        assert [(job.done, job.total) for job in running([str(tmp_path)])] == [(5, 10)]
    assert running([str(tmp_path)]) == []
    assert os.listdir(tmp_path / "jobs") == []


def test_what_a_dead_process_has_left_is_passed_over(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "jobs").mkdir()
    facts = {"pid": dead.pid, "what": "x", "started": 1.0, "done": 1, "total": 2}
    (tmp_path / "jobs" / f"{dead.pid}.json").write_text(json.dumps(facts))
    assert running([str(tmp_path)]) == []


def test_a_process_that_has_the_number_of_a_dead_one_is_no_backup(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    facts = {"pid": os.getpid(), "what": "x", "started": 1.0, "done": 1, "total": 2}
    (tmp_path / "jobs" / f"{os.getpid()}.json").write_text(json.dumps(facts))
    assert running([str(tmp_path)]) == []


@pytest.mark.parametrize("place", ["file", "/proc/nowhere", "/dev/null/x"])
def test_no_place_to_register_is_no_reason_to_fail(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with registered("web", [str(tmp_path / place)]) as registration:
        registration.tell(1, 2)
        assert running([str(tmp_path / place)]) == []


@given(
    st.binary(max_size=200)
    | st.dictionaries(
        st.sampled_from(["pid", "what", "started", "done"]),
        st.none() | st.integers() | st.text() | st.floats(),
    ).map(lambda facts: json.dumps(facts).encode())
)
def test_whatever_lies_there(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "any"
    (directory / "jobs").mkdir(parents=True, exist_ok=True)
    (directory / "jobs" / "1.json").write_bytes(data)
    assert all(isinstance(job, Job) for job in running([str(directory)]))


def test_where_processes_find_each_other() -> None:
    environ = {"RUNTIME_DIRECTORY": "/run/a:/run/b", "XDG_RUNTIME_DIR": "/run/user/7"}
    assert runtime_directories(environ) == ["/run/a", "/run/user/7/nbdsrv", "/run/nbdsrv"]
    assert runtime_directories({}) == ["/run/nbdsrv"]


def test_who_shows_progress_is_told_too(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with registered("web", [str(tmp_path)]) as registration:
        registration._next = 0.0
        registration.also(lambda done, total: told.append((done, total)))(1, 2)
        registration.also(None)(2, 2)
        assert [(job.done, job.total) for job in running([str(tmp_path)])] == [(1, 2)]
    assert told == [(1, 2)]


def test_a_backup_is_seen_while_it_runs(tmp_path: Path, image: Path) -> None:
    """It waits for its source: a pipe nobody writes to would end it, so it is slowed down."""
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "RUNTIME_DIRECTORY": ""}
    nbdsrv = [sys.executable, "-m", "nbdsrv"]
    target = f"repo:{tmp_path / 'repo'}"
    subprocess.run([*nbdsrv, "init", target], check=True, env=env, timeout=30)
    command = [*nbdsrv, "backup", str(image), "--to", target, "--group", "web", "--rate", "100K"]
    directory = [str(tmp_path / "nbdsrv")]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as backup:
        seen: list[Job] = []
        deadline = time.monotonic() + 20
        while not seen and time.monotonic() < deadline:
            seen = running(directory)
            time.sleep(0.02)
        backup.terminate()
        backup.wait(20)
    assert [(job.pid, job.what) for job in seen] == [(backup.pid, "web")]
    assert running(directory) == []
    assert os.listdir(tmp_path / "nbdsrv" / "jobs") == []
