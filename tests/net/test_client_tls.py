"""Our client over TLS: who is trusted, who is not, and that nothing is sent in plain text."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from authority import Certificates

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError
from nbdsrv.net.client_connect import Patience
from nbdsrv.net.client_tls import Credentials
from nbdsrv.source.nbd import open_nbd
from nbdsrv.source.nbd_contexts import offered_contexts
from tests.disk.check_disk import check_disk
from tests.disk.reading import content
from tests.disk.threads import running_workers
from tests.formats.images import Image
from tests.net.in_process import running
from tests.source.peers import listening, misbehaving, unix_uri

IMAGE = Image("1MiB+3", (1 << 20) + 3, ((0, 65536), (300_000, 70_000), ((1 << 20) - 4096, 4099)))


@pytest_asyncio.fixture
async def workers():
    async with running_workers() as started:
        yield started


@pytest.fixture
def golden(tmp_path: Path) -> bytes:
    return IMAGE.make(str(tmp_path / "disk"))


@pytest.fixture
def ours(certificates: Certificates) -> Credentials:
    return Credentials(str(certificates.ca))


async def refused(uri: str, workers: Workers, credentials: Credentials | None = None) -> str:
    with pytest.raises(DiskError) as raised:
        await open_nbd(uri, workers, credentials=credentials, patience=Patience(connect_s=5))
    assert "\n" not in str(raised.value)
    return str(raised.value)


async def test_the_contract_over_our_own_server(
    golden: bytes, tmp_path: Path, certificates: Certificates, ours: Credentials, workers: Workers
) -> None:
    sock = tmp_path / "sock"
    uri = unix_uri(sock, "disk", "nbds+unix")

    async def open_disk() -> Disk:
        return await open_nbd(uri, workers, writable=True, credentials=ours)

    async with running(sock, tmp_path / "disk", writable=True, certificates=certificates):
        await check_disk(open_disk, golden)


@contextmanager
def nbdkit_directory(folder: Path, certificates: Certificates) -> Iterator[str]:
    """The certificates under the names nbdkit and libnbd look for."""
    folder.mkdir()
    names = {
        "ca-cert.pem": certificates.ca,
        "server-cert.pem": certificates.server.certificate,
        "server-key.pem": certificates.server.key,
        "client-cert.pem": certificates.client.certificate,
        "client-key.pem": certificates.client.key,
    }
    for name, path in names.items():
        shutil.copy(path, folder / name)
    yield str(folder)


async def test_the_contract_over_nbdkit_which_wants_our_certificate(
    golden: bytes, tmp_path: Path, certificates: Certificates, ours: Credentials, workers: Workers
) -> None:
    sock = tmp_path / "sock"
    uri = unix_uri(sock, "", "nbds+unix")
    with nbdkit_directory(tmp_path / "pki", certificates) as folder:
        credentials = Credentials.in_directory(folder)

        async def open_disk() -> Disk:
            return await open_nbd(uri, workers, writable=True, credentials=credentials)

        tls = ["--tls=require", "--tls-verify-peer", f"--tls-certificates={folder}"]
        with listening(sock, "nbdkit", "-f", *tls, "file", str(tmp_path / "disk")):
            await check_disk(open_disk, golden)
            disk = await open_disk()
            assert disk.facts["tls"] is True
            await disk.close()


async def test_certificates_come_by_the_environment_and_not_by_the_uri(
    golden: bytes,
    tmp_path: Path,
    certificates: Certificates,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sock = tmp_path / "sock"
    uri = unix_uri(sock, "", "nbds+unix")
    with nbdkit_directory(tmp_path / "pki", certificates) as folder:
        tls = ["--tls=require", "--tls-verify-peer", f"--tls-certificates={folder}"]
        with listening(sock, "nbdkit", "-f", *tls, "file", str(tmp_path / "disk")):
            assert "NBDSRV_TLS_CERTIFICATES names a directory" in await refused(uri, workers)
            # Over TLS 1.3 such a server only hangs up; whichever way that is noticed.
            nameless = Credentials(str(certificates.ca))
            text = await refused(uri, workers, nameless)
            assert "if it wants a certificate of ours, NBDSRV_TLS_CERTIFICATES" in text
            assert "_ssl.c" not in text
            with pytest.raises(ConfigError, match="set NBDSRV_TLS_CERTIFICATES"):
                await open_nbd(f"{uri}&tls-certificates={folder}", workers)
            monkeypatch.setenv("NBDSRV_TLS_CERTIFICATES", folder)
            disk = await open_nbd(uri, workers)
            assert await content(disk, 0, disk.size) == golden
            await disk.close()
            assert "base:allocation" in await offered_contexts(uri, workers)
            monkeypatch.setenv("NBDSRV_TLS_CERTIFICATES", str(tmp_path))
            with pytest.raises(ConfigError, match=r"NBDSRV_TLS_CERTIFICATES: .*ca-cert\.pem"):
                await open_nbd(uri, workers)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tls-hostname": "elsewhere.example"}, "hostname mismatch"),
        ({"tls-hostname": "127.0.0.2"}, "ip address mismatch"),
    ],
)
async def test_a_certificate_for_somebody_else_is_refused(
    more: dict[str, str],
    reason: str,
    golden: bytes,
    tmp_path: Path,
    certificates: Certificates,
    ours: Credentials,
    workers: Workers,
) -> None:
    sock = tmp_path / "sock"
    async with running(sock, tmp_path / "disk", certificates=certificates):
        text = await refused(unix_uri(sock, "disk", "nbds+unix", **more), workers, ours)
        assert reason in text.lower()
        good = unix_uri(sock, "disk", "nbds+unix", **{"tls-hostname": "127.0.0.1"})
        disk = await open_nbd(good, workers, credentials=ours)
        assert await content(disk, 0, len(golden)) == golden
        await disk.close()


async def test_an_unknown_authority_is_refused_unless_told_otherwise(
    golden: bytes, tmp_path: Path, certificates: Certificates, workers: Workers
) -> None:
    sock = tmp_path / "sock"
    async with running(sock, tmp_path / "disk", certificates=certificates):
        uri = unix_uri(sock, "disk", "nbds+unix")
        assert "certificate" in await refused(uri, workers)
        careless = unix_uri(sock, "disk", "nbds+unix", **{"tls-verify-peer": "0"})
        disk = await open_nbd(careless, workers)
        assert await content(disk, 0, 100) == golden[:100]
        await disk.close()


async def test_a_server_without_tls_gets_no_plain_text(
    golden: bytes, tmp_path: Path, ours: Credentials, workers: Workers
) -> None:
    sock = tmp_path / "sock"
    async with running(sock, tmp_path / "disk"):
        text = await refused(unix_uri(sock, "disk", "nbds+unix"), workers, ours)
        assert "STARTTLS" in text


async def test_a_server_that_demands_tls_says_so(
    golden: bytes, tmp_path: Path, certificates: Certificates, workers: Workers
) -> None:
    sock = tmp_path / "sock"
    async with running(sock, tmp_path / "disk", certificates=certificates):
        assert "use nbds://" in await refused(unix_uri(sock, "disk"), workers)


async def test_plain_text_behind_the_consent_to_tls_is_refused(
    tmp_path: Path, ours: Credentials, workers: Workers
) -> None:
    async def talk(conversation):
        await conversation.greet()
        option, _ = await conversation.option()
        conversation.reply(option, 1)
        conversation.writer.write(b"\0" * 20)
        assert await conversation.reader.read() == b"", "something was sent behind it"

    sock = tmp_path / "sock"
    async with misbehaving(sock, talk):
        text = await refused(unix_uri(sock, "", "nbds+unix"), workers, ours)
        assert "plain text" in text or "TLS" in text


@pytest.mark.parametrize("reply", [2**31 + 1, 2**31 + 77, 2])
async def test_tls_is_not_talked_down(
    reply: int, tmp_path: Path, ours: Credentials, workers: Workers
) -> None:
    async def talk(conversation):
        await conversation.greet()
        option, _ = await conversation.option()
        conversation.reply(option, reply)
        option = (await conversation.reader.read(16))[12:13]
        assert option in {b"", b"\0"}  # gone, or ABORT's header: 2 in the next four bytes

    sock = tmp_path / "sock"
    async with misbehaving(sock, talk):
        await refused(unix_uri(sock, "", "nbds+unix"), workers, ours)


async def test_silence_during_the_tls_handshake_has_an_end(
    tmp_path: Path, ours: Credentials, workers: Workers
) -> None:
    async def talk(conversation):
        await conversation.greet()
        option, _ = await conversation.option()
        conversation.reply(option, 1)
        await conversation.reader.read()

    sock = tmp_path / "sock"
    async with misbehaving(sock, talk):
        uri, patience = unix_uri(sock, "", "nbds+unix"), Patience(connect_s=0.2)
        with pytest.raises(DiskError) as raised:
            await open_nbd(uri, workers, credentials=ours, patience=patience)
        assert raised.value.errno == errno.ETIMEDOUT


async def test_credentials_that_cannot_be_used(
    tmp_path: Path, certificates: Certificates, workers: Workers
) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    pair = certificates.client
    for credentials in (
        Credentials("/nowhere.pem"),
        Credentials(str(empty)),
        Credentials(None, str(empty)),
        Credentials(None, "/nowhere.pem", str(pair.key)),
        Credentials(None, str(pair.certificate), str(certificates.stranger.key)),
    ):
        with pytest.raises(ConfigError):
            await open_nbd("nbds://localhost:1/", workers, credentials=credentials)
    with pytest.raises(ConfigError, match="tls-type=psk"):
        await open_nbd("nbds://localhost:1/?tls-type=psk", workers)
    with pytest.raises(ConfigError, match=r"ca-cert\.pem"):
        Credentials.in_directory(str(tmp_path))
