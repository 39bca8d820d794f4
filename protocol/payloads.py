"""The payload of one reply chunk: its length judged first, then its contents.

::

    NONE              -
    OFFSET_DATA       offset:8 data
    OFFSET_HOLE       offset:8 length:4
    BLOCK_STATUS      context:4 (length:4 flags:4)+
    BLOCK_STATUS_EXT  context:4 count:4 (length:8 flags:8)+
    ERROR             error:4 text:2+n
    ERROR_OFFSET      error:4 text:2+n offset:8
    any with bit 15   error:4 text:2+n, and what nobody knows yet

Source: proto.md, "Structured reply types" (ext-header branch). The Structs here are proven
equal to ``structs`` by tests/protocol/test_connection.py.

Rule: all of it comes from a peer that may be hostile; whatever is wrong is a
RemoteProtocolError.
"""

from struct import Struct

from protocol.answers import Failed, Status
from protocol.constants import (
    MAX_STATUS_EXTENTS,
    MAX_STRING,
    Command,
    CommandFlag,
    Dialect,
    Errno,
    ReplyType,
)
from protocol.errors import RemoteProtocolError
from protocol.inflight import Inflight
from protocol.wording import displayed

__all__ = ["Frame", "check_length", "error", "hole", "is_error", "status", "status_ext"]

Frame = bytearray | memoryview

OFFSET = Struct(">Q")
HOLE = Struct(">QI")
STATUS = Struct(">I")
STATUS_EXTENT = Struct(">II")
STATUS_EXT = Struct(">II")
STATUS_EXT_EXTENT = Struct(">QQ")
ERROR = Struct(">IH")

ERROR_BIT = 1 << 15
MAX_ERROR_CHUNK = ERROR.size + MAX_STRING + 4096
"""Bytes in an error chunk: the longest text, and room for the fields of types to come."""

ERRNOS = {int(errno): errno for errno in Errno}
KINDS = {int(kind): kind for kind in ReplyType}

COMMANDS = {
    ReplyType.OFFSET_DATA: Command.READ,
    ReplyType.OFFSET_HOLE: Command.READ,
    ReplyType.BLOCK_STATUS: Command.BLOCK_STATUS,
    ReplyType.BLOCK_STATUS_EXT: Command.BLOCK_STATUS,
}
DIALECTS = {
    ReplyType.BLOCK_STATUS: Dialect.STRUCTURED,
    ReplyType.BLOCK_STATUS_EXT: Dialect.EXTENDED,
}


def is_error(kind: int) -> bool:
    """Whether a chunk type, known or not, reports an error."""
    return bool(kind & ERROR_BIT)


def check_length(kind: int, length: int, request: Inflight, dialect: Dialect) -> None:
    """Judge a chunk by its header: may it answer this request, may it be that long?"""
    if kind == ReplyType.OFFSET_DATA and request.command is Command.READ:
        if not OFFSET.size < length <= OFFSET.size + request.length:
            raise invalid(f"chunk OFFSET_DATA of {length} bytes", request)
        return
    if is_error(kind):
        least = ERROR.size + (OFFSET.size if kind == ReplyType.ERROR_OFFSET else 0)
        need(least <= length <= MAX_ERROR_CHUNK, f"error chunk of {length} bytes", request)
        return
    known = KINDS.get(kind)
    if known is None:
        raise invalid(f"chunk of unknown type {kind}", request)
    what = f"chunk {known.name} of {length} bytes"
    need(COMMANDS.get(known, request.command) is request.command, what, request)
    need(DIALECTS.get(known, dialect) is dialect, f"{what} after {dialect.name}", request)
    match known:
        case ReplyType.OFFSET_HOLE:
            fits = length == HOLE.size
        case ReplyType.BLOCK_STATUS:
            fits = extents_fit(length - STATUS.size, STATUS_EXTENT.size, request)
        case ReplyType.BLOCK_STATUS_EXT:
            fits = extents_fit(length - STATUS_EXT.size, STATUS_EXT_EXTENT.size, request)
        case _:
            fits = length == 0
    need(fits, what, request)


