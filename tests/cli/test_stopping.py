"""Signals to stop while the other side says nothing."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cli.program import COMMAND, PATIENCE, environment, nbdsrv

BUCKET = "repo+s3://bucket/repository"
STOPPING = "nbdsrv: {}: stopping; once more ends it at once\n"


@dataclass
class Mute:
    """An S3 service that takes requests and never answers.

    Attributes:
        asked: set once there was one.
    """

    port: int
    asked: threading.Event = field(default_factory=threading.Event)
    connections: list[socket.socket] = field(default_factory=list)

    def listen(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            connection.recv(1)
            self.asked.set()


@pytest.fixture
def mute() -> Iterator[Mute]:
    listener = socket.create_server(("127.0.0.1", 0))
    service = Mute(listener.getsockname()[1])
    thread = threading.Thread(target=service.listen, args=(listener,), daemon=True)
    thread.start()
    yield service
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for each in service.connections:
        each.close()


@contextmanager
def asking(
    mute: Mute, *words: str, prefix: Sequence[str] = ()
) -> "Iterator[subprocess.Popen[str]]":
    """``nbdsrv ...``, once it waits for that service."""
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{mute.port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    with subprocess.Popen(
        [*prefix, *COMMAND, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(env),
    ) as process:
        try:
            assert mute.asked.wait(PATIENCE)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("words", [("gc", BUCKET), ("prune", BUCKET, "--keep-last", "1")])
def test_where_nothing_is_to_be_cleaned_up(
    mute: Mute, words: Sequence[str], number: signal.Signals
) -> None:
    with asking(mute, *words) as process:
        process.send_signal(number)
        out, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (128 + number, "")
    assert said == f"nbdsrv: stopped by {number.name}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_store_is_waited_for_a_few_seconds(
    mute: Mute, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "disk.img").write_bytes(b"x" * 4096)
    with asking(mute, "backup", str(tmp_path / "disk.img"), "--to", BUCKET) as process:
        process.send_signal(number)
        out, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (128 + number, "")
    first, second = said.splitlines(keepends=True)
    assert first == STOPPING.format(number.name)
    assert second.startswith(f"nbdsrv: stopped by {number.name}: no restore point was made; s3:")


def test_a_server_is_ended_as_soon(mute: Mute, tmp_path: Path) -> None:
    with asking(mute, "serve", BUCKET, "--listen", f"unix:{tmp_path}/sock") as process:
        process.send_signal(signal.SIGTERM)
        out, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, "")
    assert said == STOPPING.format("SIGTERM")
    assert not (tmp_path / "sock").exists()


@pytest.mark.parametrize("words", [("ls", BUCKET), ("serve", BUCKET, "--listen", "127.0.0.1:0")])
def test_another_signal_ends_it_at_once(mute: Mute, words: Sequence[str]) -> None:
    with asking(mute, *words) as process:
        assert process.stderr is not None
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == STOPPING.format("SIGINT")
        process.send_signal(signal.SIGINT)
        assert (process.wait(PATIENCE), process.stderr.read()) == (130, "")


def test_the_first_one_may_come_twice(mute: Mute, tmp_path: Path) -> None:
    """As ``timeout`` sends it: to its child, and to the group that both are in."""
    with asking(mute, "serve", BUCKET, "--listen", f"unix:{tmp_path}/sock") as process:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (0, STOPPING.format("SIGTERM"))


def test_what_is_ignored_from_the_beginning_stays_so(mute: Mute) -> None:
    with asking(mute, "gc", BUCKET, prefix=("nohup",)) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_nobody_reads(tmp_path: Path, stream: str) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    words = ["--help"] if stream == "stdout" else ["info", str(tmp_path / "no.img")]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: writer}
    with subprocess.Popen([*COMMAND, *words], **streams, env=environment()) as process:
        wchan = Path(f"/proc/{process.pid}/wchan")
        end = time.monotonic() + 5
        while "pipe" not in wchan.read_text() and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    os.close(reader)
    os.close(writer)


def test_a_pipe_gives_its_lease_back(tmp_path: Path) -> None:
    repository, disk = f"repo:{tmp_path}/repository", tmp_path / "disk.img"
    disk.write_bytes(os.urandom(1 << 20))
    assert nbdsrv("init", repository).returncode == 0
    assert nbdsrv("backup", disk, "--to", repository).returncode == 0
    with subprocess.Popen(
        [*COMMAND, "restore", f"{repository}#", "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(10)
        leases = tmp_path / "repository" / "leases"
        assert list(leases.glob("*.json"))
        process.send_signal(signal.SIGTERM)
        process.stdout.close()
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert list(leases.glob("*.json")) == []
