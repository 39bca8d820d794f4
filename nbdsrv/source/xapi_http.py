"""HTTP/1.1 over TLS, as little as XAPI needs: one request on a connection, then it is closed.

::

    async with exchange(server, "POST", "/jsonrpc", body=...) as answer:
        answer.status  answer.headers  await answer.whole(limit)  async for part in answer.parts()

Rule: nothing is sent before the server's certificate has been accepted, for what is sent first is a
password. Every answer is bounded by whoever asks.
"""

import asyncio
import hashlib
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.xapi_place import Access
from nbdsrv.source.xapi_stream import TlsStream

__all__ = ["Answer", "HttpServer", "exchange"]

MAX_HEAD = 64 << 10
"""Bytes of a status line and headers."""
PART = 1 << 20
"""Bytes of a body handed on at a time."""
CONNECT_S = 20.0
"""Seconds until a connection is secure."""
STALL_S = 300.0
"""Seconds in which at least something of a body must move."""


@dataclass(frozen=True, slots=True)
class HttpServer:
    """A host of the pool."""

    host: str
    port: int
    access: Access

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.host}:{self.port}"


class Answer:
    """A status, headers in lower case, and a body that has not been read yet."""

    def __init__(
        self, name: str, status: int, headers: Mapping[str, str], stream: TlsStream
    ) -> None:
        self.status = status
        self.headers = headers
        self._name = name
        self._stream = stream

    async def whole(self, limit: int) -> bytes:
        """The body.

        Raises:
            SourceError: it is longer than ``limit`` bytes, or ended too soon.
        """
        found = bytearray()
        async for part in self.parts():
            found += part
            if len(found) > limit:
                raise SourceError(f"{self._name}: the answer is longer than {limit} bytes")
        return bytes(found)

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes, by its length, in chunks, or until the end of the connection.

        Raises:
            SourceError: it ended before its length.
        """
        try:
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                async for part in self._chunks():
                    yield part
            elif "content-length" in self.headers:
                async for part in self._exactly(_number(self.headers["content-length"], 10)):
                    yield part
            else:
                while part := await self._some(PART):
                    yield part
        except TimeoutError:
            raise SourceError(f"{self._name}: nothing came for {STALL_S:g} s") from None
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            raise SourceError(f"{self._name}: the answer ends too soon, or is garbled") from error

    async def _some(self, limit: int) -> bytes:
        async with asyncio.timeout(STALL_S):
            return await self._stream.read(limit)

    async def _exactly(self, length: int) -> AsyncIterator[bytes]:
        while length:
            part = await self._some(min(length, PART))
            if not part:
                raise asyncio.IncompleteReadError(b"", length)
            length -= len(part)
            yield part

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            async with asyncio.timeout(STALL_S):
                line = await self._stream.readuntil(b"\n", MAX_HEAD)
            length = _number(line.split(b";")[0].strip().decode("ascii"), 16)
            if not length:
                return
            async for part in self._exactly(length):
                yield part
            await self._stream.readexactly(2)


def _number(text: str, base: int) -> int:
    if not text.isalnum() or len(text) > 16:
        raise ValueError(text)
    return int(text, base)


@asynccontextmanager
async def exchange(
    server: HttpServer,
    method: str,
    target: str,
    *,
    body: bytes | AsyncIterator[bytes] = b"",
    length: int | None = None,
    answer_s: float = 60.0,
) -> AsyncIterator[Answer]:
    """One request and its answer.

    Args:
        server: whom to ask.
        method: GET, POST or PUT.
        target: path and query, encoded.
        body: what is sent; an iterator needs ``length``.
        length: bytes of the body.
        answer_s: seconds until the answer's headers must be there, from the end of the request.

    Raises:
        SourceError: no connection, a certificate that is not trusted, or no HTTP.
    """
    stream = await _connect(server)
    try:
        count = len(body) if isinstance(body, bytes) else length or 0
        kind = "application/json" if method == "POST" else "application/octet-stream"
        head = (
            f"{method} {target} HTTP/1.1\r\nHost: {server.host}\r\nUser-Agent: nbdsrv\r\n"
            f"Accept: */*\r\nContent-Type: {kind}\r\nContent-Length: {count}\r\n"
            "Connection: close\r\n\r\n"
        )
        try:
            async with asyncio.timeout(STALL_S):
                await stream.write(head.encode("ascii"))
            if isinstance(body, bytes):
                async with asyncio.timeout(STALL_S):
                    await stream.write(body)
            else:
                async for part in body:
                    async with asyncio.timeout(STALL_S):
                        await stream.write(part)
            async with asyncio.timeout(answer_s):
                answer = await _head(server, stream)
        except TimeoutError:
            raise SourceError(f"{server.name}: no answer, or nothing is taken there") from None
        except OSError as error:
            raise SourceError(f"{server.name}: the connection broke: {error}") from error
        try:
            yield answer
        except OSError as error:
            raise SourceError(f"{server.name}: the connection broke: {error}") from error
    finally:
        stream.close()


async def _connect(server: HttpServer) -> TlsStream:
    try:
        async with asyncio.timeout(CONNECT_S):
            stream = await TlsStream.connect(server.host, server.port, server.access.context)
    except TimeoutError:
        raise SourceError(f"{server.name}: no connection within {CONNECT_S:g} s") from None
    except ssl.SSLCertVerificationError as error:
        hint = "set NBDSRV_XAPI_CA, or NBDSRV_XAPI_FINGERPRINT for one that signed itself"
        raise SourceError(
            f"{server.name}: its certificate: {error.verify_message}; {hint}"
        ) from error
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
        raise SourceError(f"{server.name}: TLS: {reason}; is that a XAPI host?") from error
    except OSError as error:
        # asyncio's own text for a refusal is a call and a tuple.
        number = error.errno or 0
        known = os.strerror(number) if number > 0 else error.strerror
        raise SourceError(f"{server.name}: {known or error}") from error
    if server.access.fingerprints:
        digest = hashlib.sha256(stream.certificate).hexdigest()
        if digest not in server.access.fingerprints:
            stream.close()
            text = "is none of NBDSRV_XAPI_FINGERPRINT; is that host the one you mean?"
            raise SourceError(f"{server.name}: its certificate has SHA-256 {digest}, which {text}")
    return stream


async def _head(server: HttpServer, stream: TlsStream) -> Answer:
    try:
        head = await stream.readuntil(b"\r\n\r\n", MAX_HEAD)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise SourceError(f"{server.name}: no HTTP answer") from error
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ", 2)
    if len(head) > MAX_HEAD or len(words) < 2 or not words[0].startswith("HTTP/1."):
        raise SourceError(f"{server.name}: no HTTP answer")
    headers = {}
    for line in filter(None, lines[1:]):
        key, _, value = line.partition(":")
        headers[key.strip().lower()] = value.strip()
    if not (words[1].isdigit() and len(words[1]) == 3):
        raise SourceError(f"{server.name}: no HTTP answer")
    return Answer(server.name, int(words[1]), headers, stream)
