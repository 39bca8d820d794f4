"""Listening: what can be written behind --listen, and what is said when it cannot be done."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdsrv.errors import ConfigError, ListenError
from nbdsrv.net.listener import Listener, activated_sockets, listen


@contextmanager
def listening(where: str, **options: int) -> Iterator[list[Listener]]:
    listeners = listen(where, **options)
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


def answers(listener: Listener) -> bool:
    """Does somebody who connects there reach us?"""
    with socket.socket(listener.sock.family) as client:
        client.settimeout(5)
        client.connect(listener.address)
        server, _ = listener.sock.accept()
        with server:
            server.sendall(b"!")
            return client.recv(1) == b"!"


def ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_ipv4() -> None:
    with listening("127.0.0.1:0") as (listener,):
        assert isinstance(listener.address, tuple)
        host, port = listener.address
        assert host == "127.0.0.1"
        assert port > 0
        assert answers(listener)


def test_ipv6_in_brackets() -> None:
    if not ipv6():
        pytest.skip("no IPv6 here")
    with listening("[::1]:0") as (listener,):
        assert listener.address[0] == "::1"
        assert answers(listener)


@pytest.mark.parametrize("where", [":0", "*:0"])
def test_all_addresses(where: str) -> None:
    with listening(where) as listeners:
        assert {listener.address[0] for listener in listeners} <= {"0.0.0.0", "::"}


def test_one_port_for_all_addresses_of_a_name() -> None:
    for where in ("localhost:0", ":0"):
        with listening(where) as listeners:
            assert len({listener.address[1] for listener in listeners}) == 1
            assert all(answers(listener) for listener in listeners)


def test_unix_socket_and_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with listening(f"unix:{path}") as (listener,):
        assert listener.address == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert answers(listener)
    assert not path.exists()
    before = os.umask(0o077)
    try:
        with listening(f"unix:{path}", socket_mode=0o660):
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert os.umask(0o077) == 0o077  # put back
    finally:
        os.umask(before)


def test_a_relative_unix_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with listening("unix:sock"):
        assert (tmp_path / "sock").is_socket()
    assert not (tmp_path / "sock").exists()


@pytest.mark.parametrize(
    "where",
    [
        "127.0.0.1:70000",
        "127.0.0.1:-1",
        "127.0.0.1:",
        "127.0.0.1:port",
        "127.0.0.1:\u0663",
        "127.0.0.1:1\u00b2",
        "127.0.0.1: 1",
        "::1:10809",
        "fe80::1",
        "unix:",
        "",
    ],
)
def test_what_makes_no_sense(where: str) -> None:
    with pytest.raises(ConfigError):
        listen(where)


@pytest.mark.parametrize(
    "where",
    ["..:0", "a" * 70 + ".invalid:0", "127.0.0.1:" + "1" * 5000],
    ids=["dots", "label", "port"],
)
def test_names_and_numbers_python_itself_chokes_on(where: str) -> None:
    with pytest.raises((ConfigError, ListenError)):
        listen(where)


def test_an_unknown_name() -> None:
    with pytest.raises(ListenError, match=r"no-such-host\.invalid"):
        listen("no-such-host.invalid:0")


def test_port_taken() -> None:
    with listening("127.0.0.1:0") as (first,):
        where = f"127.0.0.1:{first.address[1]}"
        with pytest.raises(ListenError, match=f"{where}.*in use.*another"):
            listen(where)


def test_a_name_with_one_address_taken_leaves_nothing_open() -> None:
    before = os.listdir("/proc/self/fd")
    with listening("127.0.0.1:0") as (first,):
        held = os.listdir("/proc/self/fd")
        with pytest.raises(ListenError):
            listen(f"localhost:{first.address[1]}")
        assert os.listdir("/proc/self/fd") == held
    assert os.listdir("/proc/self/fd") == before


def test_unix_path_taken_by_a_server(tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/sock"
    with listening(where):
        with pytest.raises(ListenError, match="another server"):
            listen(where)
        assert (tmp_path / "sock").is_socket()


def test_unix_path_taken_by_a_stale_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "sock"))
    with pytest.raises(ListenError, match=r"stale.*remove"):
        listen(f"unix:{tmp_path}/sock")
    assert (tmp_path / "sock").is_socket()


def test_unix_path_taken_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "sock").write_text("precious")
    with pytest.raises(ListenError, match="not a socket"):
        listen(f"unix:{tmp_path}/sock")
    assert (tmp_path / "sock").read_text() == "precious"


def test_unix_path_taken_by_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "sock").symlink_to("nowhere")
    with pytest.raises(ListenError):
        listen(f"unix:{tmp_path}/sock")


def test_unix_path_in_no_directory_or_too_long(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="No such file"):
        listen(f"unix:{tmp_path}/nowhere/sock")
    with pytest.raises(ConfigError, match="a socket's path has 107 bytes at most, this one has"):
        listen(f"unix:{tmp_path}/{'x' * 120}")


def test_closing_leaves_a_successors_socket_alone(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    (first,) = listen(f"unix:{path}")
    path.unlink()  # somebody tidied up, and the next server started
    with listening(f"unix:{path}"):
        first.close()
        assert path.is_socket()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "-1", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "0", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "many", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "\u00b2", "LISTEN_PID": str(os.getpid())},
    ],
)
def test_sockets_handed_to_somebody_else_or_to_nobody(environ: dict[str, str]) -> None:
    assert activated_sockets(environ) == []


ACTIVATED = """
import os, sys
from nbdsrv.net.listener import activated_sockets
environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": sys.argv[1]}
try:
    for listener in activated_sockets(environ):
        print(listener.address, os.get_inheritable(listener.sock.fileno()), listener.path)
except Exception as error:
    print(type(error).__name__, error)
"""


def activated(count: str, *socks: socket.socket) -> str:
    """What a child says that gets ``socks`` on descriptors 3 and up."""

    def place() -> None:
        copies = [os.dup2(os.dup(sock.fileno()), 100 + at) for at, sock in enumerate(socks)]
        for at, copy in enumerate(copies):
            os.dup2(copy, 3 + at)

    command = [sys.executable, "-c", ACTIVATED, count]
    done = subprocess.run(
        command,
        preexec_fn=place,
        pass_fds=range(3, 3 + len(socks)),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout


def test_activated_sockets_are_adopted(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with listening("127.0.0.1:0") as (tcp,), listening(f"unix:{path}") as (unix,):
        said = activated("2", tcp.sock, unix.sock).splitlines()
        assert said == [f"{tcp.address} False None", f"{path} False None"]
        assert (tmp_path / "sock").is_socket()  # systemd's to remove, not ours


def test_activated_sockets_that_cannot_be_served() -> None:
    with socket.socket() as idle, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        assert activated("1", idle).startswith("ConfigError LISTEN_FDS: descriptor 3")
        assert activated("1", datagrams).startswith("ConfigError LISTEN_FDS: descriptor 3")
    assert activated("1").startswith("ConfigError LISTEN_FDS: descriptor 3")
