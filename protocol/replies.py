"""What a server answers, in the dialect that was agreed on.

::

    simple      | header:16 | data (READ without error)
    structured  | header:20 | payload | header:20 | payload | ...  until DONE
    extended    | header:32 | payload | ...                        until DONE

The hot replies (data of a plain READ, success of a WRITE) are packed in place by whoever owns
the buffer, with the Structs of ``headers``; everything rarer is built here as bytes.
"""

import errno as os_errno
from collections.abc import Iterable
from struct import Struct

from protocol.constants import (
    MAX_STATUS_EXTENTS,
    SIMPLE_REPLY_MAGIC,
    Dialect,
    Errno,
    ReplyFlag,
    ReplyType,
)
from protocol.extents import ExtentList
from protocol.handshake.options import truncate_text
from protocol.headers import (
    EXTENDED_HEADER,
    SIMPLE_REPLY,
    STRUCTURED_HEADER,
    chunk_key,
    extended_chunk_key,
)

__all__ = ["ChunkEncoder", "SimpleEncoder", "encoder", "wire_errno"]

_OFFSET = Struct(">Q")
_HOLE = Struct(">QI")
_ERROR = Struct(">IH")
_DONE = int(ReplyFlag.DONE)

_MAPPED = {
    os_errno.EPERM: Errno.EPERM,
    os_errno.EACCES: Errno.EPERM,
    os_errno.EROFS: Errno.EPERM,
    os_errno.EIO: Errno.EIO,
    os_errno.ENOMEM: Errno.ENOMEM,
    os_errno.ENOSPC: Errno.ENOSPC,
    os_errno.EDQUOT: Errno.ENOSPC,
    os_errno.EFBIG: Errno.ENOSPC,
    os_errno.EOVERFLOW: Errno.EOVERFLOW,
    os_errno.EOPNOTSUPP: Errno.ENOTSUP,
    os_errno.ESHUTDOWN: Errno.ESHUTDOWN,
}
# Another server that our bytes come from, or the way there. The specification says EINVAL of what
# it does not list, but a request is not at fault if a cable is.
_MAPPED |= dict.fromkeys(
    (
        os_errno.ECONNREFUSED,
        os_errno.ECONNRESET,
        os_errno.ECONNABORTED,
        os_errno.EPIPE,
        os_errno.ENOTCONN,
        os_errno.ETIMEDOUT,
        os_errno.EHOSTUNREACH,
        os_errno.EHOSTDOWN,
        os_errno.ENETUNREACH,
        os_errno.ENETDOWN,
        os_errno.ESTALE,
        os_errno.EPROTO,
    ),
    Errno.EIO,
)


def wire_errno(number: int | None) -> Errno:
    """An operating system errno as the wire knows it.

    What the specification does not list becomes EINVAL; an error without a number is EIO, and so is
    one of the network.
    """
    if number is None:
        return Errno.EIO
    return _MAPPED.get(number, Errno.EINVAL)


class SimpleEncoder:
    """16-byte replies: an error number and nothing else."""

    def done(self, cookie: int, at: int) -> bytes:
        """Success."""
        del at
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(
        self, cookie: int, at: int, errno: Errno, text: str = "", *, offset: int | None = None
    ) -> bytes:
        """Failure; there is no room for a text or an offset."""
        del at, text, offset
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, errno, cookie)

    def data_header(self, cookie: int, at: int, offset: int, length: int, *, done: bool) -> bytes:
        """What precedes ``length`` bytes of data: they are promised from here on."""
        del at, offset, length, done
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)


class ChunkEncoder:
    """Structured and extended replies."""

    def __init__(self, *, extended: bool) -> None:
        self._extended = extended

    def _header(self, cookie: int, at: int, kind: int, flags: int, length: int) -> bytes:
        if self._extended:
            return EXTENDED_HEADER.pack(extended_chunk_key(kind, flags), cookie, at, length)
        return STRUCTURED_HEADER.pack(chunk_key(kind, flags), cookie, length)

    def done(self, cookie: int, at: int) -> bytes:
        """NBD_REPLY_TYPE_NONE with DONE."""
        return self._header(cookie, at, ReplyType.NONE, _DONE, 0)

    def error(
        self, cookie: int, at: int, errno: Errno, text: str = "", *, offset: int | None = None
    ) -> bytes:
        """NBD_REPLY_TYPE_ERROR, or ERROR_OFFSET where a place is known, with DONE."""
        encoded = truncate_text(text)
        payload = _ERROR.pack(errno, len(encoded)) + encoded
        kind = ReplyType.ERROR
        if offset is not None:
            kind = ReplyType.ERROR_OFFSET
            payload += _OFFSET.pack(offset)
        return self._header(cookie, at, kind, _DONE, len(payload)) + payload

    def data_header(self, cookie: int, at: int, offset: int, length: int, *, done: bool) -> bytes:
        """What precedes ``length`` bytes of data: they are promised from here on."""
        flags = _DONE if done else 0
        head = self._header(cookie, at, ReplyType.OFFSET_DATA, flags, length + 8)
        return head + _OFFSET.pack(offset)

    def hole(self, cookie: int, at: int, offset: int, length: int, *, done: bool) -> bytes:
        """``length`` zero bytes (below 4 GiB) without sending them."""
        flags = _DONE if done else 0
        payload = _HOLE.pack(offset, length)
        return self._header(cookie, at, ReplyType.OFFSET_HOLE, flags, len(payload)) + payload

    def status(
        self, cookie: int, at: int, statuses: Iterable[tuple[int, ExtentList]]
    ) -> list[bytes]:
        """One chunk per (context id, extents); the last one carries DONE."""
        payloads = [self._status_payload(context, extents) for context, extents in statuses]
        kind = ReplyType.BLOCK_STATUS_EXT if self._extended else ReplyType.BLOCK_STATUS
        out = []
        for index, payload in enumerate(payloads, start=1):
            flags = _DONE if index == len(payloads) else 0
            out.append(self._header(cookie, at, kind, flags, len(payload)) + payload)
        return out

    def _status_payload(self, context: int, extents: ExtentList) -> bytes:
        words: list[int] = []
        for extent in extents:
            if len(words) >= 2 * MAX_STATUS_EXTENTS:
                break
            words += (extent.length, extent.flags)
        count = len(words) // 2
        if self._extended:
            return Struct(f">II{len(words)}Q").pack(context, count, *words)
        return Struct(f">I{len(words)}I").pack(context, *words)


def encoder(dialect: Dialect) -> SimpleEncoder | ChunkEncoder:
    """The encoder of a dialect."""
    if dialect is Dialect.SIMPLE:
        return SimpleEncoder()
    return ChunkEncoder(extended=dialect is Dialect.EXTENDED)
