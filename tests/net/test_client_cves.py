"""What has gone wrong in other people's NBD clients, row by row, does not in ours.

============================= =========================================================
CVE-2017-2630 (qemu)          a hostile LIST: tests/protocol/test_client_handshake.py,
                              ``test_what_a_server_must_not_put_in_its_list``
CVE-2019-14842 (libnbd)       TLS required and talked down
libnbd 2019 (no number)       chunks outside the reader's buffer, or twice
CVE-2021-20286 (libnbd)       the server's death in every state
CVE-2022-0485 (nbdcopy)       errors of a copy ignored
CVE-2023-5215 (libnbd)        sizes of 2**63 and more
CVE-2023-5871 (libnbd)        block status flags of any value
CVE-2024-7383 (libnbd)        certificates not checked
CVE-2025-14946 (libnbd)       hosts that are options
============================= =========================================================
"""

import asyncio
import datetime as dt
import ipaddress
import itertools
import json
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import pytest_asyncio
from authority import Certificates
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError
from nbdsrv.net.client_connect import Patience
from nbdsrv.net.client_tls import Credentials
from nbdsrv.source.nbd import open_nbd
from protocol.constants import Info, Option, Reply, ReplyType
from tests.disk.threads import running_workers
from tests.source.peers import FLAGS, Conversation, listening, misbehaving, unix_uri

HASTY = Patience(connect_s=2, request_s=2, reconnect_s=0.2)
SIZE = 1 << 20


@pytest_asyncio.fixture
async def workers():
    async with running_workers() as started:
        yield started


@pytest.fixture
def sock(tmp_path: Path) -> Path:
    return tmp_path / "sock"


async def failure(work) -> DiskError:
    async with asyncio.timeout(20):
        with pytest.raises(DiskError) as raised:
            await work
    assert "\n" not in str(raised.value)
    return raised.value


# --- CVE-2019-14842 ----------------------------------------------------------------------------


@pytest.mark.parametrize("reply", [Reply.ERR_UNSUP, Reply.ERR_POLICY, 2**31 + 99])
async def test_2019_14842_tls_is_required(reply: int, sock: Path, workers: Workers) -> None:
    seen: list[int] = []

    async def talk(conversation: Conversation) -> None:
        await conversation.greet()
        while True:
            option, _ = await conversation.option()
            seen.append(option)
            conversation.reply(option, reply)

    async with misbehaving(sock, talk):
        await failure(open_nbd(unix_uri(sock, "", "nbds+unix"), workers, patience=HASTY))
    assert set(seen) <= {Option.STARTTLS, Option.ABORT}


# --- libnbd 2019: RCE by a chunk outside of the buffer -----------------------------------------


def chunks(*spans: tuple[int, int]):
    async def talk(conversation: Conversation) -> None:
        await conversation.agree(SIZE)
        while (request := await conversation.request()).type != 2:
            for offset, length in spans:
                payload = struct.pack(">Q", request.offset + offset & (2**64 - 1)) + b"X" * length
                conversation.chunk(request.cookie, ReplyType.OFFSET_DATA, payload, done=False)
            conversation.chunk(request.cookie, ReplyType.NONE)

    return talk


@pytest.mark.parametrize(
    "spans",
    [
        ((4096, 1),),
        ((-1, 2),),
        ((0, 4097),),
        ((0, 4096), (0, 1)),
        ((0, 2048), (2047, 2049)),
        ((2**63, 10),),
        ((0, 4095),),
    ],
    ids=str,
)
async def test_libnbd_2019_chunks_stay_within_the_buffer(
    spans: Sequence[tuple[int, int]], sock: Path, workers: Workers
) -> None:
    guard = bytearray(b"\xa5") * 12_288
    async with misbehaving(sock, chunks(*spans)):
        disk = await open_nbd(unix_uri(sock), workers, patience=HASTY, connections=1)
        await failure(disk.read_into(65_536, memoryview(guard)[4096:8192]))
        await disk.close()
    assert guard[:4096] == guard[8192:] == b"\xa5" * 4096


# --- CVE-2021-20286 ----------------------------------------------------------------------------


@pytest.mark.parametrize("answers", range(6))
async def test_2021_20286_a_server_that_dies_in_every_state(
    answers: int, sock: Path, workers: Workers
) -> None:
    async def talk(conversation: Conversation) -> None:
        if not answers:
            return
        await conversation.greet()
        for _ in range(answers - 1):
            option, _ = await conversation.option()
            if option == Option.GO:
                conversation.reply(option, Reply.INFO, bytes([0, 3, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0]))
            elif option != Option.EXPORT_NAME:
                conversation.reply(option, Reply.ERR_UNSUP)

    async with misbehaving(sock, talk):
        await failure(open_nbd(unix_uri(sock), workers, patience=HASTY))


