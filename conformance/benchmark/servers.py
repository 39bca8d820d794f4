"""The three servers, started and stopped.

Each runs in a fresh directory of its own (nbdkit leaves its socket behind), is ready when it
has sent the 8 bytes every NBD server greets with, and is ended by its process id. The command
lines are the plain ones a user would type; nothing is tuned on either side.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from conformance.benchmark.ceiling import compiler, program
from conformance.benchmark.cells import Peer, Transport
from conformance.benchmark.report import BenchmarkError
from conformance.benchmark.tls import Certificates, issue

__all__ = ["GREETING", "ROOT", "Server", "free_port", "installed", "receive", "serve", "stop"]

READY_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 15.0
GREETING = b"NBDMAGIC"
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
QEMU_CLIENTS = 8
"""qemu-nbd's limit of connections in the cells; it announces multi-conn only above one."""


@dataclass(slots=True)
class Server:
    """A running server, its address, and what /proc knows of it."""

    peer: Peer
    transport: Transport
    directory: str
    process: subprocess.Popen[bytes]
    socket_path: str
    port: int
    certificates: Certificates | None

    def uri(self, export: str = "") -> str:
        """The NBD URI of an export, for libnbd's tools."""
        if self.transport is Transport.UNIX:
            return f"nbd+unix:///{export}?socket={self.socket_path}"
        scheme = "nbds" if self.transport is Transport.TLS else "nbd"
        return f"{scheme}://127.0.0.1:{self.port}/{export}"

    def connect(self, timeout_s: float) -> socket.socket:
        """A new connection, nothing sent or received yet."""
        if self.transport is Transport.UNIX:
            made = socket.socket(socket.AF_UNIX)
            made.settimeout(timeout_s)
            try:
                made.connect(self.socket_path)
            except OSError:
                made.close()
                raise
            return made
        return socket.create_connection(("127.0.0.1", self.port), timeout_s)

    def cpu_seconds(self) -> float:
        """Processor time used so far, all threads, user and system."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def status(self, key: str) -> int:
        """A number of /proc/PID/status; sizes (kB there) in bytes."""
        for line in self._proc("status").splitlines():
            name, _, value = line.partition(":")
            if name == key:
                number, *unit = value.split()
                return int(number) * (1024 if unit else 1)
        raise BenchmarkError(f"/proc/{self.process.pid}/status has no {key}")

    def storage_bytes(self) -> int:
        """Bytes this process has caused to be fetched from the storage layer."""
        return int(self._proc("io").partition("\nread_bytes:")[2].split()[0])

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def log(self) -> str:
        """The end of what the server printed, for an error message."""
        with open(os.path.join(self.directory, "log"), "rb") as file:
            return file.read()[-400:].decode("utf-8", "replace").strip()

    def _proc(self, name: str) -> str:
        if self.process.poll() is not None:
            raise BenchmarkError(f"{self.peer} has ended by itself: {self.log()}")
        try:
            with open(f"/proc/{self.process.pid}/{name}", encoding="ascii", errors="replace") as f:
                return f.read()
        except OSError as error:
            raise BenchmarkError(f"{self.peer} is gone: {self.log()}") from error


def receive(connection: socket.socket, length: int) -> bytes:
    """``length`` bytes, or fewer when the other side hangs up before.

    Not MSG_WAITALL: a Python socket with a timeout is a non-blocking one, and falls short.
    """
    data = b""
    while len(data) < length and (more := connection.recv(length - len(data))):
        data += more
    return data


def installed(peer: Peer) -> bool:
    if peer is Peer.CEILING:
        return compiler() is not None
    return peer is Peer.OURS or shutil.which(peer.value) is not None


@contextlib.contextmanager
def serve(
    peer: Peer,
    transport: Transport,
    exports: Mapping[str, str],
    *,
    write: bool = False,
    connections: int = QEMU_CLIENTS,
    form: str = "raw",
) -> Iterator[Server]:
    """Serve images by export name ("" is the default export) until the block ends.

    ``connections`` clients are expected at most, for the servers that have such a limit. ``form``
    is QEMU's name of the images' format; ours looks for itself.
    Raises BenchmarkError when the server does not get ready.
    """
    with tempfile.TemporaryDirectory(prefix="nbd-bench-") as directory:
        os.chmod(directory, 0o755)  # TLS clients run as nobody and read the authority's file
        server = _start(
            peer, transport, directory, exports, write=write, connections=connections, form=form
        )
        try:
            _await_greeting(server)
            yield server
        finally:
            stop(server.process)


def _start(
    peer: Peer,
    transport: Transport,
    directory: str,
    exports: Mapping[str, str],
    *,
    write: bool,
    connections: int,
    form: str,
) -> Server:
    path = os.path.join(directory, "socket")
    port = 0 if transport is Transport.UNIX else free_port()
    tls = issue(directory) if transport is Transport.TLS else None
    if peer is Peer.OURS:
        command = _nbdsrv(path, port, tls, exports, write=write, connections=connections)
    elif peer is Peer.CEILING:
        command = [program(), str(port or path), exports[""], *(["write"] if write else [])]
    elif peer is Peer.NBDKIT:
        command = _nbdkit(path, port, tls, _nbdkit_source(exports, directory), write=write)
    else:
        command = _qemu(path, port, tls, exports, form, write=write, connections=connections)
    with open(os.path.join(directory, "log"), "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            process_group=0,  # Ctrl-C is for us: servers are stopped in their turn
        )
    return Server(peer, transport, directory, process, path, port, tls)


def _nbdsrv(
    path: str,
    port: int,
    tls: Certificates | None,
    exports: Mapping[str, str],
    *,
    write: bool,
    connections: int,
) -> Sequence[str]:
    listen = f"127.0.0.1:{port}" if port else f"unix:{path}"
    command = [sys.executable, "-m", "nbdsrv", "serve", "--listen", listen]
    for name, image in exports.items():
        command += ["--export", f"{name}={image}"] if name else [image]
    if write:
        command.append("--write")
    if tls:
        command += ["--tls", "required", "--tls-cert", tls.certificate, "--tls-key", tls.key]
    if connections > QEMU_CLIENTS:
        command += ["--max-connections", str(connections)]
    return command


def _nbdkit(
    path: str, port: int, tls: Certificates | None, source: str, *, write: bool
) -> Sequence[str]:
    command = ["nbdkit", "-f"] if write else ["nbdkit", "-f", "-r"]
    command += ["-i", "127.0.0.1", "-p", str(port)] if port else ["-U", path]
    if tls:
        command += ["--tls=require", f"--tls-certificates={tls.directory}"]
    return [*command, "file", source]


def _nbdkit_source(exports: Mapping[str, str], directory: str) -> str:
    """nbdkit serves one file, or a directory's files by their names: links, in this case."""
    if list(exports) == [""]:
        return exports[""]
    links = os.path.join(directory, "exports")
    os.mkdir(links)
    for name, image in exports.items():
        os.symlink(image, os.path.join(links, name))
    return f"dir={links}"


