"""How clients get in: TCP on both families, Unix, several at once, systemd, inetd, pipes.

sd_listen_fds(3): LISTEN_PID, LISTEN_FDS, descriptors from 3; inetd: the client is descriptor 0.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from served_images import MIB, Images, Serve
from serving import ServerProcess, command, environment
from wire import Wire, info_data

from protocol import structs
from protocol.constants import Command, Dialect, Option, Reply

LAUNCHER = """
import os, sys
count = int(sys.argv[1])
descriptors = list(map(int, sys.argv[2:2 + count]))
for target, fd in enumerate(descriptors, start=3):
    os.dup2(fd, 100 + target)
for target in range(3, 3 + count):
    os.dup2(100 + target, target)
    os.close(100 + target)
os.environ["LISTEN_PID"] = str(os.getpid() + int(os.environ.get("SHIFT", "0")))
os.environ["LISTEN_FDS"] = str(count)
os.execv(sys.argv[2 + count], sys.argv[2 + count:])
"""
"""What systemd does: descriptors from 3 on, then exec in the same process."""


def activated(listeners: list[socket.socket], arguments: list[str], uris: int) -> ServerProcess:
    """A server that was handed its sockets."""
    descriptors = [str(sock.fileno()) for sock in listeners]
    launcher = [sys.executable, "-c", LAUNCHER, str(len(listeners)), *descriptors]
    return ServerProcess(
        launcher + arguments,
        uris=uris,
        env=environment(),
        pass_fds=[sock.fileno() for sock in listeners],
    )


def test_socket_activation(images: Images, tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(path)
        unix.listen()
        server = activated([unix, tcp], command(images.disk), 2)
        try:
            assert server.uris[0].socket == path
            for index in range(2):
                wire = server.connect(index).enter("")
                assert images.golden[:512] == wire.read(0, 512)
        finally:
            server.stop()
        assert os.path.exists(path)  # systemd's, not ours to remove


def test_activation_is_not_for_a_child(images: Images, tmp_path: Path) -> None:
    """LISTEN_PID names somebody else: the sockets are not for us."""
    environ = environment(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
    where = ("--listen", f"unix:{tmp_path}/own")
    server = ServerProcess(command(images.disk, *where), env=environ)
    try:
        assert len(server.connect().enter("").read(0, 512)) == 512
    finally:
        server.stop()


def test_activated_server_does_not_pass_its_sockets_on(images: Images, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        server = activated([tcp], command(images.disk), 1)
        try:
            with open(f"/proc/{server.pid}/fdinfo/3") as info:
                flags = next(line for line in info if line.startswith("flags:"))
            assert int(flags.split()[1], 8) & os.O_CLOEXEC
        finally:
            server.stop()


def test_ipv4_and_ipv6_and_unix_together(serve: Serve, images: Images, tmp_path: Path) -> None:
    if not socket.has_ipv6 or not _has_ipv6_loopback():
        pytest.skip("no IPv6 here")
    where = ("--listen", "127.0.0.1:0", "--listen", "[::1]:0", "--listen", f"unix:{tmp_path}/sock")
    server = serve(images.disk, images.huge, *where, uris=6)
    texts = [str(found) for found in server.uris]
    assert sum("[::1]" in text for text in texts) == 2
    for index, found in enumerate(server.uris):
        wire = server.connect(index).enter(found.export)
        assert len(wire.read(0, 512)) == 512


def _has_ipv6_loopback() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_localhost_is_every_address_it_stands_for(serve: Serve, images: Images) -> None:
    families = {info[0] for info in socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)}
    server = serve(images.disk, "--listen", "localhost:0", uris=len(families))
    ports = {found.port for found in server.uris}
    assert len(ports) == 1
    for index in range(len(families)):
        assert len(server.connect(index).enter("").read(0, 512)) == 512


def test_lone_export_is_the_default_one(serve: Serve, images: Images, tmp_path: Path) -> None:
    server = serve(images.disk, "--listen", f"unix:{tmp_path}/sock")
    for name in ("", "disk"):
        assert images.golden[:512] == server.connect().enter(name).read(0, 512)


def test_named_exports(serve: Serve, images: Images, tmp_path: Path) -> None:
    names = ["a", "b c", "ä/ö", "x" * 4096]
    exports = [word for name in names for word in ("--export", f"{name}={images.disk}")]
    server = serve(*exports, "--listen", f"unix:{tmp_path}/sock", uris=4)
    for index, name in enumerate(names):
        assert server.uris[index].export == name
        assert images.golden[:512] == server.connect(index).enter(name).read(0, 512)
    wire = server.connect()
    wire.greet()
    assert wire.verdict(Option.GO, info_data("")) == Reply.ERR_UNKNOWN
    *listed, _ = wire.ask(Option.LIST)
    assert names == [structs.ServerReply.parse(entry.data).name.data.decode() for entry in listed]


def test_export_with_an_empty_name(serve: Serve, images: Images, tmp_path: Path) -> None:
    exports = ("--export", f"={images.disk}", "--export", f"other={images.big}")
    server = serve(*exports, "--listen", f"unix:{tmp_path}/sock", uris=2)
    assert images.golden[:512] == server.connect().enter("").read(0, 512)
    assert images.golden_big[:512] == server.connect().enter("other").read(0, 512)


# --- stdio -----------------------------------------------------------------------------------


def test_one_socket_on_standard_input_and_output(images: Images, dialect: Dialect) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = command(images.disk, "--listen", "stdio")
        process = subprocess.Popen(
            arguments, stdin=theirs.fileno(), stdout=theirs.fileno(), env=environment()
        )
        theirs.close()
        ours.settimeout(20)
        wire = Wire(ours).enter("", dialect)
        batch = b"".join(wire.prepare(Command.READ, n * 1000, 70_000) for n in range(20))
        wire.send(batch + wire.prepare(Command.DISC))
        for _ in range(20):
            answer = wire.answer()
            start = answer.asked.offset
            assert images.golden[start : start + 70_000] == answer.data()
        assert wire.is_closed()
        assert process.wait(20) == 0


@pytest.mark.parametrize("count", [10, 30])
def test_pipes_deliver_everything_before_the_end(images: Images, count: int) -> None:
    """All replies arrive although the client reads late and the server is done long before."""
    arguments = command(images.big, "--listen", "stdio")
    pipe = subprocess.PIPE
    process = subprocess.Popen(arguments, stdin=pipe, stdout=pipe, env=environment())
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        ours, theirs = socket.socketpair()
        ours.settimeout(20)
        wire = Wire(ours)
        pumps = [
            threading.Thread(target=_pump, args=(theirs.fileno(), process.stdin.fileno())),
            threading.Thread(target=_pump_out, args=(process.stdout.fileno(), theirs)),
        ]
        for pump in pumps:
            pump.start()
        try:
            wire.enter("")
            batch = b"".join(wire.prepare(Command.READ, n * MIB, MIB) for n in range(count))
            wire.send(batch + wire.prepare(Command.DISC))
            for _ in range(count):
                answer = wire.answer()
                time.sleep(0.02)  # the server finishes long before its client
                start = answer.asked.offset
                assert images.golden_big[start : start + MIB] == answer.data()
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait(20)
            ours.close()
            for pump in pumps:
                pump.join(20)
            theirs.close()


def _pump_out(source: int, sock: socket.socket) -> None:
    _pump(source, sock.fileno())
    sock.shutdown(socket.SHUT_WR)


def _pump(source: int, target: int) -> None:
    try:
        while piece := os.read(source, 1 << 16):
            view = memoryview(piece)
            while view:
                view = view[os.write(target, view) :]
    except OSError:
        pass


def test_stdio_ends_on_sigterm(images: Images) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = command(images.disk, "--listen", "stdio")
        process = subprocess.Popen(
            arguments, stdin=theirs.fileno(), stdout=theirs.fileno(), env=environment()
        )
        theirs.close()
        ours.settimeout(20)
        wire = Wire(ours).enter("")
        wire.read(0, 512)
        process.send_signal(signal.SIGTERM)
        assert wire.is_closed()
        assert process.wait(20) == 0


def test_stdio_reopens_its_audit_file(images: Images, tmp_path: Path) -> None:
    audit = tmp_path / "audit.log"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = command(images.disk, "--listen", "stdio", "--audit-file", str(audit))
        process = subprocess.Popen(
            arguments,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        theirs.close()
        ours.settimeout(20)
        wire = Wire(ours).enter("")
        audit.rename(tmp_path / "audit.log.1")
        process.send_signal(signal.SIGHUP)
        ends = time.monotonic() + 20
        while not audit.exists() and time.monotonic() < ends:
            time.sleep(0.01)
        wire.read(0, 512)
        wire.disconnect()
        _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (0, "")
    assert '"event": "detach"' in audit.read_text()