# --- CVE-2022-0485 -----------------------------------------------------------------------------


async def test_2022_0485_a_copy_that_could_not_read_says_so(sock: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(range(256)) * 4096)
    trouble = ["--filter=error", "file", str(tmp_path / "disk"), "error-pread-rate=100%"]
    with listening(sock, "nbdkit", "-f", "-r", *trouble):
        for target in ("null:", str(tmp_path / "copy")):
            command = [sys.executable, "-m", "nbdsrv", "copy", "--json", unix_uri(sock), target]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
            assert done.returncode == 1, done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert "at byte 0 of the disk" in done.stderr
            assert not done.stdout
    assert not (tmp_path / "copy").exists()


# --- CVE-2023-5215, CVE-2023-5871 --------------------------------------------------------------


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 2**63 + 512])
async def test_2023_5215_sizes_that_would_be_negative(
    size: int, sock: Path, workers: Workers
) -> None:
    async def talk(conversation: Conversation) -> None:
        await conversation.agree(size)
        await conversation.reader.read()

    async with misbehaving(sock, talk):
        error = await failure(open_nbd(unix_uri(sock), workers, patience=HASTY))
        assert str(size) in str(error)


async def test_2023_5215_the_largest_size_there_is(sock: Path, workers: Workers) -> None:
    async def talk(conversation: Conversation) -> None:
        await conversation.agree(2**63 - 1)
        await conversation.reader.read()

    async with misbehaving(sock, talk):
        disk = await open_nbd(unix_uri(sock), workers, patience=HASTY)
        assert disk.size == 2**63 - 1
        await failure(disk.read_into(2**63 - 1, memoryview(bytearray(1))))
        await failure(disk.read_into(2**70, memoryview(bytearray(1))))
        await disk.close()


async def test_2023_5871_status_flags_of_any_value(sock: Path, workers: Workers) -> None:
    """64 bits of flags need extended headers; whatever they are, they are a map or an error."""
    flags = itertools.cycle([2**32 - 1, 2**64 - 1, 2**63, 0])

    async def talk(conversation: Conversation) -> None:
        await conversation.greet()
        while True:
            option, _ = await conversation.option()
            if option == Option.SET_META_CONTEXT:
                meta = (7).to_bytes(4, "big") + b"base:allocation"
                conversation.reply(option, Reply.META_CONTEXT, meta)
            elif option == Option.GO:
                info = Info.EXPORT.to_bytes(2, "big") + SIZE.to_bytes(8, "big")
                conversation.reply(option, Reply.INFO, info + int(FLAGS).to_bytes(2, "big"))
                conversation.reply(option, Reply.ACK)
                break
            conversation.reply(option, Reply.ACK)
        while True:
            header = await conversation.reader.readexactly(32)
            _, _, kind, cookie, offset, length = struct.unpack(">IHHQQQ", header)
            if kind == 2:
                return
            payload = struct.pack(">IIQQ", 7, 1, length, next(flags))
            reply = struct.pack(">IHHQQQ", 0x6E8A278C, 1, 6, cookie, offset, len(payload))
            conversation.writer.write(reply + payload)

    async with misbehaving(sock, talk):
        disk = await open_nbd(unix_uri(sock), workers, patience=HASTY, connections=1)
        for _ in range(4):
            try:
                extents = await disk.extents(0, SIZE)
            except DiskError:
                break
            assert extents.end == SIZE
        await disk.close()


# --- CVE-2024-7383 -----------------------------------------------------------------------------