def _qemu(
    path: str,
    port: int,
    tls: Certificates | None,
    exports: Mapping[str, str],
    form: str,
    *,
    write: bool,
    connections: int,
) -> Sequence[str]:
    if list(exports) != [""]:
        raise BenchmarkError("qemu-nbd serves one image only")
    command = ["qemu-nbd", "-f", form, "-t", "-e", str(connections)]
    if not write:
        command.append("-r")
    command += ["-b", "127.0.0.1", "-p", str(port)] if port else ["-k", path]
    if tls:
        creds = f"tls-creds-x509,id=tls0,endpoint=server,dir={tls.directory},verify-peer=no"
        command += ["--object", creds, "--tls-creds", "tls0"]
    return [*command, exports[""]]


def free_port() -> int:
    """A TCP port of loopback nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


def _await_greeting(server: Server) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise BenchmarkError(f"{server.peer} ended at once: {server.log()}")
        try:
            with server.connect(READY_TIMEOUT_S) as connection:
                if receive(connection, len(GREETING)) == GREETING:
                    return
        except OSError:
            time.sleep(0.02)  # not listening yet
    raise BenchmarkError(f"{server.peer} sent no greeting in {READY_TIMEOUT_S} s: {server.log()}")


def stop(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """SIGTERM, and SIGKILL where that is not enough; returns when it has ended."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
