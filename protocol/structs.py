"""Every wire structure of NBD, in construct: the reference the rest is proven against.

Everything is big-endian and packed. The handshake uses these directly; the transmission
phase uses the precompiled twins in ``headers``, which a property test holds equal to these
(construct takes 25 microseconds where ``struct`` takes 0.4).

::

    option        IHAVEOPT:8 option:4 length:4 data
    option reply  magic:8 option:4 reply:4 length:4 data
    request       magic:4 flags:2 type:2 cookie:8 offset:8 length:4            28 bytes
    ext. request  magic:4 flags:2 type:2 cookie:8 offset:8 length:8            32
    simple reply  magic:4 error:4 cookie:8                                     16
    chunk         magic:4 flags:2 type:2 cookie:8 length:4                     20
    ext. chunk    magic:4 flags:2 type:2 cookie:8 offset:8 length:8            32
"""

from construct import (
    Bytes,
    Const,
    GreedyBytes,
    GreedyRange,
    Int16ub,
    Int32ub,
    Int64ub,
    Padding,
    PrefixedArray,
    Struct,
    this,
)

from protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    IHAVEOPT,
    NBDMAGIC,
    OLDSTYLE_MAGIC,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)

# --- handshake -------------------------------------------------------------------------

Oldstyle = Struct(
    "init_passwd" / Const(NBDMAGIC, Int64ub),
    "magic" / Const(OLDSTYLE_MAGIC, Int64ub),
    "size" / Int64ub,
    "flags" / Int32ub,
    Padding(124),
)

Greeting = Struct(
    "init_passwd" / Const(NBDMAGIC, Int64ub),
    "magic" / Const(IHAVEOPT, Int64ub),
    "flags" / Int16ub,
)

ClientFlags = Struct("flags" / Int32ub)

OptionHeader = Struct(
    "magic" / Const(IHAVEOPT, Int64ub),
    "option" / Int32ub,
    "length" / Int32ub,
)

OptionReplyHeader = Struct(
    "magic" / Const(OPTION_REPLY_MAGIC, Int64ub),
    "option" / Int32ub,
    "reply" / Int32ub,
    "length" / Int32ub,
)

ExportNameReply = Struct("size" / Int64ub, "flags" / Int16ub)
EXPORT_NAME_ZEROES = 124

String32 = Struct("length" / Int32ub, "data" / Bytes(this.length))

InfoRequest = Struct(
    "name" / String32,
    "infos" / PrefixedArray(Int16ub, Int16ub),
    "rest" / GreedyBytes,
)

MetaContextRequest = Struct(
    "name" / String32,
    "queries" / PrefixedArray(Int32ub, String32),
    "rest" / GreedyBytes,
)

ServerReply = Struct("name" / String32, "description" / GreedyBytes)
MetaContextReply = Struct("id" / Int32ub, "name" / GreedyBytes)
InfoType = Struct("type" / Int16ub)
InfoExport = Struct("type" / Int16ub, "size" / Int64ub, "flags" / Int16ub)
InfoText = Struct("type" / Int16ub, "text" / GreedyBytes)
InfoBlockSize = Struct(
    "type" / Int16ub,
    "minimum" / Int32ub,
    "preferred" / Int32ub,
    "maximum" / Int32ub,
)

# --- transmission ----------------------------------------------------------------------

Request = Struct(
    "magic" / Const(REQUEST_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int32ub,
)

ExtendedRequest = Struct(
    "magic" / Const(EXTENDED_REQUEST_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int64ub,
)

SimpleReply = Struct(
    "magic" / Const(SIMPLE_REPLY_MAGIC, Int32ub),
    "error" / Int32ub,
    "cookie" / Int64ub,
)

StructuredChunk = Struct(
    "magic" / Const(STRUCTURED_REPLY_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "length" / Int32ub,
)

ExtendedChunk = Struct(
    "magic" / Const(EXTENDED_REPLY_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int64ub,
)

OffsetData = Struct("offset" / Int64ub, "data" / GreedyBytes)
OffsetHole = Struct("offset" / Int64ub, "length" / Int32ub)

BlockStatus = Struct(
    "context" / Int32ub,
    "extents" / GreedyRange(Struct("length" / Int32ub, "flags" / Int32ub)),
)

BlockStatusExt = Struct(
    "context" / Int32ub,
    "count" / Int32ub,
    "extents" / GreedyRange(Struct("length" / Int64ub, "flags" / Int64ub)),
)

ErrorChunk = Struct(
    "error" / Int32ub,
    "text_length" / Int16ub,
    "text" / Bytes(this.text_length),
)

ErrorOffsetChunk = Struct(
    "error" / Int32ub,
    "text_length" / Int16ub,
    "text" / Bytes(this.text_length),
    "offset" / Int64ub,
)

StatusPayload = Struct("length" / Int64ub, "contexts" / GreedyRange(Int32ub))
