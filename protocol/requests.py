"""What a server makes of a request: its frame, and whether it may be carried out.

Two questions, kept apart so that the stream stays in sync whatever a client sends:

* ``Framing``: how many bytes belong to this request? Decided from header and dialect alone;
  a payload nobody wanted is still consumed.
* ``Rules.check``: which error, if any, does it get? Decided from what was offered.

The order of the checks is what clients rely on::

    unknown command, stray payload        EINVAL
    modifying a read-only export          EPERM
    command or flag that was not offered  EINVAL
    misaligned                            EINVAL
    beyond the end                        ENOSPC to write or zero, EINVAL otherwise
    more data than one reply carries      EOVERFLOW (EINVAL in simple replies)

proto.md, "Request types", "Command flags", "Size constraints", "Error values".
"""

from collections.abc import Collection
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from protocol.constants import Command, CommandFlag, Dialect, Errno, TransmissionFlag
from protocol.terms import BlockSizes

__all__ = ["MAX_PAYLOAD", "Framing", "Request", "Rules", "parse_status_payload"]

MAX_PAYLOAD = 32 * 1024 * 1024
"""Bytes a request may carry; proto.md: up to here it must never be called an attack."""


class Request(NamedTuple):
    """One decoded request header. ``length`` is an effect or, with a payload, its length."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Framing:
    """How requests of one dialect are cut out of the stream."""

    dialect: Dialect

    def payload_length(self, request: Request) -> int:
        """Bytes that follow the header."""
        if self.dialect is Dialect.EXTENDED:
            return request.length if request.flags & CommandFlag.PAYLOAD_LEN else 0
        return request.length if request.command == Command.WRITE else 0


_MODIFYING = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})
_KNOWN = frozenset({*Command} - {Command.RESIZE})

_NEEDS = {
    Command.FLUSH: TransmissionFlag.SEND_FLUSH,
    Command.TRIM: TransmissionFlag.SEND_TRIM,
    Command.WRITE_ZEROES: TransmissionFlag.SEND_WRITE_ZEROES,
}

_Refusal = tuple[Errno, str]


class Rules:
    """The rules one connection has agreed on; every answer is (error, text) or None."""

    def __init__(
        self,
        *,
        size: int,
        flags: TransmissionFlag,
        dialect: Dialect,
        block_sizes: BlockSizes,
        has_contexts: bool,
    ) -> None:
        self._size = size
        self._offered = flags
        self._dialect = dialect
        self._sizes = block_sizes
        self._has_contexts = has_contexts
        self._allowed = {command: self._flags_of(command) for command in _KNOWN}

    def _flags_of(self, command: Command) -> int:
        allowed = CommandFlag(0)
        if TransmissionFlag.SEND_FUA in self._offered:
            allowed |= CommandFlag.FUA  # legal on every command once offered
        if command is Command.READ and TransmissionFlag.SEND_DF in self._offered:
            allowed |= CommandFlag.DF
        if command is Command.WRITE and self._dialect is Dialect.EXTENDED:
            allowed |= CommandFlag.PAYLOAD_LEN
        if command is Command.WRITE_ZEROES:
            allowed |= CommandFlag.NO_HOLE
            if TransmissionFlag.SEND_FAST_ZERO in self._offered:
                allowed |= CommandFlag.FAST_ZERO
        if command is Command.BLOCK_STATUS:
            allowed |= CommandFlag.REQ_ONE
            if TransmissionFlag.BLOCK_STATUS_PAYLOAD in self._offered:
                allowed |= CommandFlag.PAYLOAD_LEN
        return int(allowed)

    def check(self, request: Request) -> _Refusal | None:
        """The error this request gets, or None if it may be carried out.

        A BLOCK_STATUS with a payload is checked again once its effect length is known.
        """
        if request.command not in _KNOWN:
            return Errno.EINVAL, f"unknown command {request.command}"
        command = Command(request.command)
        refusal = self._check_offer(command, request.flags)
        if refusal is None and command is Command.FLUSH:
            if request.offset or request.length:
                return Errno.EINVAL, "FLUSH takes neither offset nor length"
            return None
        if refusal is None and not (
            command is Command.BLOCK_STATUS and request.flags & CommandFlag.PAYLOAD_LEN
        ):
            refusal = self.check_range(command, request.offset, request.length)
        return refusal

    def _check_offer(self, command: Command, flags: int) -> _Refusal | None:
        if flags & CommandFlag.PAYLOAD_LEN & ~self._allowed[command]:
            return Errno.EINVAL, f"{command.name} takes no payload here"
        if command in _MODIFYING and TransmissionFlag.READ_ONLY in self._offered:
            return Errno.EPERM, "the export is read-only"
        needs = _NEEDS.get(command)
        if needs is not None and needs not in self._offered:
            return Errno.EINVAL, f"{command.name} was not offered"
        stray = flags & ~self._allowed[command]
        if stray:
            return Errno.EINVAL, f"flags {stray:#x} are not valid for {command.name}"
        extended_write = command is Command.WRITE and self._dialect is Dialect.EXTENDED
        if extended_write and not flags & CommandFlag.PAYLOAD_LEN:
            return Errno.EINVAL, "WRITE without PAYLOAD_LEN"
        if command is Command.BLOCK_STATUS and not self._has_contexts:
            return Errno.EINVAL, "no meta context was selected for this export"
        return None

    def check_range(self, command: Command, offset: int, length: int) -> _Refusal | None:
        """Alignment, bounds and the most one reply may carry."""
        minimum = self._sizes.minimum
        end = offset + length
        if minimum > 1 and (offset % minimum or (length % minimum and end != self._size)):
            return Errno.EINVAL, f"not aligned to {minimum} bytes"
        if end > self._size:
            errno = Errno.EINVAL
            if command in {Command.WRITE, Command.WRITE_ZEROES}:
                errno = Errno.ENOSPC
            return errno, f"{length} bytes at {offset} go beyond the end at {self._size}"
        if command is Command.READ and length > self._sizes.maximum:
            simple = self._dialect is Dialect.SIMPLE
            errno = Errno.EINVAL if simple else Errno.EOVERFLOW
            return errno, f"reads are limited to {self._sizes.maximum} bytes"
        if command is Command.BLOCK_STATUS and not length:
            return Errno.EINVAL, "status of nothing"
        return None


def parse_status_payload(
    payload: bytes, known: Collection[int]
) -> tuple[int, tuple[int, ...]] | None:
    """BLOCK_STATUS with PAYLOAD_LEN: the effect length and the contexts the client wants.

    Returns:
        None if malformed: no context, an unknown one, or one twice.
    """
    count, rest = divmod(len(payload) - 8, 4)
    if rest or not 1 <= count <= len(known):
        return None
    length, *chosen = Struct(f">Q{count}I").unpack(payload)
    if len(set(chosen)) != count or not set(chosen) <= set(known):
        return None
    return length, tuple(chosen)
