"""One option reply, as a client reads it: framed, bounded and decoded.

::

    magic:8 option:4 reply:4 length:4 data
                       |
                       1 ACK      -
                       2 SERVER   name:4+n description
                       3 INFO     type:2 EXPORT size:8 flags:2 | NAME | DESCRIPTION text
                       |                 BLOCK_SIZE min:4 preferred:4 max:4 | unknown: ignored
                       4 CONTEXT  id:4 name
                  2^31+n error    text

Source: proto.md, "Option reply types".

Rule: everything here comes from a peer that may be hostile. Whatever is wrong with it is a
RemoteProtocolError; nothing is allocated on the strength of a length that has not been bounded.
"""

from dataclasses import dataclass
from typing import Any

from construct import ConstructError

from protocol.constants import (
    MAX_OPTION_LENGTH,
    MAX_STRING,
    Info,
    Option,
    Reply,
)
from protocol.errors import Refused, RemoteProtocolError
from protocol.handshake.wants import Export
from protocol.structs import (
    InfoBlockSize,
    InfoExport,
    InfoText,
    InfoType,
    MetaContextReply,
    OptionReplyHeader,
    ServerReply,
)
from protocol.terms import MAX_SIZE, BlockSizes
from protocol.wording import displayed

__all__ = [
    "HEADER_SIZE",
    "Context",
    "ExportTerms",
    "Header",
    "InfoItem",
    "Text",
    "context",
    "export_size",
    "header",
    "info",
    "is_error",
    "refusal",
    "server",
]

HEADER_SIZE = 20

MAX_REPLY_LENGTH = MAX_OPTION_LENGTH
"""Bytes of data in one option reply. The longest legal one a client understands, SERVER with
two 4096-byte strings, is far shorter; the rest is room for information types to come."""

ERROR_BIT = 1 << 31


@dataclass(frozen=True, slots=True)
class Header:
    """An option reply's header, its echo checked, its length bounded."""

    reply: int
    length: int


@dataclass(frozen=True, slots=True)
class ExportTerms:
    """NBD_INFO_EXPORT: bytes in the export, raw transmission flags."""

    size: int
    flags: int


@dataclass(frozen=True, slots=True)
class Text:
    """NBD_INFO_NAME or NBD_INFO_DESCRIPTION."""

    info: Info
    text: str


@dataclass(frozen=True, slots=True)
class Context:
    """NBD_REP_META_CONTEXT."""

    id: int
    name: str


InfoItem = ExportTerms | Text | BlockSizes | None


def header(data: bytes, asked: Option) -> Header:
    """Decode a reply header; it must answer ``asked``."""
    fields = parsed(OptionReplyHeader, data, f"option reply to {asked.name}")
    if fields.option != asked:
        raise RemoteProtocolError(f"reply to option {fields.option} when {asked.name} was asked")
    if fields.length > MAX_REPLY_LENGTH:
        raise RemoteProtocolError(
            f"option reply to {asked.name}: {fields.length} bytes, the limit is {MAX_REPLY_LENGTH}"
        )
    return Header(fields.reply, fields.length)


def is_error(reply: int) -> bool:
    """Whether a reply type, known or not, says no."""
    return bool(reply & ERROR_BIT)


def refusal(asked: Option, reply: int, data: bytes) -> Refused:
    """Decode an error reply."""
    if len(data) > MAX_STRING:
        raise RemoteProtocolError(f"error text of {len(data)} bytes, the limit is {MAX_STRING}")
    code = Reply(reply) if reply in {int(known) for known in Reply} else reply
    return Refused(asked, code, displayed(data))


def server(data: bytes) -> Export:
    """Decode SERVER."""
    fields = parsed(ServerReply, data, "SERVER")
    return Export(
        strict(fields.name.data, "export name"),
        displayed(bounded(fields.description, "export description")),
    )


def context(data: bytes) -> Context:
    """Decode META_CONTEXT."""
    fields = parsed(MetaContextReply, data, "META_CONTEXT")
    name = strict(fields.name, "meta context name")
    if ":" not in name:
        raise RemoteProtocolError(f"meta context {name!r} has no namespace")
    return Context(fields.id, name)


def info(data: bytes) -> InfoItem:
    """Decode INFO; None for a type nobody knows, which a client MUST ignore."""
    kind = parsed(InfoType, data, "INFO").type
    if kind == Info.EXPORT:
        fields = parsed(InfoExport, data, "INFO EXPORT", size=12)
        return ExportTerms(export_size(fields.size), fields.flags)
    if kind == Info.NAME:
        return Text(Info.NAME, strict(parsed(InfoText, data, "INFO NAME").text, "export name"))
    if kind == Info.DESCRIPTION:
        text = parsed(InfoText, data, "INFO DESCRIPTION").text
        return Text(Info.DESCRIPTION, displayed(bounded(text, "export description")))
    if kind == Info.BLOCK_SIZE:
        fields = parsed(InfoBlockSize, data, "INFO BLOCK_SIZE", size=14)
        return BlockSizes.received(fields.minimum, fields.preferred, fields.maximum)
    return None


def export_size(size: int) -> int:
    """Check an export's size, wherever the server told it."""
    if size > MAX_SIZE:
        raise RemoteProtocolError(f"export of {size} bytes: more than a file offset can express")
    return size


def parsed(struct: Any, data: bytes, what: str, *, size: int | None = None) -> Any:
    if size is not None and len(data) != size:
        raise RemoteProtocolError(f"{what} of {len(data)} bytes instead of {size}")
    try:
        return struct.parse(data)
    except ConstructError:
        raise RemoteProtocolError(f"{what} of {len(data)} bytes is cut short") from None


def bounded(data: bytes, what: str) -> bytes:
    if len(data) > MAX_STRING:
        raise RemoteProtocolError(f"{what} of {len(data)} bytes, the limit is {MAX_STRING}")
    return data


def strict(data: bytes, what: str) -> str:
    """Text that will be sent back or compared: the specification's rules for strings hold."""
    try:
        text = bounded(data, what).decode()
    except UnicodeDecodeError:
        raise RemoteProtocolError(f"{what} is not UTF-8: {data[:64]!r}") from None
    if "\0" in text:
        raise RemoteProtocolError(f"{what} contains a NUL: {data[:64]!r}")
    return text
