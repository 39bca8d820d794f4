"""Every number of the NBD protocol that has a name.

Source: proto.md of the NBD project (master, and its extension-ext-header branch for
the extended headers). Names are the specification's own, less their prefix:
``NBD_OPT_GO`` is ``Option.GO``.
"""

from enum import IntEnum, IntFlag

__all__ = [
    "EXTENDED_REPLY_MAGIC",
    "EXTENDED_REQUEST_MAGIC",
    "IHAVEOPT",
    "MAX_OPTION_LENGTH",
    "MAX_STATUS_EXTENTS",
    "MAX_STRING",
    "NBDMAGIC",
    "NBD_PORT",
    "OLDSTYLE_MAGIC",
    "OPTION_REPLY_MAGIC",
    "REQUEST_MAGIC",
    "SIMPLE_REPLY_MAGIC",
    "STRUCTURED_REPLY_MAGIC",
    "Allocation",
    "ClientFlag",
    "Command",
    "CommandFlag",
    "Dialect",
    "Errno",
    "HandshakeFlag",
    "Info",
    "Option",
    "Reply",
    "ReplyFlag",
    "ReplyType",
    "TransmissionFlag",
]

NBD_PORT = 10809

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OLDSTYLE_MAGIC = 0x0000420281861253
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REQUEST_MAGIC = 0x21E41C71
EXTENDED_REPLY_MAGIC = 0x6E8A278C

MAX_STRING = 4096
"""Bytes in any string of the protocol (export names, descriptions, error texts)."""

MAX_OPTION_LENGTH = 64 * 1024
"""Bytes of option data a server reads. The largest legal option a client has a use for,
SET_META_CONTEXT with a 4096-byte name and a dozen 4096-byte queries, fits."""

MAX_STATUS_EXTENTS = 1 << 20
"""Descriptors a BLOCK_STATUS chunk should not exceed (proto.md, NBD_REPLY_TYPE_BLOCK_STATUS)."""


class HandshakeFlag(IntFlag):
    """16 bits in the server's greeting."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Dialect(IntEnum):
    """How requests and replies are framed once transmission begins."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


class ClientFlag(IntFlag):
    """32 bits in the client's answer to the greeting."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    """What a client asks for while options are haggled."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    """What a server answers to an option; bit 31 marks an error."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_PLATFORM = 2**31 + 4
    ERR_TLS_REQD = 2**31 + 5
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_BLOCK_SIZE_REQD = 2**31 + 8
    ERR_TOO_BIG = 2**31 + 9
    ERR_EXT_HEADER_REQD = 2**31 + 10


class Info(IntEnum):
    """Kinds of NBD_REP_INFO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """16 bits: what an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(IntEnum):
    """Request types of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(IntFlag):
    """16 bits beside a request's type."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(IntFlag):
    """16 bits in a structured or extended reply chunk."""

    DONE = 1 << 0


class ReplyType(IntEnum):
    """Chunk types; bit 15 marks an error chunk."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 2**15 + 1
    ERROR_OFFSET = 2**15 + 2


class Errno(IntEnum):
    """The error values the wire knows; not the operating system's errno."""

    OK = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class Allocation(IntFlag):
    """Status bits of the ``base:allocation`` context."""

    HOLE = 1 << 0
    ZERO = 1 << 1
