"""``nbdsrv serve`` from its first line to its exit code."""

import fcntl
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest
from authority import Certificates

from protocol.uri import Uri, parse
from tests.cli.program import COMMAND, PATIENCE, environment, nbdsrv, serving

GREETING = b"NBDMAGICIHAVEOPT"


def connect(uri: Uri) -> socket.socket:
    """At once: the URI is the promise that somebody listens."""
    if uri.socket is not None:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(uri.socket)
        return sock
    return socket.create_connection((uri.host, uri.port), 10)


def greeting(uri: Uri) -> bytes:
    with connect(uri) as sock, sock.makefile("rb") as stream:
        return stream.read(len(GREETING))


def size(uri: Uri) -> int:
    """What libnbd is told of the export."""
    if shutil.which("nbdinfo") is None:
        pytest.skip("nbdinfo is not installed")
    found = subprocess.run(
        ["nbdinfo", "--size", str(uri)], capture_output=True, text=True, timeout=20, check=True
    )
    return int(found.stdout)


def test_ready_when_the_uri_is_printed_and_gone_after_sigterm(tmp_path: Path, disk: Path) -> None:
    path = tmp_path / "sock"
    with serving(disk, "--listen", f"unix:{path}") as served:
        (uri,) = served.uris
        assert uri == Uri(socket=str(path))
        assert greeting(uri) == GREETING
        assert size(uri) == 100_001
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert served.stop() == (0, "")
    assert not path.exists()


def test_killed_and_started_again_in_the_same_place(tmp_path: Path, disk: Path) -> None:
    """What kill -9 leaves of it is a dead socket, which is in nobody's way."""
    path = tmp_path / "sock"
    with serving(disk, "--listen", f"unix:{path}") as served:
        served.process.kill()
        served.process.wait(20)
        assert path.is_socket()
    with serving(disk, "--listen", f"unix:{path}") as served:
        (uri,) = served.uris
        assert greeting(uri) == GREETING
        assert served.stop() == (0, "")
    assert not path.exists()


def test_sigint_ends_it_as_well(tmp_path: Path, disk: Path) -> None:
    with serving(disk, "--listen", f"unix:{tmp_path}/sock") as served:
        assert served.stop(signal.SIGINT) == (0, "")
    assert not (tmp_path / "sock").exists()


def test_sighup_does_not(tmp_path: Path, disk: Path) -> None:
    with serving(disk, "--listen", f"unix:{tmp_path}/sock") as served:
        served.process.send_signal(signal.SIGHUP)
        assert greeting(served.uris[0]) == GREETING
        assert served.stop() == (0, "")


def test_a_log_that_nobody_reads_stops_nothing(tmp_path: Path, disk: Path) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    try:
        with subprocess.Popen(
            [*COMMAND, "serve", disk, "--listen", f"unix:{tmp_path}/sock", "-vv"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=writer,
            text=True,
            env=environment(),
        ) as process:
            assert process.stdout is not None
            uri = parse(process.stdout.readline().strip())
            for _ in range(60):
                assert size(uri) == 100_001
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        first = os.read(reader, 4096)  # there is room for one
        assert first.startswith((b"nbdsrv: session.open ", b"nbdsrv: ring.none "))
    finally:
        os.close(reader)
        os.close(writer)


def test_an_idle_client_does_not_delay_the_end(tmp_path: Path, disk: Path) -> None:
    with (
        serving(disk, "--listen", f"unix:{tmp_path}/sock") as served,
        connect(served.uris[0]) as shaking_hands,
    ):
        assert shaking_hands.recv(8) == GREETING[:8]
        before = time.monotonic()
        assert served.stop() == (0, "")
        assert time.monotonic() - before < 5


def test_any_free_port(disk: Path) -> None:
    with serving(disk, "--listen", "127.0.0.1:0") as served:
        (uri,) = served.uris
        assert (uri.host, uri.export) == ("127.0.0.1", "")
        assert uri.port > 0
        assert size(uri) == 100_001
        assert served.stop() == (0, "")


def test_one_uri_per_export_and_address(tmp_path: Path, disk: Path) -> None:
    (tmp_path / "second.img").write_bytes(b"x" * 7)
    where = ("--listen", f"unix:{tmp_path}/sock", "--listen", "127.0.0.1:0")
    odd = "a b/\u00e4#?"
    exports = (disk, tmp_path / "second.img", "--export", f"{odd}={disk}")
    with serving(*exports, *where, uris=6) as served:
        assert [uri.export for uri in served.uris] == ["disk.img", "second.img", odd] * 2
        assert [size(uri) for uri in served.uris] == [100_001, 7, 100_001] * 2
        assert served.stop() == (0, "")


def test_an_export_called_nothing(tmp_path: Path, disk: Path) -> None:
    (tmp_path / "second.img").write_bytes(b"x" * 7)
    exports = ("--export", f"={disk}", tmp_path / "second.img")
    with serving(*exports, "--listen", f"unix:{tmp_path}/sock", uris=2) as served:
        assert {uri.export: size(uri) for uri in served.uris} == {"": 100_001, "second.img": 7}


def test_socket_mode(tmp_path: Path, disk: Path) -> None:
    path = tmp_path / "sock"
    with serving(disk, "--listen", f"unix:{path}", "--socket-mode", "660"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_a_relative_socket_gives_a_uri_for_everywhere(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    env = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *_pythonpath()])}
    with serving(disk, "--listen", "unix:sock", env=env) as served:
        assert served.uris[0].socket == str(tmp_path / "sock")
        assert size(served.uris[0]) == 100_001