def extents_fit(length: int, each: int, request: Inflight) -> bool:
    """All extents but the last end before the request does, and none is empty."""
    count, rest = divmod(length, each)
    limit = 1 if request.flags & CommandFlag.REQ_ONE else request.length
    return rest == 0 and 1 <= count <= min(limit, MAX_STATUS_EXTENTS)


def data_offset(frame: Frame) -> int:
    """Where the data of an OFFSET_DATA chunk belongs."""
    offset: int = OFFSET.unpack(frame)[0]
    return offset


def hole(frame: Frame) -> tuple[int, int]:
    """Offset and length of an OFFSET_HOLE chunk."""
    offset, length = HOLE.unpack(frame)
    return offset, length


def status(frame: Frame, request: Inflight, export_size: int) -> Status:
    """Decode BLOCK_STATUS."""
    (context,) = STATUS.unpack(frame[: STATUS.size])
    extents = list(STATUS_EXTENT.iter_unpack(frame[STATUS.size :]))
    return checked_status(context, extents, request, export_size)


def status_ext(frame: Frame, request: Inflight, export_size: int) -> Status:
    """Decode BLOCK_STATUS_EXT."""
    context, count = STATUS_EXT.unpack(frame[: STATUS_EXT.size])
    extents = list(STATUS_EXT_EXTENT.iter_unpack(frame[STATUS_EXT.size :]))
    need(count == len(extents), f"{len(extents)} extents announced as {count}", request)
    return checked_status(context, extents, request, export_size)


def checked_status(
    context: int, extents: list[tuple[int, int]], request: Inflight, export_size: int
) -> Status:
    request.answer_context(context)
    need(all(length for length, _ in extents), "empty extent", request)
    before_last = sum(length for length, _ in extents[:-1])
    need(before_last < request.length, "extent behind the request's end", request)
    if request.flags & CommandFlag.REQ_ONE:
        need(extents[0][0] <= request.length, "extent longer than REQ_ONE allows", request)
    clip(extents, export_size - request.offset - before_last)
    return Status(request.cookie, context, tuple(extents))


def clip(extents: list[tuple[int, int]], room: int) -> None:
    """End the last extent where the export ends.

    The specification lets it reach beyond the request, and servers that round an odd image up
    to whole sectors (qemu-nbd 7.2) may let it reach beyond the export.
    """
    length, flags = extents[-1]
    if length > room:
        extents[-1] = (room, flags)


def error(kind: int, frame: Frame, request: Inflight) -> Failed:
    """Decode an error chunk, of a known type or not."""
    number, text_length = ERROR.unpack(frame[: ERROR.size])
    end = ERROR.size + text_length
    placed = kind == ReplyType.ERROR_OFFSET
    fits = end + (OFFSET.size if placed else 0) <= len(frame) and text_length <= MAX_STRING
    need(fits, f"error chunk of {len(frame)} bytes with a text of {text_length}", request)
    need(number or kind not in KINDS, "error chunk without an error", request)
    offset = None
    if placed and request.command is not Command.FLUSH:
        (offset,) = OFFSET.unpack(frame[end : end + OFFSET.size])
    return failed(number, displayed(bytes(frame[ERROR.size : end])), offset, request)


def failed(number: int, text: str, offset: int | None, request: Inflight) -> Failed:
    """A failure whose error number is one of those the wire knows.

    "The client SHOULD treat an unexpected error value as if it had been NBD_EINVAL."
    """
    return Failed(request.cookie, ERRNOS.get(number) or Errno.EINVAL, text, offset)


def need(condition: object, what: str, request: Inflight) -> None:
    if not condition:
        raise invalid(what, request)


def invalid(what: str, request: Inflight) -> RemoteProtocolError:
    return RemoteProtocolError(f"server sent an invalid answer to {request}: {what}")
