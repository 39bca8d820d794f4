"""A pool that is not as one would like it: slaves, dead sessions, no NBD, bad sectors, no trust."""

import asyncio
import logging
import random
import socket
import threading
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from conformance.xapi.simulator import Simulator
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError
from nbdsrv.source import xapi_nbd, xapi_snapshots
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.xapi import XapiVm
from nbdsrv.source.xapi_place import access_of, parse_place
from nbdsrv.source.xapi_session import XapiSession
from protocol.extents import DATA, HOLE
from tests.disk.check_disk import check_disk
from tests.source.xapi_pool import SIZE, Copy, add_vm, frozen_at, pool, read_all, vm_of


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xapi_snapshots, "BUSY_PAUSE_S", 0.02)


def filled(simulator: Simulator, *names: str, size: int = SIZE) -> list[str]:
    disks = add_vm(simulator, *(names or ("root",)), size=size)
    for seed, disk in enumerate(disks):
        simulator.write(disk, 0, random.Random(seed).randbytes(size // 2))
    return disks


# --- sessions -------------------------------------------------------------------------------------


async def test_a_slave_sends_us_to_its_master(tmp_path: Path, workers: Workers) -> None:
    with pool(tmp_path, hosts=2) as simulator:
        (disk,) = filled(simulator)
        copy = Copy()
        await copy.take(vm_of(simulator, workers, host=1), workers)
        assert simulator.content(disk) == copy.content


async def test_a_session_that_dies_is_no_end(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New connections need a name with a living session in it."""
    monkeypatch.setattr(xapi_nbd, "PATIENCE", xapi_nbd.Patience(reconnect_s=0.2))
    with pool(tmp_path) as simulator:
        (disk,) = filled(simulator)
        async with frozen_at(vm_of(simulator, workers), {}) as frozen:
            found = frozen.disks[0]
            assert found.open is not None
            async with found.open(workers, ()) as opened:
                buffer = bytearray(SIZE)
                await opened.read_into(0, memoryview(buffer)[: 1 << 20])
                simulator.do("expire")
                nbd = opened._inside._inside
                for client in list(nbd._links):
                    client._channel.shut_down()
                await opened.read_into(0, memoryview(buffer))
            assert simulator.content(disk) == bytes(buffer)
            assert 2 == simulator.do("state")["logins"]
            await frozen.succeed()
        assert 0 == simulator.do("state")["sessions"]


async def test_no_secret_is_told(
    tmp_path: Path, workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pool(tmp_path) as simulator:
        filled(simulator)
        place = parse_place(f"xapi://root@{simulator.address}#web")
        wrong = access_of({**simulator.environment, "NBDSRV_XAPI_PASSWORD": "hunter2"})
        with pytest.raises(SourceError, match="SESSION_AUTHENTICATION_FAILED") as caught:
            await XapiVm(place, wrong, workers).vm()
        told = [str(caught.value), repr(wrong)]
        simulator.do("trouble", bad=[["", 0, 512]])
        access = access_of(simulator.environment)
        async with XapiSession(place, access) as session:
            secret = session.ref
            simulator.do("expire")
            with pytest.raises(SourceError, match="SESSION_INVALID") as caught:
                await session._ask("VM.get_all", [secret])
            told.append(str(caught.value))
        async with frozen_at(vm_of(simulator, workers), {}) as frozen:
            with pytest.raises(DiskError) as bad:
                await read_all(frozen.disks[0], workers)
            session_of_names = frozen._session.ref
            opener = frozen.disks[0].open
            assert opener is not None
            async with opener(workers, ()) as opened:
                told += [str(opened.facts), opened.name, repr(frozen.disks[0])]
        told += [str(bad.value), caplog.text]
        for text in told:
            assert "hunter2" not in text
            assert secret not in text
            assert session_of_names not in text


async def test_nobody_answers(workers: Workers) -> None:
    access = access_of({"NBDSRV_XAPI_PASSWORD": "secret"})
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SourceError, match=rf"127.0.0.1:{port}: Connection refused$"):
        await XapiVm(parse_place(f"xapi://root@127.0.0.1:{port}#web"), access, workers).vm()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=_speak_plainly, args=(server,), daemon=True).start()
        with pytest.raises(SourceError, match=rf"{port}: TLS: wrong version number; is that a"):
            await XapiVm(parse_place(f"xapi://root@127.0.0.1:{port}#web"), access, workers).vm()


def _speak_plainly(server: socket.socket) -> None:
    sock, _ = server.accept()
    with sock:
        sock.recv(1)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


# --- trust ----------------------------------------------------------------------------------------


async def test_certificates_are_checked_before_a_password_leaves(
    tmp_path: Path, workers: Workers
) -> None:
    with pool(tmp_path) as simulator:
        filled(simulator)
        place = parse_place(f"xapi://root@{simulator.address}#web")
        password = {"NBDSRV_XAPI_PASSWORD": "secret"}
        with pytest.raises(SourceError, match=r"its certificate: self.signed.*FINGERPRINT"):
            await XapiVm(place, access_of(password), workers).vm()
        other = access_of({**password, "NBDSRV_XAPI_FINGERPRINT": "ab" * 32})
        with pytest.raises(SourceError, match="is none of NBDSRV_XAPI_FINGERPRINT"):
            await XapiVm(place, other, workers).vm()
        authority = access_of({**password, "NBDSRV_XAPI_CA": simulator.certificates[0]})
        assert "web" == await XapiVm(place, authority, workers).vm()
        assert 1 == simulator.do("state")["logins"]


async def test_nbd_in_plain_text_only_where_asked_for(tmp_path: Path, workers: Workers) -> None:
    with pool(tmp_path, insecure_nbd=True) as simulator:
        (disk,) = filled(simulator)
        place = parse_place(f"xapi://root@{simulator.address}#web")
        async with frozen_at(vm_of(simulator, workers), {}) as frozen:
            content, _ = await read_all(frozen.disks[0], workers)
            assert simulator.content(disk) == content
            assert "export of vhd" == frozen.disks[0].facts["transport"]
            assert {} == simulator.do("state")["served"]
        plain = access_of({**simulator.environment, "NBDSRV_XAPI_PLAIN_NBD": "1"})
        async with frozen_at(XapiVm(place, plain, workers), {}) as frozen:
            content, _ = await read_all(frozen.disks[0], workers)
            assert simulator.content(disk) == content
            assert "nbd" == frozen.disks[0].facts["transport"]


# --- without NBD ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vhd", "qcow2"])
async def test_the_export_stream_where_there_is_no_nbd(
    kind: str, tmp_path: Path, workers: Workers
) -> None:
    with pool(tmp_path, hosts=2) as simulator:
        (disk,) = filled(simulator)
        simulator.do("trouble", nbd=False, redirect=[simulator.addresses[0]])
        simulator.do("sm_config", vdi=disk, key="image-format", value=kind)
        vm, copy = vm_of(simulator, workers), Copy()
        found = await copy.take(vm, workers)
        assert f"export of {kind}" == found.facts["transport"]
        assert "purpose nbd" in found.facts["transport_reason"]
        assert simulator.content(disk) == copy.content
        simulator.write(disk, SIZE - 700, bytes(600))
        found = await copy.take(vm, workers)
        assert found.since
        assert simulator.content(disk) == copy.content


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ({"export_error": True}, "failed there: HTTP/1.1 500 Internal Error"),
        ({"export_cut": 3_000_000}, "ended too soon, after 3000000 bytes"),
        ({"export_cut": 100}, "ended too soon, after 100 bytes"),
    ],
)
async def test_exports_that_fail(
    trouble: dict[str, object], reason: str, tmp_path: Path, workers: Workers
) -> None:
    with pool(tmp_path) as simulator:
        filled(simulator)
        simulator.do("trouble", nbd=False, **trouble)
        async with frozen_at(vm_of(simulator, workers), {}) as frozen:
            with pytest.raises(SourceError, match=f"purpose nbd; nor exported: .*{reason}"):
                await read_all(frozen.disks[0], workers)
        assert simulator.do("state")["tasks"] == 0


async def test_a_redirection_to_anything_but_https_is_not_followed(
    tmp_path: Path, workers: Workers
) -> None:
    with pool(tmp_path) as simulator:
        filled(simulator)
        trouble = {"redirect": simulator.addresses, "location": "http://127.0.0.1/export_raw_vdi"}
        simulator.do("trouble", nbd=False, **trouble)
        async with frozen_at(vm_of(simulator, workers), {}) as frozen:
            with pytest.raises(SourceError, match=r"redirects to http://127\.0\.0\.1, not https"):
                await read_all(frozen.disks[0], workers)


# --- NBD ------------------------------------------------------------------------------------------


async def test_a_bad_sector_costs_itself_alone(tmp_path: Path, workers: Workers) -> None:
    with pool(tmp_path) as simulator:
        (disk,) = filled(simulator)
        simulator.do("trouble", bad=[["", 700_000, 100]])
        sector = 700_000 // 512 * 512
        async with frozen_at(vm_of(simulator, workers), {}) as frozen:
            found = frozen.disks[0]
            assert found.open is not None
            async with found.open(workers, ()) as opened:
                buffer = bytearray(1 << 20)
                with pytest.raises(DiskError) as caught:
                    await opened.read_into(0, memoryview(buffer))
                assert sector == caught.value.offset
                golden = simulator.content(disk)
                assert golden[:sector] == bytes(buffer[:sector])
                await opened.read_into(sector + 512, memoryview(buffer))
                assert golden[sector + 512 : sector + 512 + len(buffer)] == bytes(buffer)


async def test_connections_of_all_disks_stay_below_the_hosts_cap(
    tmp_path: Path, workers: Workers
) -> None:
    with pool(tmp_path) as simulator:
        names = [f"disk{number}" for number in range(14)]
        disks = filled(simulator, *names, size=1 << 20)
        async with frozen_at(vm_of(simulator, workers), {}) as frozen:
            assert 14 == len(frozen.disks)
            full, opened = asyncio.Event(), 0

            async def one(index: int) -> None:
                nonlocal opened
                opener = frozen.disks[index].open
                assert opener is not None
                async with opener(workers, ()) as disk:
                    opened += 1
                    if opened == xapi_nbd.HOST_CONNECTIONS:
                        full.set()
                    await full.wait()
                    content = bytearray(disk.size)
                    await disk.read_into(0, memoryview(content))
                assert simulator.content(disks[index]) == bytes(content)

            await asyncio.gather(*(one(index) for index in range(14)))
            assert {"nbd"} == {disk.facts["transport"] for disk in frozen.disks}
        assert xapi_nbd.HOST_CONNECTIONS == simulator.do("state")["most_connections"]


async def test_another_host_where_one_has_no_connection_left(
    tmp_path: Path, workers: Workers
) -> None:
    with pool(tmp_path, hosts=2) as simulator:
        (disk,) = filled(simulator)
        simulator.do("stop_nbd", host=0)
        async with frozen_at(vm_of(simulator, workers), {}) as frozen:
            content, _ = await read_all(frozen.disks[0], workers)
            assert simulator.content(disk) == content
            assert "nbd" == frozen.disks[0].facts["transport"]


async def test_the_stream_where_others_have_all_connections(
    tmp_path: Path, workers: Workers
) -> None:
    with pool(tmp_path, hosts=2) as simulator:
        (disk,) = filled(simulator)
        simulator.do("trouble", cap=0)
        async with frozen_at(vm_of(simulator, workers), {}) as frozen:
            content, _ = await read_all(frozen.disks[0], workers)
            assert simulator.content(disk) == content
            assert "no host serves it" in frozen.disks[0].facts["transport_reason"]


# --- what is given --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("xapi://host#vm", "expected xapi://USER@HOST#VM"),
        ("xapi://root@host", "expected"),
        ("xapi://root@host#", "expected"),
        ("xapi://root@host#/xvda", "no VM before the slash"),
        ("xapi://root:pw@host#vm", "a password does not belong into a SOURCE"),
        ("xapi://root@host:99999#vm", "port 99999"),
    ],
)
def test_places_that_are_none(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        parse_place(text)
    assert "pw" not in str(caught.value).replace("pw@", "")


def test_places() -> None:
    place = parse_place("xapi://back%40up@pool.example:8443#my%2Fvm/xvdb")
    assert ("back@up", "pool.example", 8443) == (place.user, place.host, place.port)
    assert ("my/vm", "xvdb") == (place.vm, place.disk)
    assert "fd00::1" == parse_place("xapi://root@[fd00::1]#web").host


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "set NBDSRV_XAPI_PASSWORD"),
        ({"NBDSRV_XAPI_PASSWORD_FILE": "/nowhere"}, "NBDSRV_XAPI_PASSWORD_FILE /nowhere"),
        ({"NBDSRV_XAPI_PASSWORD": "x", "NBDSRV_XAPI_CA": "/nowhere"}, "NBDSRV_XAPI_CA /nowhere"),
        ({"NBDSRV_XAPI_PASSWORD": "x", "NBDSRV_XAPI_FINGERPRINT": "12:34"}, "'1234' is no SHA-256"),
    ],
)
def test_access_that_is_none(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        access_of(environment)


# --- what is read ---------------------------------------------------------------------------------


async def test_a_full_backup_reads_only_what_is_allocated(tmp_path: Path, workers: Workers) -> None:
    with pool(tmp_path) as simulator:
        (disk,) = add_vm(simulator, "root", size=(20 << 20) + 512)
        simulator.write(disk, (5 << 20) + 100, b"lonely")
        simulator.write(disk, 20 << 20, b"the last")
        async with frozen_at(vm_of(simulator, workers), {}) as frozen:
            opener = frozen.disks[0].open
            assert opener is not None
            async with opener(workers, ()) as opened:
                found = await opened.extents(0, opened.size)
        m = 1 << 20
        expected = [(4 * m, HOLE), (2 * m, DATA), (14 * m, HOLE), (512, DATA)]
        assert expected == [(extent.length, extent.flags) for extent in found]


@pytest.mark.parametrize("nbd", [True, False], ids=["nbd", "export"])
async def test_the_contract_of_a_disk(nbd: bool, tmp_path: Path, workers: Workers) -> None:
    with pool(tmp_path) as simulator:
        (disk,) = filled(simulator, size=(5 << 20) + 512)
        simulator.do("trouble", nbd=nbd)
        golden = simulator.content(disk)
        async with frozen_at(vm_of(simulator, workers), {}) as frozen, AsyncExitStack() as stack:

            async def open_disk() -> Disk:
                opener = frozen.disks[0].open
                assert opener is not None
                return await stack.enter_async_context(opener(workers, ()))

            await check_disk(open_disk, golden)
