"""The simulator by other people's clients, and by hand: is it as particular as it claims to be?"""

import random
import socket
import ssl
import struct
import subprocess
import urllib.error
import urllib.request
import xmlrpc.client
from pathlib import Path
from typing import Any

import pytest

from conformance.xapi.simulator import Simulator
from conformance.xapi.streams import export_stream
from tests.source.peers import need
from tests.source.xapi_pool import SIZE, add_vm, pool

IHAVEOPT = b"IHAVEOPT"
EINVAL = 22
UNSUP, POLICY, TLS_REQD = 0x80000001, 0x80000002, 0x80000005


def trusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Xml:
    """XAPI by XML-RPC, as the XenAPI package speaks it."""

    def __init__(self, simulator: Simulator, host: int = 0) -> None:
        address = f"https://{simulator.addresses[host]}:{simulator.port}/"
        self.proxy = xmlrpc.client.ServerProxy(address, context=trusting())
        self.session = ""

    def call(self, method: str, *parameters: Any) -> Any:
        try:
            answer: Any = getattr(self.proxy, method)(
                *([self.session] if self.session else []), *parameters
            )
        finally:
            self.proxy("close")()
        if answer["Status"] == "Failure":
            raise LookupError(*answer["ErrorDescription"])
        return answer["Value"]

    def log_in(self) -> "Xml":
        self.session = self.call("session.login_with_password", "root", "secret", "1.0", "test")
        return self


def nbd_of(simulator: Simulator, xml: Xml) -> tuple[str, int, str]:
    disk = xml.call("VDI.get_by_uuid", simulator.do("vdis")[0]["uuid"])
    snapshot = xml.call("VDI.snapshot", disk)
    info = xml.call("VDI.get_nbd_info", snapshot)[0]
    return info["address"], int(info["port"]), info["exportname"]