def _pythonpath() -> list[str]:
    given = os.environ.get("PYTHONPATH")
    return [given] if given else []


def test_listen_from_the_environment(tmp_path: Path, disk: Path) -> None:
    with serving(disk, env={"NBDSRV_LISTEN": f"unix:{tmp_path}/sock"}) as served:
        assert size(served.uris[0]) == 100_001


def test_tls_uris(tmp_path: Path, disk: Path, certificates: Certificates) -> None:
    (tmp_path / "second.img").write_bytes(b"x" * 7)
    server = certificates.server
    tls = ("--tls-cert", server.certificate, "--tls-key", server.key)
    where = ("--listen", f"unix:{tmp_path}/sock")
    with serving(disk, *tls, *where) as served:
        assert served.uris[0].tls
        assert served.stop() == (0, "")
    mode = ("--tls", "per-export", "--tls-export", "disk.img")
    with serving(disk, tmp_path / "second.img", *tls, *mode, *where, uris=2) as served:
        assert {uri.export: uri.tls for uri in served.uris} == {
            "disk.img": True,
            "second.img": False,
        }
        assert size(served.uris[1]) == 7


def test_systemd_is_told(tmp_path: Path, disk: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with serving(disk, "--listen", f"unix:{tmp_path}/sock", env=env) as served:
            assert "READY=1" in manager.recv(4096).decode().split("\n")
            assert greeting(served.uris[0]) == GREETING
            assert served.stop() == (0, "")
        assert "STOPPING=1" in manager.recv(4096).decode().split("\n")


def on_standard_input(disk: Path, given: int, out: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [*COMMAND, "serve", str(disk), "--listen", "stdio"],
        stdin=given,
        stdout=out,
        stderr=subprocess.PIPE,
        env=environment(),
    )


def test_one_client_on_a_socket_that_is_standard_input_and_output(disk: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, on_standard_input(disk, theirs.fileno(), theirs.fileno()) as process:
        theirs.close()
        ours.settimeout(20)
        assert ours.recv(8) == GREETING[:8]
        ours.close()
        assert process.communicate(timeout=20)[1] == b""
        assert process.returncode == 0


@pytest.mark.parametrize(
    "count",
    [
        1,
        3,
        100,
    ],
)
def test_one_client_on_pipes_gets_every_reply(disk: Path, count: int) -> None:
    """It asks for more than a pipe holds, says goodbye, and only then begins to read."""
    length = 65536
    ask = bytes([0, 0, 0, 3]) + struct.pack(">8sII", b"IHAVEOPT", 1, 0)  # EXPORT_NAME ""
    for cookie in range(count):
        ask += struct.pack(">IHHQQI", 0x25609513, 0, 0, cookie, 0, length)
    ask += struct.pack(">IHHQQI", 0x25609513, 0, 2, count, 0, 0)  # DISC
    process = on_standard_input(disk, subprocess.PIPE, subprocess.PIPE)
    giving_up = threading.Timer(30, process.kill)
    giving_up.start()
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(ask)
        process.stdin.flush()
        time.sleep(1)  # what is to be shown is that the server waits for us
        answer = process.stdout.read()
        assert process.wait(20) == 0
    giving_up.cancel()
    assert len(answer) == 18 + 10 + count * (16 + length)
    assert answer[-length:] == disk.read_bytes()[:length]


def test_nobody_reads_the_uris(tmp_path: Path, disk: Path) -> None:
    """A closed standard output is no reason for a traceback."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [*COMMAND, "serve", str(disk), "--listen", f"unix:{tmp_path}/sock"],
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    os.close(write)
    timer = threading.Timer(5, process.terminate)
    timer.start()
    with process:
        _, err = process.communicate(timeout=20)
    timer.cancel()
    assert "Traceback" not in err


def test_reading_changes_nothing_about_the_file(tmp_path: Path, disk: Path) -> None:
    disk.chmod(0o444)
    before = disk.stat()
    with serving(disk, "--listen", f"unix:{tmp_path}/sock") as served:
        assert size(served.uris[0]) == 100_001
        assert served.stop() == (0, "")
    after = disk.stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)


@pytest.mark.parametrize("arguments", [("--help",), ("serve", "-h"), ("info", "-h"), ("map", "-h")])
def test_help(arguments: tuple[str, ...]) -> None:
    done = nbdsrv(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: nbdsrv")


def test_version() -> None:
    done = nbdsrv("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("nbdsrv, version ")


def test_no_command_shows_what_there_is() -> None:
    done = nbdsrv()
    assert done.returncode == 2
    assert "serve" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
