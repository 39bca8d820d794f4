"""A configuration that changes under clients: they keep what they have, others get what is new."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from authority import Authority
from configured import ME, Service
from serving import ROOT, ServerProcess, environment, eventually
from wire import Address, Wire

from nbdsrv.errors import ConfigError, DiskError
from nbdsrv.ops.admin_client import AdminClient
from protocol.constants import Dialect, Option, Reply, TransmissionFlag

Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Service] = []

    def begin(text: str, *, uris: int = 1, where: str = "") -> Service:
        started.append(Service.start(tmp_path, text, uris=uris, where=where))
        return started[-1]

    yield begin
    for service in started:
        service.server.stop()


def export(directory: Path, name: str, more: str = "") -> str:
    path = directory / f"{name}.img"
    if not path.exists():
        path.write_bytes(name.encode() * 4096)
    return f'[[export]]\nname = "{name}"\nsource = "{path}"\n{more}\n'


def listed(service: Service) -> list[str]:
    wire = service.server.connect()
    wire.greet()
    names = list(service.names(wire))
    wire.close()
    return names


def serves(place: Address) -> bool:
    wire = Wire.connect(place).enter("a")
    data = wire.read(0, 1)
    wire.close()
    return data == b"a"


def states(service: Service) -> dict[str, str]:
    return {each["name"]: each["state"] for each in service.ask("exports")}


def test_exports_come_and_go_and_clients_stay(start: Start, tmp_path: Path) -> None:
    a, b, c = (export(tmp_path, name) for name in "abc")
    service = start(a + b, uris=2)
    on_a, on_b = service.server.connect().enter("a"), service.server.connect().enter("b")
    assert service.reload(b + c) == {"added": ["c"], "removed": ["a"], "changed": [], "leaving": 1}
    assert listed(service) == ["b", "c"]
    assert on_a.read(0, 10) == b"a" * 10
    assert on_b.read(0, 10) == b"b" * 10
    assert states(service) == {"b": "served", "c": "served", "a": "leaving"}
    wire = service.server.connect()
    wire.greet()
    assert service.refusal(wire, "a") == Reply.ERR_UNKNOWN
    wire.go("c")
    assert [client["state"] for client in service.ask("clients")] == ["leaving", "served", "served"]
    assert service.server.opened(tmp_path / "a.img")
    on_a.disconnect()
    assert eventually(lambda: not service.server.opened(tmp_path / "a.img"))
    assert states(service) == {"b": "served", "c": "served"}
    assert on_b.read(5, 10) == b"b" * 10


def test_an_overlay_in_use_comes_back_to_its_clients(start: Start, tmp_path: Path) -> None:
    text = export(tmp_path, "a", f'overlay = "{tmp_path}/ov"')
    service = start(text)
    guest = service.server.connect().enter("a")
    guest.write(0, b"guest")
    assert service.reload(export(tmp_path, "b"))["leaving"] == 1
    # Under other terms it would have to be opened anew, which only one can.
    with pytest.raises(
        ConfigError, match=r"export.a.source: overlay .* in use by process .*, this server; wait"
    ):
        service.reload(text.replace("a.img", "b.img"))
    assert service.reload(text) == {"added": ["a"], "removed": ["b"], "changed": [], "leaving": 0}
    other = service.server.connect().enter("a")
    other.write(5, b" and another")
    assert guest.read(0, 17) == b"guest and another"
    guest.disconnect()
    other.disconnect()
    assert states(service) == {"a": "served"}
    assert eventually(lambda: serves_what(service, b"guest and another"))
    assert (tmp_path / "a.img").read_bytes() == b"a" * 4096


def test_nobody_writes_what_an_overlay_lies_over(start: Start, tmp_path: Path) -> None:
    under = export(tmp_path, "a", f'overlay = "{tmp_path}/ov"')
    written = under.replace('"a"', '"w"').replace("overlay =", "write = true\n#")
    other = export(tmp_path, "b")
    service = start(under)
    guest = service.server.connect().enter("a")
    guest.write(0, b"guest")
    for text in (under + written, written + under):
        with pytest.raises(ConfigError, match=r"export.w.source: .* export 'a' has an overlay"):
            service.reload(text)
    service.reload(other)  # it leaves, and lies over the image still
    with pytest.raises(ConfigError, match="1 clients use this image as export 'a'"):
        service.reload(other + written)
    guest.disconnect()
    assert eventually(lambda: states(service) == {"b": "served"})
    service.reload(other + written)
    writer = service.server.connect().enter("w")
    with pytest.raises(ConfigError, match="1 clients use this image as export 'w'"):
        service.reload(other + under)
    writer.disconnect()


def serves_what(service: Service, expected: bytes) -> bool:
    wire = service.server.connect().enter("a")
    found = wire.read(0, len(expected))
    wire.disconnect()
    return found == expected


def test_new_terms_are_for_new_clients(start: Start, tmp_path: Path) -> None:
    service = start(export(tmp_path, "a", "write = true"))
    before = service.server.connect().enter("a")
    more = f'write = true\nallow = [{{uid = {ME}, access = "ro"}}]'
    assert service.reload(export(tmp_path, "a", more))["changed"] == ["a"]
    after = service.server.connect().enter("a")
    assert TransmissionFlag.READ_ONLY in after.flags
    before.write(0, b"x" * 512)
    assert after.read(0, 512) == b"x" * 512  # it is still one disk
    descriptors = os.listdir(f"/proc/{service.server.pid}/fd")
    targets = [os.readlink(f"/proc/{service.server.pid}/fd/{fd}") for fd in descriptors]
    assert targets.count(str(tmp_path / "a.img")) == 1


def test_another_source_under_the_same_name(start: Start, tmp_path: Path) -> None:
    service = start(export(tmp_path, "a"))
    before = service.server.connect().enter("a")
    (tmp_path / "new.img").write_bytes(b"n" * 1000)
    done = service.reload(f'[[export]]\nname = "a"\nsource = "{tmp_path}/new.img"\n')
    assert (done["changed"], done["leaving"]) == (["a"], 1)
    after = service.server.connect().enter("a")
    assert (before.read(0, 4), after.read(0, 4)) == (b"aaaa", b"nnnn")


def test_a_qcow2_in_use_is_not_opened_for_writing_beside_its_readers(
    start: Start, tmp_path: Path
) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    image = tmp_path / "a.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"]
    subprocess.run(command, check=True, timeout=20)
    text = f'[[export]]\nname = "a"\nsource = "{image}"\n'
    service = start(text + "write = true\n")
    writer = service.server.connect().enter("a")
    with pytest.raises(ConfigError, match=r":8: export.a.source: 1 clients use this image"):
        service.reload(text)
    other = export(tmp_path, "b")
    service.reload(other)  # it leaves
    with pytest.raises(ConfigError, match="1 clients use this image as export 'a'"):
        service.reload(other + text.replace('"a"', '"c"'))
    writer.write(0, b"w" * 512)
    writer.disconnect()
    assert eventually(lambda: states(service) == {"b": "served"})
    assert service.reload(other + text)["added"] == ["a"]
    reader = service.server.connect().enter("a")
    assert reader.read(0, 512) == b"w" * 512


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[export]]\nnmae = 1\n", "did you mean name?"),
        ("[[export]]\n", "name is missing"),
        ("a b c", "nbdsrv.toml:2, column 3"),
        ("", "nothing to serve"),
        (
            '[[export]]\nname = "x"\nsource = "/nowhere/x.img"\n',
            ": export.x.source: /nowhere/x.img",
        ),
        ('[repository.r]\nlocation = "repo:/nowhere"\n', ": repository.r.location:"),
    ],
)
def test_a_bad_configuration_changes_nothing_and_says_so(
    start: Start, tmp_path: Path, text: str, said: str
) -> None:
    service = start(export(tmp_path, "a"))
    wire = service.server.connect().enter("a")
    descriptors = service.server.descriptors()
    with pytest.raises((ConfigError, DiskError)) as caught:
        service.reload(text)
    assert said in str(caught.value)
    assert listed(service) == ["a"]
    assert wire.read(0, 4) == b"aaaa"
    assert said in service.server.log()
    assert "everything stays as it was" in service.server.log()
    document = service.ask("status")["server"]
    assert said in document["reloads"]["error"]
    assert eventually(lambda: service.server.descriptors() <= descriptors)
    service.reload(export(tmp_path, "a"))
    assert service.ask("status")["server"]["reloads"]["error"] is None


def test_listeners_come_and_go(start: Start, tmp_path: Path) -> None:
    text = export(tmp_path, "a")
    service = start(text)
    wire = service.server.connect().enter("a")
    service.head = service.head.replace(
        f'["unix:{tmp_path}/nbd"]', f'["unix:{tmp_path}/other", "127.0.0.1:0"]'
    )
    service.reload(text)
    assert not (tmp_path / "nbd").exists()
    assert serves(str(tmp_path / "other"))
    listening = service.ask("status")["server"]["listening"]
    assert listening[0] == f"unix:{tmp_path}/other"
    port = int(listening[1].rpartition(":")[2])
    assert serves(("127.0.0.1", port))
    assert wire.read(0, 1) == b"a"
    # What is taken cannot be had, and what there was is there again.
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "taken"))
        taken.listen()
        service.head = service.head.replace(f"unix:{tmp_path}/other", f"unix:{tmp_path}/taken")
        with pytest.raises(DiskError, match="another server is listening there"):
            service.reload(text)
    assert serves(str(tmp_path / "other"))


def test_windows_move_and_move_back_at_once(start: Start, tmp_path: Path) -> None:
    """The admin socket and the metrics: where they were is free as soon as the reload is done."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as b:
        ports = [each.getsockname()[1] for each in (one, b)]
    text = export(tmp_path, "a")
    metrics = [f'[metrics]\nlisten = "127.0.0.1:{port}"\n' for port in ports]
    service = start(text + metrics[0])
    head, admin = service.head, f'"{tmp_path}/admin"'
    with AdminClient(str(tmp_path / "admin")) as client:
        for turn in range(1, 5):
            service.head = head.replace(admin, f'"{tmp_path}/admin2"') if turn % 2 else head
            service.write(text + metrics[turn % 2])
            client.ask("reload") if turn == 1 else asked(tmp_path, turn)
            assert (tmp_path / "admin").exists() is not (tmp_path / "admin2").exists()
            with socket.create_connection(("127.0.0.1", ports[turn % 2])):
                pass
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", ports[(turn + 1) % 2]))


