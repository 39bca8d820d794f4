"""Streams of a client's bytes: valid ones of every kind, and what becomes of them.

::

    flags | options ... | GO | requests ...     recorded from the builders of ``wire``
      --> flip, cut, insert, repeat, swap, splice, "interesting" numbers in a field
"""

import random
import struct
from collections.abc import Callable

from wire import info_data, meta_data, name_data, option, request

from protocol.constants import Command, CommandFlag, Option

NUMBERS = [0, 1, 2, 7, 255, 4096, 4097, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]
WIDE = [*NUMBERS, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 4096]
MAGIC = (b"IHAVEOPT", b"\x25\x60\x95\x13", b"\x21\xe4\x1c\x71", b"\x00\x00\x00\x03")
ALLOCATION = "base:allocation"


def handshake(rng: random.Random, export: str) -> tuple[bytes, bool]:
    """Options up to transmission; also whether headers are extended."""
    dialect = rng.choice([None, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
    stream = struct.pack(">I", rng.choice([3, 3, 3, 1]))
    pieces = [
        option(Option.LIST),
        option(Option.INFO, info_data(export, [1, 2, 3])),
        option(Option.LIST_META_CONTEXT, meta_data(export, [])),
        option(99, rng.randbytes(rng.randrange(40))),
        option(Option.STARTTLS),
        option(Option.SET_META_CONTEXT, meta_data(export, [ALLOCATION, "qemu:"])),
    ]
    stream += b"".join(rng.sample(pieces, rng.randrange(len(pieces))))
    if dialect is not None:
        stream += option(dialect)
        stream += option(Option.SET_META_CONTEXT, meta_data(export, [ALLOCATION]))
    elif rng.random() < 0.5:
        return stream + option(Option.EXPORT_NAME, export.encode()), False
    stream += option(Option.GO, info_data(export, rng.choice([[], [3], [0, 1, 2, 3]])))
    return stream, dialect is Option.EXTENDED_HEADERS


def requests(rng: random.Random, size: int, *, extended: bool) -> bytes:
    """A few dozen requests, most of them valid."""
    stream = b""
    for cookie in range(rng.randrange(30)):
        command = rng.choice([*Command, Command.READ, Command.WRITE, Command.WRITE])
        if command is Command.DISC and rng.random() < 0.9:
            command = Command.READ
        offset = rng.randrange(size)
        length = min(rng.choice([0, 1, 512, 4096, 70_000]), size - offset)
        flags = rng.choice([0, 0, 0, *CommandFlag])
        payload = b""
        if command is Command.FLUSH:
            offset = length = 0
        if command is Command.WRITE:
            payload = rng.randbytes(length)
            flags |= CommandFlag.PAYLOAD_LEN if extended else 0
        elif command is Command.BLOCK_STATUS and extended and rng.random() < 0.5:
            payload = struct.pack(">QI", length, 1)
            length, flags = len(payload), CommandFlag.PAYLOAD_LEN
        header = request(command, offset, length, flags=flags, cookie=cookie, extended=extended)
        stream += header + payload
    return stream


def stream(rng: random.Random, export: str, size: int) -> bytes:
    """One client's life, mutated more often than not."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(300))
    begin, extended = handshake(rng, export)
    data = begin + requests(rng, size, extended=extended)
    if rng.random() < 0.1:
        return data
    # Half of the mutations hit the requests: in the options most of them end it all.
    fixed = len(begin) if rng.random() < 0.5 else 0
    part = data[fixed:]
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        part = rng.choice(MUTATIONS)(rng, part)
    return data[:fixed] + part


def _flip(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = rng.choice([rng.randbytes(rng.randrange(1, 40)), bytes(8), *MAGIC])
    return data[:at] + piece + data[at:]


def _remove(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randrange(1, 40) :]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = data[at : at + rng.randrange(1, 200)]
    return data[:at] + piece * rng.choice([2, 3, 20]) + data[at + len(piece) :]


def _splice(rng: random.Random, data: bytes) -> bytes:
    left, right = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    return data[:left] + data[right:]


def _number(rng: random.Random, data: bytes) -> bytes:
    """A number that hurts, aligned as fields behind a magic are."""
    magic = rng.choice(MAGIC)
    at = data.find(magic, rng.randrange(len(data) + 1))
    if at < 0:
        return _flip(rng, data)
    at += rng.choice([4, 6, 8, 12, 16, 20, 24])
    if rng.random() < 0.5:
        field = struct.pack(">I", rng.choice(NUMBERS))
    else:
        field = struct.pack(">Q", rng.choice(WIDE))
    return data[:at] + field + data[at + len(field) :]


def _long_name(rng: random.Random, data: bytes) -> bytes:
    length = rng.choice([4096, 4097, 65000, 65536])
    number = rng.choice([1, 6, 7, 9, 10])
    return data + option(number, name_data(b"x" * length) + bytes(rng.randrange(8)))


MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [
    _flip,
    _flip,
    _cut,
    _insert,
    _remove,
    _repeat,
    _splice,
    _number,
    _number,
    _number,
    _long_name,
]
