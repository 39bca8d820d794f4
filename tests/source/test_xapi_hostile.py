"""Hosts that answer with anything but XAPI: one clear line, bounded, and never a traceback."""

import asyncio
import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from authority import Certificates

from nbdsrv.source import xapi_http, xapi_session
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.xapi_http import HttpServer, exchange
from nbdsrv.source.xapi_place import Access, XapiPlace, access_of, parse_place
from nbdsrv.source.xapi_records import find_vm, read_vdi
from nbdsrv.source.xapi_session import XapiSession

Answerer = Callable[[bytes], bytes]


@asynccontextmanager
async def answering(
    certificates: Certificates, answer: Answerer, linger_s: float = 0.0
) -> AsyncIterator[tuple[XapiPlace, Access]]:
    """A TLS server that reads one request and says ``answer(body)``, then hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            writer.write(answer(await reader.readexactly(length)))
            await writer.drain()
            await asyncio.sleep(linger_s)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server.certificate, certificates.server.key)
    der = ssl.PEM_cert_to_DER_cert(certificates.server.certificate.read_text())
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    environment = {
        "NBDSRV_XAPI_PASSWORD": "secret",
        "NBDSRV_XAPI_FINGERPRINT": hashlib.sha256(der).hexdigest(),
    }
    try:
        yield parse_place(f"xapi://root@127.0.0.1:{port}#web"), access_of(environment)
    finally:
        server.close()
        await server.wait_closed()


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def result(value: object) -> bytes:
    return ok(json.dumps({"jsonrpc": "2.0", "id": 1, "result": value}).encode())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "no HTTP answer"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP answer"),
        (b"HTTP/1.1 abc\r\n\r\n", "no HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (2 << 20) + b"\r\n\r\n", "no HTTP answer"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "HTTP status 404; is that a XAPI"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", "ends too soon"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}", "garbled"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 400 + b"\r\n\r\n", "garbled"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "garbled"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "too soon"),
        (ok(b"<html>"), "is no JSON"),
        (ok(b"[" * 100_000), "is no JSON"),
        (ok(b"[1]"), "is no JSON-RPC"),
        (ok(b"{}"), "is no JSON-RPC"),
        (result(None), "answered NoneType where a text was expected"),
        (ok(b" " * 5000), "longer than 4096 bytes"),
    ],
)
async def test_answers_that_are_none(
    answer: bytes,
    reason: str,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "longer" in reason:
        monkeypatch.setattr(xapi_session, "MAX_ANSWER", 4096)
    async with answering(certificates, lambda _: answer) as (place, access):
        with pytest.raises(SourceError, match=reason) as caught:
            async with XapiSession(place, access):
                pass
        assert "secret" not in str(caught.value)


async def test_chunks_and_bodies_without_a_length(certificates: Certificates) -> None:
    bodies = [
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\n\r\n",
        b"\r\nabcdefg",
        b"Content-Length: 7\r\n\r\nabcdefg and more",
    ]
    for body in bodies:
        said = b"HTTP/1.1 200 OK\r\n" + body
        async with answering(certificates, lambda _, said=said: said) as (place, access):
            server = HttpServer(place.host, place.port, access)
            async with exchange(server, "GET", "/") as answer:
                assert b"abcdefg" == await answer.whole(100)


async def test_hosts_that_send_us_round_in_circles(certificates: Certificates) -> None:
    error = {"code": 1, "message": "HOST_IS_SLAVE", "data": ["127.0.0.1"]}
    said = ok(json.dumps({"jsonrpc": "2.0", "id": 1, "error": error}).encode())
    async with answering(certificates, lambda _: said) as (place, access):
        with pytest.raises(SourceError, match="send us from one to the other"):
            async with XapiSession(place, access):
                pass


@pytest.mark.parametrize("address", ["", "a b", "host/../x", "x" * 300])
async def test_masters_that_cannot_be(address: str, certificates: Certificates) -> None:
    error = {"code": 1, "message": "HOST_IS_SLAVE", "data": [address]}
    said = ok(json.dumps({"jsonrpc": "2.0", "id": 1, "error": error}).encode())
    async with answering(certificates, lambda _: said) as (place, access):
        with pytest.raises(SourceError, match="is no master and names none"):
            async with XapiSession(place, access):
                pass


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        {"uuid": 5, "name_label": "x"},
        {"uuid": "u", "name_label": "x", "snapshot_of": "", "virtual_size": -1},
        {"uuid": "u", "name_label": "x", "snapshot_of": "", "virtual_size": 1 << 70},
        {"uuid": "u", "name_label": "x", "snapshot_of": "", "virtual_size": "9" * 500},
    ],
)
async def test_records_that_are_none(record: object, certificates: Certificates) -> None:
    def answer(body: bytes) -> bytes:
        method = json.loads(body)["method"]
        return result("OpaqueRef:x" if method.startswith("session") else record)

    async with answering(certificates, answer) as (place, access), XapiSession(place, access) as s:
        with pytest.raises(SourceError):
            await read_vdi(s, "OpaqueRef:vdi")


async def test_a_thousand_attachments_are_too_many(certificates: Certificates) -> None:
    from nbdsrv.source.xapi_records import live_disks

    vm = {"uuid": "u", "name_label": "web", "VBDs": ["OpaqueRef:b"] * 1000}

    def answer(body: bytes) -> bytes:
        method = json.loads(body)["method"]
        values = {"VM.get_by_name_label": ["OpaqueRef:vm"], "VM.get_record": vm}
        return result(values.get(method, "OpaqueRef:x"))

    async with answering(certificates, answer) as (place, access), XapiSession(place, access) as s:
        found = await find_vm(s, "web")
        with pytest.raises(SourceError, match="a VM with 1000 disks"):
            await live_disks(s, found)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<value>" + "<a>" * 10, "is no value"),
        ("<!DOCTYPE x [<!ENTITY a 'b'>]><value>&a;</value>", "is no value"),
        ("<value>OpaqueRef:1</value>", ""),
        ("plain", ""),
    ],
)
async def test_results_of_tasks(text: str, reason: str, certificates: Certificates) -> None:
    def answer(body: bytes) -> bytes:
        method = json.loads(body)["method"]
        return result({"task.get_status": "success", "task.get_result": text}.get(method, "ref"))

    async with answering(certificates, answer) as (place, access), XapiSession(place, access) as s:
        if reason:
            with pytest.raises(SourceError, match=reason):
                await s.task("VM.snapshot", "x", "y")
        else:
            expected = text.removeprefix("<value>").removesuffix("</value>")
            assert expected == await s.task("VM.snapshot", "x", "y")


async def test_tasks_that_never_end(certificates: Certificates) -> None:
    def answer(body: bytes) -> bytes:
        del body
        return result("pending")

    async with answering(certificates, answer) as (place, access), XapiSession(place, access) as s:
        with pytest.raises(SourceError, match=r"VDI\.destroy: not done within"):
            await s.task("VDI.destroy", "x", within_s=0.2)


async def test_a_body_that_stops_coming(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xapi_http, "STALL_S", 0.1)
    said = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc"
    async with answering(certificates, lambda _: said, linger_s=1.0) as (place, access):
        server = HttpServer(place.host, place.port, access)
        async with exchange(server, "GET", "/") as answer:
            with pytest.raises(SourceError, match=r"nothing came for 0\.1 s"):
                await answer.whole(1000)


async def test_nobody_there(certificates: Certificates) -> None:
    async with answering(certificates, lambda _: b"") as (place, access):
        pass
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:\d+: .*[Cc]onnect"):
        async with XapiSession(place, access):
            pass
