"""How our server comes to its sockets and how it leaves: TCP, IPv6, systemd, stdio, SIGTERM."""

import signal
import socket
import subprocess
import time

from conformance import process
from conformance.context import Context
from conformance.image import MIB, file_digest
from conformance.outcome import CheckFailedError, MissingPeerError
from conformance.process import find_program, kill_group
from conformance.programs.nbdsh import run_scenario
from conformance.registry import check, expect
from conformance.server import server_command, server_environment

NEEDS = ("nbdinfo",)


@check("listen", "TCP", needs=NEEDS)
def tcp(context: Context) -> None:
    """127.0.0.1; the URI that was printed is the one that works."""
    image = context.image()
    server = context.serve(image, listen=("tcp",))
    for uri in (server.uri(tcp=True), server.printed[0]):
        expect(image.size, int(context.run("nbdinfo", "--size", uri).stdout), f"size by {uri}")


@check("listen", "IPv6", needs=NEEDS)
def ipv6(context: Context) -> None:
    """[::1], in the command line and in the URI."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        raise MissingPeerError(f"no IPv6 loopback: {error}") from error
    image = context.image()
    server = context.serve(image, listen=("tcp6",))
    for uri in (server.uri(tcp=True), server.printed[0]):
        expect(image.size, int(context.run("nbdinfo", "--size", uri).stdout), f"size by {uri}")


@check("listen", "TCP and Unix", needs=("nbdinfo", "nbdcopy"))
def both(context: Context) -> None:
    """Two listeners of one server, read at the same time."""
    image = context.image()
    server = context.serve(image, listen=("tcp", "unix"))
    for index, uri in enumerate((server.uri(tcp=True), server.uri())):
        copy = context.directory / f"copy{index}"
        context.run("nbdcopy", uri, copy)
        expect(image.digest(), file_digest(copy), f"sha256 by {uri}")


@check("systemd", "socket-activate", needs=("systemd-socket-activate", *NEEDS))
def socket_activate(context: Context) -> None:
    """systemd-socket-activate opens the socket, the first client starts the server."""
    image = context.image()
    path = context.directory / "activated"
    variables = [f"--setenv={key}={value}" for key, value in server_environment().items()]
    words = (*variables, f"--listen={path}", *server_command(image.path))
    launcher = subprocess.Popen(
        [find_program("systemd-socket-activate"), *words],
        cwd=context.directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(context.directory / "launcher").open("wb"),
        start_new_session=True,
    )
    context.at_end(kill_group, launcher)
    deadline = time.monotonic() + 10
    while not path.exists():
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise CheckFailedError("systemd-socket-activate did not listen")
        time.sleep(0.02)
    uri = f"nbd+unix:///?socket={path}"
    for _ in range(2):
        expect(image.size, int(context.run("nbdinfo", "--size", uri).stdout), "size")
    # It has become our server by exec.
    launcher.send_signal(signal.SIGTERM)
    try:
        code = launcher.wait(timeout=20)
    except subprocess.TimeoutExpired:
        raise CheckFailedError("the activated server did not leave on SIGTERM") from None
    said = process.tail((context.directory / "launcher").read_text())
    expect(0, code, f"exit code of the activated server ({said})")


@check("systemd", "libnbd activation")
def libnbd_activation(context: Context) -> None:
    """nbd_connect_systemd_socket_activation starts our server and talks to it."""
    image = context.image()
    run_scenario(context, "launch", "socket_activation", image.path, *server_command(image.path))


@check("systemd", "nbdinfo [ ... ]", needs=NEEDS)
def nbdinfo_command(context: Context) -> None:
    """nbdinfo --size -- [ COMMAND ]: activates our server as its child."""
    image = context.image()
    words = ("nbdinfo", "--size", "--", "[", *server_command(image.path), "]")
    finished = context.run(*words, environment=server_environment())
    # The child may print its URIs there as well; the size comes last.
    expect(str(image.size), finished.stdout.split()[-1], "size")


@check("inetd", "libnbd command")
def libnbd_command(context: Context) -> None:
    """nbd_connect_command: --listen stdio, one socket as stdin and stdout."""
    image = context.image()
    words = server_command(image.path, "--listen", "stdio")
    run_scenario(context, "launch", "command", image.path, *words)


@check("SIGTERM", "drains and exits 0")
def drain(context: Context) -> None:
    """With 64 reads in flight and an idle client: all answered, then exit code 0."""
    image = context.image()
    server = context.serve(image)
    run_scenario(context, "launch", "drain", server.uri(), image.path, str(server.pid))
    server.wait()


@check("SIGTERM", "leaves no socket", needs=NEEDS)
def socket_removed(context: Context) -> None:
    """The Unix socket is gone with the server, and the next one can have its place."""
    server = context.serve(context.image(size=16 * MIB))
    context.run("nbdinfo", server.uri())
    server.stop()
    expect(False, server.socket.exists(), "the socket's file is still there")