def asked(directory: Path, turn: int) -> None:
    """A reload by the admin socket that there was before it."""
    with AdminClient(str(directory / ("admin" if turn % 2 else "admin2"))) as client:
        client.ask("reload")


def test_hang_up_is_a_reload_and_reopens_the_audit_file(start: Start, tmp_path: Path) -> None:
    service = start(export(tmp_path, "a"))
    os.rename(tmp_path / "audit", tmp_path / "audit.1")
    service.write(export(tmp_path, "a") + export(tmp_path, "b"))
    service.server.process.send_signal(signal.SIGHUP)
    assert eventually(lambda: listed(service) == ["a", "b"])
    service.server.connect().enter("a").disconnect()
    assert service.audited("attach", export="a")
    assert (tmp_path / "audit.1").read_text() == ""


def test_new_certificates_for_new_connections(start: Start, tmp_path: Path) -> None:
    names = ("before", "after")
    authorities = [Authority(tmp_path, name) for name in names]
    pairs = [each.server(f"server-{name}") for each, name in zip(authorities, names, strict=True)]

    def tls(number: int) -> str:
        pair = pairs[number]
        table = f'\n[tls]\ncert = "{pair.certificate}"\nkey = "{pair.key}"\n'
        return table + export(tmp_path, "a")

    def client(number: int) -> Wire:
        context = ssl.create_default_context(cafile=str(authorities[number].certificate))
        wire = service.server.connect()
        wire.greet()
        wire.starttls(context)
        return wire

    service = start(tls(0))
    old = client(0)
    old.go("a")
    old.dialect = Dialect.SIMPLE
    service.reload(tls(1))
    assert old.read(0, 4) == b"aaaa"
    with pytest.raises(ssl.SSLError):
        client(0)
    assert client(1).verdict(Option.LIST) == Reply.ACK