class Raw:
    """NBD by hand."""

    def __init__(self, address: str, port: int) -> None:
        self.sock: socket.socket = socket.create_connection((address, port), 10)
        try:
            assert b"NBDMAGIC" + IHAVEOPT + b"\0\1" == self.take(18)
            self.sock.sendall(struct.pack(">I", 1))
        except BaseException:
            self.sock.close()
            raise

    def option(self, number: int, data: bytes = b"") -> int:
        self.sock.sendall(struct.pack(">8sII", IHAVEOPT, number, len(data)) + data)
        _, option, reply, length = struct.unpack(">QIII", self.take(20))
        assert number == option
        self.take(length)
        return int(reply)

    def export(self, name: str) -> tuple[int, int]:
        data = name.encode()
        self.sock.sendall(struct.pack(">8sII", IHAVEOPT, 1, len(data)) + data)
        size, flags, zeroes = struct.unpack(">QH124s", self.take(134))
        assert not any(zeroes)
        return size, flags

    def ask(self, command: int, offset: int, length: int) -> int:
        self.sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, command, 7, offset, length))
        magic, error, cookie = struct.unpack(">IIQ", self.take(16))
        assert (0x67446698, 7) == (magic, cookie)
        return int(error)

    def take(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            part = self.sock.recv(count - len(found))
            if not part:
                raise EOFError
            found += part
        return found

    def hung_up(self) -> bool:
        return self.sock.recv(1) == b""

    def close(self) -> None:
        self.sock.close()


def test_xml_has_texts_where_json_has_numbers(tmp_path: Path) -> None:
    with pool(tmp_path, hosts=2) as simulator:
        add_vm(simulator, "root")
        with pytest.raises(LookupError, match=r"HOST_IS_SLAVE.*127.0.0.1"):
            Xml(simulator, host=1).log_in()
        xml = Xml(simulator).log_in()
        (vm,) = xml.call("VM.get_by_name_label", "web")
        assert "Running" == xml.call("VM.get_power_state", vm)
        disk = xml.call("VDI.get_by_uuid", simulator.do("vdis")[0]["uuid"])
        assert str(SIZE) == xml.call("VDI.get_virtual_size", disk)
        infos = xml.call("VDI.get_nbd_info", disk)
        assert ["127.0.0.1", "127.0.0.2"] == [info["address"] for info in infos]
        assert isinstance(infos[0]["port"], str)
        with pytest.raises(LookupError, match="OPERATION_NOT_ALLOWED"):
            xml.call("VDI.data_destroy", disk)
        with pytest.raises(LookupError, match="MESSAGE_METHOD_UNKNOWN"):
            xml.call("VDI.unheard_of", disk)
        xml.call("session.logout")
        with pytest.raises(LookupError, match="SESSION_INVALID"):
            xml.call("VM.get_power_state", vm)


def test_quirks_of_xapi_nbd(tmp_path: Path) -> None:
    with pool(tmp_path, insecure_nbd=True) as simulator:
        add_vm(simulator, "root")
        xml = Xml(simulator).log_in()
        address, port, name = nbd_of(simulator, xml)

        def begun() -> Raw:
            raw = Raw(address, port)
            assert (SIZE, 3) == raw.export(name)
            return raw

        raw = Raw(address, port)
        assert [UNSUP, UNSUP, UNSUP, POLICY] == [raw.option(n) for n in (7, 8, 10, 3)]
        assert (SIZE, 3) == raw.export(name)
        assert 0 == raw.ask(0, 512, 1024)
        raw.take(1024)
        assert EINVAL == raw.ask(0, 1, 512)
        assert raw.hung_up()
        raw.close()
        for command, offset, length in ((0, 0, 100), (3, 0, 0), (7, 0, 512), (0, SIZE, 512)):
            raw = begun()
            assert EINVAL == raw.ask(command, offset, length)
            assert raw.hung_up()
            raw.close()
        simulator.do("trouble", bad=[["", 0, 1]])
        raw = begun()
        with pytest.raises(EOFError):
            raw.ask(0, 0, 512)
        raw.close()
        simulator.do("expire")
        raw = Raw(address, port)
        with pytest.raises(EOFError):
            raw.export(name)
        raw.close()


def test_the_seventeenth_connection(tmp_path: Path) -> None:
    with pool(tmp_path, insecure_nbd=True) as simulator:
        add_vm(simulator, "root")
        address, port, _ = nbd_of(simulator, Xml(simulator).log_in())
        held = [Raw(address, port) for _ in range(16)]
        with pytest.raises((EOFError, ConnectionError)):
            Raw(address, port)
        for raw in held:
            raw.close()


def test_nothing_before_tls(tmp_path: Path) -> None:
    with pool(tmp_path) as simulator:
        add_vm(simulator, "root")
        address, port, name = nbd_of(simulator, Xml(simulator).log_in())
        raw = Raw(address, port)
        assert TLS_REQD == raw.option(3)
        with pytest.raises(EOFError):
            raw.export(name)
        raw.close()
        raw = Raw(address, port)
        assert 1 == raw.option(5)
        raw.sock = trusting().wrap_socket(raw.sock)
        assert POLICY == raw.option(3)
        assert (SIZE, 3) == raw.export(name)
        raw.close()


def test_libnbd_reads_it(tmp_path: Path) -> None:
    need("nbdcopy")
    with pool(tmp_path, insecure_nbd=True) as simulator:
        (disk,) = add_vm(simulator, "root")
        simulator.write(disk, 0, random.Random(1).randbytes(SIZE))
        address, port, name = nbd_of(simulator, Xml(simulator).log_in())
        uri = f"nbd://{address}:{port}/{name.replace('?', '%3F')}"
        target = tmp_path / "out"
        options = ["--connections=1", "--request-size=65536"]
        subprocess.run(["nbdcopy", *options, uri, str(target)], check=True, timeout=60)
        assert simulator.content(disk) == target.read_bytes()


@pytest.mark.parametrize("kind", ["vhd", "qcow2"])
@pytest.mark.parametrize("size", [SIZE, 512, 4 << 20, (33 << 20) + 65_536])
def test_qemu_img_reads_the_streams(kind: str, size: int, tmp_path: Path) -> None:
    need("qemu-img")
    chance = random.Random(size)
    data = bytearray(size)
    for _ in range(5):
        at = chance.randrange(size)
        piece = chance.randbytes(min(3000, size - at))
        data[at : at + len(piece)] = piece
    stream = export_stream(bytes(data), kind, "2d5a3d4e-0000-4000-8000-000000000000", None)
    (tmp_path / "s").write_bytes(stream)
    (tmp_path / "raw").write_bytes(data)
    known = "driver=vpc,force_size_calc=current_size" if kind == "vhd" else "driver=qcow2"
    options = ["--image-opts", f"{known},file.filename={tmp_path}/s"]
    raw = f"driver=raw,file.filename={tmp_path}/raw"
    compared = subprocess.run(
        ["qemu-img", "compare", *options, raw],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    if kind == "qcow2":
        checked = ["qemu-img", "check", "-q", str(tmp_path / "s")]
        subprocess.run(checked, check=True, timeout=60)


def test_export_by_basic_authentication(tmp_path: Path) -> None:
    with pool(tmp_path) as simulator:
        (disk,) = add_vm(simulator, "root")
        base = f"https://{simulator.address}/export_raw_vdi?vdi={disk}&format=raw"
        request = urllib.request.Request(base)
        with pytest.raises(urllib.error.HTTPError, match="401") as caught:
            urllib.request.urlopen(request, context=trusting(), timeout=30)
        caught.value.close()
        request.add_header("Authorization", "Basic cm9vdDpzZWNyZXQ=")  # root:secret
        with urllib.request.urlopen(request, context=trusting(), timeout=30) as answer:
            assert simulator.content(disk) == answer.read()
