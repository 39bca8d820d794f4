"""What options and their replies carry: strict decoding, bounded before anything is built.

::

    EXPORT_NAME                 name
    INFO, GO                    namelen:4 name n:2 info:2 x n
    LIST/SET_META_CONTEXT       namelen:4 name n:4 (querylen:4 query) x n
    ABORT LIST STARTTLS ...     nothing

Rule: a malformed option raises ``InvalidOption`` with a sentence for the client, never
anything else. The data must be consumed exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from construct import Construct, ConstructError, Int16ub, Int32ub

from protocol import structs
from protocol.constants import (
    MAX_STRING,
    OPTION_REPLY_MAGIC,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)
from protocol.errors import ProtocolError
from protocol.headers import SERVER_REPLY
from protocol.terms import BlockSizes

__all__ = [
    "ExportInfo",
    "InvalidOption",
    "decode_name",
    "export_name_reply",
    "info_replies",
    "meta_context_reply",
    "option_reply",
    "parse_info",
    "parse_meta_context",
    "server_reply",
    "truncate_text",
]

MAX_QUERIES = 64
"""Meta context queries in one option. Each would be parsed on the event loop; no client has
a use for more contexts than that, and ERR_TOO_BIG is the specified answer."""


MAX_INFOS = 256
"""Information requests in one option, for the same reason; four are known."""


class InvalidOption(ProtocolError):
    """An option's data breaks a rule; answered with ``reply`` and the message as text."""

    def __init__(self, text: str, reply: Reply = Reply.ERR_INVALID) -> None:
        super().__init__(text)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """All that INFO, GO and EXPORT_NAME tell of an export.

    Attributes:
        name: canonical name.
        size: bytes.
        flags: what the export can do, less what depends on the dialect (DF and status payload
            are added by the handshake).
        description: for humans, or empty.
        block_sizes: constraints.
    """

    name: str
    size: int
    flags: TransmissionFlag
    description: str = ""
    block_sizes: BlockSizes = field(default_factory=BlockSizes)


def decode_name(data: bytes, what: str = "export name") -> str:
    """A protocol string: UTF-8 of at most 4096 bytes without NUL."""
    if len(data) > MAX_STRING:
        raise InvalidOption(f"{what} of {len(data)} bytes exceeds {MAX_STRING}")
    if b"\0" in data:
        raise InvalidOption(f"{what} contains NUL")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidOption(f"{what} is not UTF-8") from None


def parse_info(data: bytes) -> tuple[str, tuple[int, ...]]:
    """Name and wanted information types of INFO or GO."""
    name = _parse(structs.String32, data)
    count = _parse(Int16ub, data[4 + name.length :])
    if count > MAX_INFOS:
        raise InvalidOption(f"{count} information requests, at most {MAX_INFOS}")
    parsed = _parse(structs.InfoRequest, data)
    if parsed.rest:
        raise InvalidOption(f"{len(parsed.rest)} bytes behind the information list")
    return decode_name(parsed.name.data), tuple(parsed.infos)


def parse_meta_context(data: bytes) -> tuple[str, tuple[str, ...]]:
    """Name and queries of LIST_META_CONTEXT or SET_META_CONTEXT."""
    name = _parse(structs.String32, data)
    count = _parse(Int32ub, data[4 + name.length :])
    if count > MAX_QUERIES:
        raise InvalidOption(f"{count} queries, at most {MAX_QUERIES}", Reply.ERR_TOO_BIG)
    parsed = _parse(structs.MetaContextRequest, data)
    if parsed.rest:
        raise InvalidOption(f"{len(parsed.rest)} bytes behind the queries")
    queries = tuple(decode_name(query.data, "query") for query in parsed.queries)
    return decode_name(parsed.name.data), queries


def _parse(struct: "Construct[Any, Any]", data: bytes) -> Any:
    try:
        return struct.parse(data)
    except ConstructError:
        raise InvalidOption(f"option data of {len(data)} bytes is too short") from None


def option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """One framed reply to an option."""
    header = {"option": option, "reply": reply, "length": len(data)}
    built: bytes = structs.OptionReplyHeader.build(header)
    return built + data


def truncate_text(text: str, room: int = MAX_STRING) -> bytes:
    """A human text as UTF-8 of at most ``room`` bytes, cut between characters.

    A maximum-length export name quoted in an error text must not overflow (CVE-2020-10761).
    What UTF-8 cannot carry, such as the odd bytes of a file name, becomes a question mark.
    """
    return text.encode(errors="replace")[:room].decode(errors="ignore").encode()


def server_reply(name: str, description: str) -> bytes:
    """One NBD_REP_SERVER of a listing."""
    encoded, text = name.encode(), truncate_text(description)
    length = 4 + len(encoded) + len(text)
    head = SERVER_REPLY.pack(OPTION_REPLY_MAGIC, Option.LIST, Reply.SERVER, length, len(encoded))
    return head + encoded + text


def meta_context_reply(option: int, context_id: int, name: str) -> bytes:
    """One NBD_REP_META_CONTEXT."""
    data: bytes = structs.MetaContextReply.build({"id": context_id, "name": name.encode()})
    return option_reply(option, Reply.META_CONTEXT, data)


def info_replies(
    option: int, export: ExportInfo, flags: TransmissionFlag, asked: Sequence[int]
) -> bytes:
    """The NBD_REP_INFO replies of an export: size and constraints always, texts if asked."""
    sizes = export.block_sizes
    payloads: list[bytes] = [
        structs.InfoExport.build({"type": Info.EXPORT, "size": export.size, "flags": flags})
    ]
    if Info.NAME in asked:
        payloads.append(structs.InfoText.build({"type": Info.NAME, "text": export.name.encode()}))
    if Info.DESCRIPTION in asked and export.description:
        text = truncate_text(export.description)
        payloads.append(structs.InfoText.build({"type": Info.DESCRIPTION, "text": text}))
    payloads.append(
        structs.InfoBlockSize.build(
            {
                "type": Info.BLOCK_SIZE,
                "minimum": sizes.minimum,
                "preferred": sizes.preferred,
                "maximum": sizes.maximum,
            }
        )
    )
    return b"".join(option_reply(option, Reply.INFO, data) for data in payloads)


def export_name_reply(size: int, flags: TransmissionFlag, *, zeroes: bool) -> bytes:
    """The bare answer to EXPORT_NAME: 10 bytes, or 134 for clients without NO_ZEROES."""
    built: bytes = structs.ExportNameReply.build({"size": size, "flags": flags})
    return built + bytes(structs.EXPORT_NAME_ZEROES if zeroes else 0)