def test_a_client_is_dropped(start: Start, tmp_path: Path) -> None:
    service = start(export(tmp_path, "a"))
    stays, goes = service.server.connect().enter("a"), service.server.connect().enter("a")
    first, second = service.ask("clients")
    assert service.ask("drop-client", id=second["id"]) == {"dropped": second["id"]}
    assert goes.is_closed()
    assert stays.read(0, 4) == b"aaaa"
    assert service.audited("detach", session=second["id"], reason="dropped by the administrator")
    with pytest.raises(DiskError, match="no client"):
        service.ask("drop-client", id=second["id"])
    assert [each["id"] for each in service.ask("clients")] == [first["id"]]


class Manager:
    """systemd's half of sd_notify and FDSTORE, as sd_notify(3) and sd_listen_fds(3) have it."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "notify")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.path)
        self.sock.settimeout(20)
        self.stored: dict[str, list[int]] = {}
        self.started: list[ServerProcess] = []

    def take(self, until: str) -> None:
        """Messages, up to one that has a line ``until``."""
        while True:
            data, descriptors, _, _ = socket.recv_fds(self.sock, 4096, 16)
            lines = data.decode().split("\n")
            name = next((x.removeprefix("FDNAME=") for x in lines if x.startswith("FDNAME=")), "")
            if "FDSTORE=1" in lines:
                self.stored.setdefault(name, []).extend(descriptors)
            else:
                assert not descriptors
            if "FDSTOREREMOVE=1" in lines:
                for fd in self.stored.pop(name):
                    os.close(fd)
            if until in lines:
                return

    def start(self, *arguments: str | Path) -> ServerProcess:
        """A process with LISTEN_FDS: a shell-less exec that moves descriptors to 3 and on."""
        held = [(fd, name) for name, fds in self.stored.items() for fd in fds]
        script = (
            "import os, sys\n"
            "fds = [int(x) for x in sys.argv[1].split(',') if x]\n"
            "high = [os.dup2(fd, 500 + n) for n, fd in enumerate(fds)]\n"
            "for n, fd in enumerate(high): os.dup2(fd, 3 + n, inheritable=True); os.close(fd)\n"
            "os.environ['LISTEN_PID'] = str(os.getpid())\n"
            "os.execv(sys.executable, [sys.executable, '-m', 'nbdsrv', *sys.argv[2:]])\n"
        )
        env = environment(
            NOTIFY_SOCKET=self.path,
            LISTEN_FDS=str(len(held)),
            LISTEN_FDNAMES=":".join(name for _, name in held),
        )
        command = [sys.executable, "-c", script, ",".join(str(fd) for fd, _ in held)]
        command += ["serve", *map(str, arguments)]
        server = ServerProcess(command, uris=2, env=env, pass_fds=[fd for fd, _ in held])
        self.started.append(server)
        return server

    def close(self) -> None:
        for server in self.started:
            server.hang_up()
            server._kill()
        self.sock.close()
        for fds in self.stored.values():
            for fd in fds:
                os.close(fd)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path)
    yield manager
    manager.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nobody_is_refused_while_the_service_is_started_anew(
    tmp_path: Path, manager: Manager, how: signal.Signals
) -> None:
    text = f'listen = ["unix:{tmp_path}/nbd", "127.0.0.1:0"]\n' + export(tmp_path, "a")
    (tmp_path / "c.toml").write_text(text)
    first = manager.start("--config", tmp_path / "c.toml")
    manager.take("READY=1")
    places = [first.address(0), first.address(1)]
    # Both sockets are stored; READY may come before or after.
    while sum(map(len, manager.stored.values())) < 2:
        manager.take("FDSTORE=1")
    inode = os.stat(tmp_path / "nbd").st_ino
    attached = first.connect().enter("a")
    first.process.send_signal(how)
    first.process.wait(20)
    assert attached.is_closed()
    assert how is signal.SIGKILL or first.wait() == 0
    waiting = [Wire.connect(place) for place in places]  # nobody serves now
    second = manager.start("--config", tmp_path / "c.toml")
    assert [second.address(0), second.address(1)] == places
    for wire in waiting:
        assert wire.enter("a").read(0, 4) == b"aaaa"
        wire.disconnect()
    assert os.stat(tmp_path / "nbd").st_ino == inode
    second.stop()


def test_what_is_listened_on_no_more_is_not_kept(tmp_path: Path, manager: Manager) -> None:
    def config(*listen: str) -> None:
        head = f'listen = {json.dumps(listen)}\n[admin]\nsocket = "{tmp_path}/admin"\n'
        (tmp_path / "c.toml").write_text(head + export(tmp_path, "a"))

    config(f"unix:{tmp_path}/one", f"unix:{tmp_path}/two")
    server = manager.start("--config", tmp_path / "c.toml")
    while sum(map(len, manager.stored.values())) < 2:
        manager.take("FDSTORE=1")
    config(f"unix:{tmp_path}/two")
    command = [sys.executable, "-m", "nbdsrv", "reload", "--socket", str(tmp_path / "admin")]
    subprocess.run(command, check=True, timeout=20, env=environment(), cwd=ROOT)
    manager.take("FDSTOREREMOVE=1")
    assert len(manager.stored) == 1
    assert not (tmp_path / "one").exists()
    server.stop()
    # Its successor is given what it is not to listen on.
    config(f"unix:{tmp_path}/three", f"unix:{tmp_path}/four")
    second = manager.start("--config", tmp_path / "c.toml")
    manager.take("FDSTOREREMOVE=1")
    second.stop()