class Forger:
    """Certificates that are wrong in one way each, signed by a CA that is trusted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = name("forger")
        self.ca = folder / "forger-ca.pem"
        self.ca.write_bytes(pem(self.certificate("forger", self.key, ca=True)))

    def certificate(
        self,
        common_name: str,
        key: ec.EllipticCurvePrivateKey,
        *,
        ca: bool = False,
        days: int = 1,
        names: x509.SubjectAlternativeName | None = None,
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(common_name) if common_name else x509.Name([]))
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=10))
            .not_valid_after(now + dt.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def directory(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> str:
        """As nbdkit wants it."""
        folder = self.folder / "pki"
        folder.mkdir()
        (folder / "ca-cert.pem").write_bytes(self.ca.read_bytes())
        (folder / "server-cert.pem").write_bytes(pem(certificate))
        form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        secret = key.private_bytes(serialization.Encoding.PEM, form, none)
        (folder / "server-key.pem").write_bytes(secret)
        return str(folder)


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


LOCAL = x509.SubjectAlternativeName(
    [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
)
ELSEWHERE = x509.SubjectAlternativeName([x509.DNSName("elsewhere.example")])


@pytest.mark.parametrize(
    ("common_name", "days", "names", "good"),
    [
        ("localhost", 1, LOCAL, True),
        ("", 1, LOCAL, True),  # no common name, but alternative ones
        ("localhost", -1, LOCAL, False),  # expired
        ("localhost", 1, ELSEWHERE, False),  # for somebody else
        ("localhost", 1, None, True),  # libvirt's older instructions make such ones
        ("elsewhere", 1, None, False),
        ("", 1, None, False),  # no name at all
    ],
    ids=["good", "no-cn", "expired", "elsewhere", "cn-only", "cn-elsewhere", "nameless"],
)
async def test_2024_7383_certificates_are_checked_on_unix_sockets_too(
    common_name: str,
    days: int,
    names: x509.SubjectAlternativeName | None,
    good: bool,
    sock: Path,
    tmp_path: Path,
    workers: Workers,
) -> None:
    forger = Forger(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())
    folder = forger.directory(forger.certificate(common_name, key, days=days, names=names), key)
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    tls = ["--tls=require", f"--tls-certificates={folder}"]
    with listening(sock, "nbdkit", "-f", "-r", *tls, "file", str(tmp_path / "disk")):
        credentials = Credentials(str(forger.ca))
        work = open_nbd(
            unix_uri(sock, "", "nbds+unix"), workers, credentials=credentials, patience=HASTY
        )
        if good:
            await (await work).close()
        else:
            assert "TLS" in str(await failure(work))


async def test_2024_7383_an_unknown_authority(
    sock: Path, tmp_path: Path, workers: Workers, certificates: Certificates
) -> None:
    forger = Forger(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())
    folder = forger.directory(forger.certificate("localhost", key, names=LOCAL), key)
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    tls = ["--tls=require", f"--tls-certificates={folder}"]
    uri = unix_uri(sock, "", "nbds+unix")
    with listening(sock, "nbdkit", "-f", "-r", *tls, "file", str(tmp_path / "disk")):
        for credentials in (Credentials(str(certificates.ca)), Credentials()):
            work = open_nbd(uri, workers, credentials=credentials, patience=HASTY)
            assert "certificate" in str(await failure(work))


async def test_the_exact_certificate_and_no_other(
    sock: Path, tmp_path: Path, workers: Workers
) -> None:
    """As XAPI hands it out: no authority, no name, no date; but these bytes."""
    forger = Forger(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())
    wanted = forger.certificate("xcp", key, days=-1)
    twin = forger.certificate("xcp", key, days=-1)  # the same key even
    folder = forger.directory(wanted, key)
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    tls = ["--tls=require", f"--tls-certificates={folder}"]
    uri = unix_uri(sock, "", "nbds+unix")
    careless = unix_uri(sock, "", "nbds+unix", **{"tls-verify-peer": "0"})
    good, bad = pem(wanted).decode(), pem(twin).decode()
    with listening(sock, "nbdkit", "-f", "-r", *tls, "file", str(tmp_path / "disk")):
        for text in (good, "some words\n" + bad + good):
            credentials = Credentials.of({"exact": text, "hostname": "xcp", "ca": ""})
            disk = await open_nbd(uri, workers, credentials=credentials, patience=HASTY)
            assert disk.facts["tls"] is True
            await disk.close()
        for where in (uri, careless):
            work = open_nbd(where, workers, credentials=Credentials(exact=bad), patience=HASTY)
            assert "not the one it should be" in str(await failure(work))
    for text in ("", "not PEM", good.replace("M", "?", 1), good[:200] + good[300:]):
        with pytest.raises((ConfigError, DiskError)):
            await open_nbd(uri, workers, credentials=Credentials(exact=text), patience=HASTY)
    with pytest.raises(ConfigError, match="certificate is none of"):
        Credentials.of({"certificate": "x"})


# --- CVE-2025-14946 ----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "-", "--help"])
async def test_2025_14946_hosts_are_no_options(host: str, workers: Workers) -> None:
    for scheme in ("nbd", "nbds", "nbd+ssh"):
        with pytest.raises((ConfigError, DiskError)) as raised:
            await open_nbd(f"{scheme}://{host}/x", workers, patience=HASTY)
        assert json.dumps(str(raised.value))
