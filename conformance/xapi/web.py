"""A host's HTTPS: the API, and disks as streams.

* ``GET /export_raw_vdi``: 302 to a host that sees the disk; once the 200 is out an error can only
  come as a whole HTTP response within the body.
* ``PUT /import_raw_vdi``: Content-Length is demanded; what came of it is only in the task.
"""

import base64
import ssl
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from conformance.xapi.calls import Calls
from conformance.xapi.pool import Host, Pool, XapiFailure
from conformance.xapi.rpc import answer_json, answer_xml
from conformance.xapi.streams import export_stream, import_stream

__all__ = ["Web"]

MAX_BODY = 64 << 20
PIECE = 256 << 10
IDLE_S = 60.0
TROUBLE_INSIDE = b"HTTP/1.1 500 Internal Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Web(ThreadingHTTPServer):
    """Of one host. Threads; ends with the process."""

    daemon_threads = True

    def __init__(self, pool: Pool, host: Host, port: int) -> None:
        super().__init__((host.address, port), _Handler)
        self.pool = pool
        self.host = host
        self.calls = Calls(pool, host)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(f"{host.key}.crt", host.key)
        self.socket = context.wrap_socket(
            self.socket, server_side=True, do_handshake_on_connect=False
        )
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def shutdown_request(self, request: Any) -> None:
        """Say that the stream is whole, as stunnel in front of XAPI does, then close."""
        with suppress(OSError, ValueError):
            request.settimeout(1.0)
            request.unwrap()
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left, or does not trust us, is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    server: Web

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Quiet."""

    def do_POST(self) -> None:
        """The API."""
        length = int(self.headers.get("Content-Length", "0"))
        if not 0 < length <= MAX_BODY:
            self._answer(411, b"")
            return
        body = self.rfile.read(length)
        if urlsplit(self.path).path == "/jsonrpc":
            self._answer(200, answer_json(self.server.calls, body), "application/json")
        else:
            self._answer(200, answer_xml(self.server.calls, body), "text/xml")

    def _answer(self, status: int, body: bytes, kind: str = "text/plain", **more: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", kind)
        for key, value in more.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    # --- streams -----------------------------------------------------------------------------

    def _query(self) -> dict[str, str]:
        return {key: each[-1] for key, each in parse_qs(urlsplit(self.path).query).items()}

    def _allowed(self, query: dict[str, str]) -> bool:
        pool = self.server.pool
        if query.get("session_id") in pool.sessions:
            return True
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        wanted = base64.b64encode(f"{pool.user}:{pool.password}".encode()).decode()
        return scheme.lower() == "basic" and given == wanted

    def do_GET(self) -> None:
        """Export a disk."""
        url, query, pool = urlsplit(self.path), self._query(), self.server.pool
        if url.path != "/export_raw_vdi":
            self._answer(404, b"")
            return
        if not self._allowed(query):
            self._answer(401, b"")
            return
        if self.server.host.address in pool.trouble.redirect:
            others = (
                host.address for host in pool.hosts if host.address not in pool.trouble.redirect
            )
            where = f"https://{next(others, '')}:{pool.web_port}{url.path}?{urlencode(query)}"
            where = pool.trouble.location or where
            self._answer(302, b"", Location=where)
            return
        task = query.get("task_id", "")
        try:
            stream = self._stream(query)
        except XapiFailure as failure:
            self._finish(task, failure.words)
            self._begin_stream()
            self.wfile.write(TROUBLE_INSIDE)
            return
        self._begin_stream()
        for at in range(0, len(stream), PIECE):
            self.wfile.write(stream[at : at + PIECE])
        self._finish(task, [])

    def _begin_stream(self) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Connection", "close")
        self.end_headers()

    def _stream(self, query: dict[str, str]) -> bytes:
        pool = self.server.pool
        with pool.lock:
            if pool.trouble.export_error:
                raise XapiFailure("INTERNAL_ERROR", "vhd-tool failed")
            vdi = pool.vdi_by_uuid(query.get("vdi", ""))
            base = None
            if "base" in query:
                older = pool.vdi_by_uuid(query["base"])
                if older.data is None:
                    raise XapiFailure("VDI_INCOMPATIBLE_TYPE", older.ref, "cbt_metadata")
                base = (bytes(older.data), older.uuid)
            if vdi.data is None:
                raise XapiFailure("VDI_INCOMPATIBLE_TYPE", vdi.ref, "cbt_metadata")
            data = bytes(vdi.data)
        stream = export_stream(data, query.get("format", "raw"), vdi.uuid, base)
        return stream[: pool.trouble.export_cut or len(stream)]

    def do_PUT(self) -> None:
        """Import a disk."""
        url, query, pool = urlsplit(self.path), self._query(), self.server.pool
        length = self.headers.get("Content-Length")
        if url.path != "/import_raw_vdi":
            self._answer(404, b"")
        elif not self._allowed(query):
            self._answer(401, b"")
        elif length is None or not length.isdigit() or int(length) > MAX_BODY:
            self._answer(411, b"")
        elif pool.trouble.import_status:
            self.close_connection = True
            self._answer(pool.trouble.import_status, b"")
        else:
            task = query.get("task_id", "")
            time.sleep(pool.trouble.import_stall_s)
            stream = self.rfile.read(int(length))
            try:
                with pool.lock:
                    if pool.trouble.import_error:
                        raise XapiFailure("VDI_IO_ERROR", "Device I/O errors")
                    vdi = pool.vdi_by_uuid(query.get("vdi", ""))
                    size = int(vdi.record["virtual_size"])
                    vdi.data = bytearray(import_stream(stream, query.get("format", "raw"), size))
                self._finish(task, [])
            except XapiFailure as failure:
                self._finish(task, failure.words)
            except ValueError as error:
                self._finish(task, ["VDI_IO_ERROR", str(error)])
            self._answer(200, b"")

    def _finish(self, task: str, error: list[str]) -> None:
        with self.server.pool.lock:
            record = self.server.pool.tables["task"].get(task)
            if record is not None:
                status = "failure" if error else "success"
                record.update(status=status, progress=1.0, error_info=error)
