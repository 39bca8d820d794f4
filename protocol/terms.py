"""What a handshake agreed on: everything the transmission phase has to know.

::

    NBD_OPT_EXTENDED_HEADERS ACKed ── EXTENDED     32-byte headers both ways, chunks
    NBD_OPT_STRUCTURED_REPLY ACKed ── STRUCTURED   28-byte requests, 20-byte chunks
    neither                        ── SIMPLE       28-byte requests, 16-byte replies

Source: proto.md, "Transmission flags" and "Size constraints" (ext-header branch).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from protocol.constants import Dialect, TransmissionFlag
from protocol.errors import RemoteProtocolError

__all__ = ["MAX_SIZE", "BlockSizes", "Negotiated", "honest_flags"]

MAX_SIZE = 2**63 - 1
"""Bytes in an export. More would be negative in a file offset (libnbd's CVE-2023-5215)."""

MAX_MINIMUM_BLOCK = 65536
"""proto.md: the minimum block size "MUST NOT be larger than 2^16"."""
LEAST_PREFERRED_BLOCK = 512
"""proto.md: the preferred block size is "at least as large as the maximum of the minimum
block size and 2^9"."""


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """A server's size constraints, in bytes; the defaults hold when it names none.

    Attributes:
        minimum: every offset and length is a multiple of it.
        preferred: what is efficient.
        maximum: the longest payload, 0xffffffff for no limit.
    """

    minimum: int = 1
    preferred: int = 4096
    maximum: int = 32 * 1024 * 1024

    @classmethod
    def received(cls, minimum: int, preferred: int, maximum: int) -> "BlockSizes":
        """Sizes from a peer.

        Raises:
            RemoteProtocolError: they break a MUST of the specification.
        """
        sizes = f"block sizes {minimum}/{preferred}/{maximum}"
        if not power_of_two(minimum) or minimum > MAX_MINIMUM_BLOCK:
            limit = f"a power of 2 up to {MAX_MINIMUM_BLOCK}"
            raise RemoteProtocolError(f"{sizes}: the minimum is not {limit}")
        least = max(minimum, LEAST_PREFERRED_BLOCK)
        if not power_of_two(preferred) or preferred < least:
            raise RemoteProtocolError(f"{sizes}: preferred is not a power of 2 from {least} on")
        if maximum < preferred:
            raise RemoteProtocolError(f"{sizes}: the maximum payload is less than preferred")
        return cls(minimum, preferred, maximum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Negotiated:
    """The transmission phase has begun (or, from INFO, would begin) on these terms.

    Attributes:
        export: the name that was asked for.
        size: bytes in the export, at most MAX_SIZE.
        flags: what the export can do, less what the server may not offer in this dialect.
        blocks: its size constraints, or the defaults.
        blocks_advertised: whether the server sent them.
        name: the server's canonical name, if it differs or was told.
        description: for a human being; control characters are replaced.
        dialect: the frames in use.
        contexts: metadata context id to name, in the server's order.
        tls: whether the connection is encrypted.
        refusals: optional things the server said no to, in its words, for a report.
    """

    export: str
    size: int
    flags: TransmissionFlag
    blocks: BlockSizes = field(default_factory=BlockSizes)
    blocks_advertised: bool = False
    name: str | None = None
    description: str | None = None
    dialect: Dialect = Dialect.SIMPLE
    contexts: Mapping[int, str] = field(default_factory=dict)
    tls: bool = False
    refusals: tuple[str, ...] = ()


def honest_flags(flags: int, dialect: Dialect) -> TransmissionFlag:
    """The transmission flags that mean something.

    Without HAS_FLAGS the other bits are not flags at all; READ_ONLY is then believed all the
    same, as the harmless way to be wrong. Bits that need something that was not negotiated
    (DF, FAST_ZERO, BLOCK_STATUS_PAYLOAD), and bits nobody has named, are dropped.
    """
    kept = TransmissionFlag(flags & sum(TransmissionFlag))
    if not kept & TransmissionFlag.HAS_FLAGS:
        return kept & TransmissionFlag.READ_ONLY
    if dialect is Dialect.SIMPLE:
        kept &= ~TransmissionFlag.SEND_DF
    if dialect is not Dialect.EXTENDED:
        kept &= ~TransmissionFlag.BLOCK_STATUS_PAYLOAD
    if not kept & TransmissionFlag.SEND_WRITE_ZEROES:
        kept &= ~TransmissionFlag.SEND_FAST_ZERO
    return kept


def power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
