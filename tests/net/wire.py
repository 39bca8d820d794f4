"""A raw NBD client over a blocking socket: does as it is told, however rude.

It shares nothing with the code under test but ``protocol.structs`` and the constants. Replies
are checked while they are read (``transcript``); every wait has a deadline.
"""

import socket
import ssl
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from transcript import Answer, Asked

from protocol import structs
from protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    IHAVEOPT,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
    Dialect,
    Errno,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)

TIMEOUT = 20.0
"""Seconds; a server that needs longer for anything here hangs."""
MAX_OPTION_REPLY = 1 << 16
MAX_CHUNK = 64 << 20

Address = str | tuple[str, int]


@dataclass(frozen=True, slots=True)
class OptionReply:
    """One reply to an option."""

    option: int
    reply: int
    data: bytes

    @property
    def text(self) -> str:
        """The human text of an error."""
        return self.data.decode()


def name_data(name: str | bytes) -> bytes:
    """A counted string."""
    encoded = name.encode() if isinstance(name, str) else name
    return struct.pack(">I", len(encoded)) + encoded


def info_data(name: str | bytes, infos: Sequence[int] = ()) -> bytes:
    """Option data of INFO and GO."""
    return name_data(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta_data(name: str | bytes, queries: Sequence[str]) -> bytes:
    """Option data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return name_data(name) + struct.pack(">I", len(queries)) + b"".join(map(name_data, queries))


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A framed option; ``length`` lies about its data."""
    return struct.pack(">QII", IHAVEOPT, number, len(data) if length is None else length) + data


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: int = 0,
    extended: bool = False,
    magic: int | None = None,
) -> bytes:
    """A request header."""
    if magic is None:
        magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
    form = ">IHHQQQ" if extended else ">IHHQQI"
    return struct.pack(form, magic, flags, command, cookie, offset, length)


class Wire:
    """One connection. Attributes describe what was agreed on."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.dialect = Dialect.SIMPLE
        self.size = 0
        self.flags = TransmissionFlag(0)
        self.contexts: dict[str, int] = {}
        self.pending: dict[int, Answer] = {}
        self._cookie = 0xC0FFEE00

    @classmethod
    def connect(cls, address: Address, *, receive_buffer: int = 0) -> "Wire":
        """Connect; ``receive_buffer`` bytes make us a slow reader sooner."""
        family = socket.AF_UNIX
        if isinstance(address, tuple):
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(TIMEOUT)
            if receive_buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    # --- bytes ---------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """All of it."""
        self.sock.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly ``length`` bytes."""
        data = bytearray(length)
        view = memoryview(data)
        done = 0
        while done < length:
            count = self.sock.recv_into(view[done:])
            if not count:
                raise EOFError(f"the server closed, {length - done} of {length} bytes missing")
            done += count
        return bytes(data)

    def is_closed(self) -> bool:
        """Wait for the server to close; False if it sends something instead."""
        try:
            return not self.sock.recv(1)
        except (ConnectionResetError, ssl.SSLError):
            return True

    def close(self) -> None:
        """Leave without a word."""
        self.sock.close()

    def reset(self) -> None:
        """Leave slamming the door: RST on TCP."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    # --- handshake -------------------------------------------------------------------------

    def greet(self, flags: int = 3) -> None:
        """Read the greeting, answer with client ``flags``."""
        greeting = structs.Greeting.parse(self.receive(18))
        assert greeting.flags == 3
        self.send(structs.ClientFlags.build({"flags": flags}))

    def option_reply(self) -> OptionReply:
        """The next reply to an option."""
        header = structs.OptionReplyHeader.parse(self.receive(20))
        assert header.length <= MAX_OPTION_REPLY
        return OptionReply(header.option, header.reply, self.receive(header.length))

    def ask(self, number: int, data: bytes = b"") -> list[OptionReply]:
        """Send an option; all replies to it, the last one ACK or an error."""
        self.send(option(number, data))
        return self.option_replies(number)

    def option_replies(self, number: int) -> list[OptionReply]:
        """All replies to one option."""
        replies = []
        while True:
            reply = self.option_reply()
            assert reply.option == number
            replies.append(reply)
            if reply.reply == Reply.ACK or reply.reply >= 1 << 31:
                return replies

    def verdict(self, number: int, data: bytes = b"") -> Reply:
        """Send an option; the reply that settles it."""
        return Reply(self.ask(number, data)[-1].reply)

    def starttls(self, context: ssl.SSLContext) -> None:
        """Upgrade; raises what ``ssl`` raises."""
        assert self.verdict(Option.STARTTLS) == Reply.ACK
        self.sock = context.wrap_socket(self.sock, server_hostname="localhost")

    def use(self, dialect: Dialect) -> None:
        """Agree on a dialect."""
        if dialect is not Dialect.SIMPLE:
            structured = dialect is Dialect.STRUCTURED
            number = Option.STRUCTURED_REPLY if structured else Option.EXTENDED_HEADERS
            assert self.verdict(number) == Reply.ACK
        self.dialect = dialect

    def select(self, name: str, *queries: str) -> None:
        """SET_META_CONTEXT."""
        *found, last = self.ask(Option.SET_META_CONTEXT, meta_data(name, queries))
        assert last.reply == Reply.ACK, last
        parsed = [structs.MetaContextReply.parse(reply.data) for reply in found]
        self.contexts = {context.name.decode(): context.id for context in parsed}
        assert len(set(self.contexts.values())) == len(parsed), "context ids not unique"

    def go(self, name: str = "", infos: Sequence[int] = ()) -> dict[int, bytes]:
        """GO; the informations by type, without it."""
        *informations, last = self.ask(Option.GO, info_data(name, infos))
        assert last.reply == Reply.ACK, last
        found = {int.from_bytes(reply.data[:2], "big"): reply.data for reply in informations}
        export = structs.InfoExport.parse(found[Info.EXPORT])
        self.size, self.flags = export.size, TransmissionFlag(export.flags)
        return found

    def export_name(self, name: str = "", *, zeroes: int = 0) -> None:
        """EXPORT_NAME; ``zeroes`` must follow it."""
        self.send(option(Option.EXPORT_NAME, name.encode()))
        reply = structs.ExportNameReply.parse(self.receive(10))
        assert self.receive(zeroes) == bytes(zeroes)
        self.size, self.flags = reply.size, TransmissionFlag(reply.flags)

    def enter(self, name: str = "", dialect: Dialect = Dialect.STRUCTURED, *queries: str) -> "Wire":
        """The whole handshake; simple replies go with EXPORT_NAME, as old clients have it."""
        self.greet()
        self.use(dialect)
        if queries:
            self.select(name, *queries)
        if dialect is Dialect.SIMPLE:
            self.export_name(name)
        else:
            self.go(name)
        return self

    # --- transmission ------------------------------------------------------------------------

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: bytes | None = None,
    ) -> int:
        """Send a request; its cookie. WRITE in extended headers gets its PAYLOAD_LEN."""
        header = self.prepare(command, offset, length, flags, payload)
        self.send(header + (payload or b""))
        return self._cookie

    def prepare(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: bytes | None = None,
    ) -> bytes:
        """The header alone; its reply is expected from now on."""
        if payload is not None:
            length = len(payload)
            if self.dialect is Dialect.EXTENDED:
                flags |= CommandFlag.PAYLOAD_LEN
        self._cookie += 1
        asked = Asked(command, flags, offset, length)
        if command == Command.BLOCK_STATUS and flags & CommandFlag.PAYLOAD_LEN and payload:
            asked = Asked(command, flags, offset, int.from_bytes(payload[:8], "big"))
        if command != Command.DISC:
            self.pending[self._cookie] = Answer(self._cookie, asked)
        extended = self.dialect is Dialect.EXTENDED
        return request(command, offset, length, flags=flags, cookie=self._cookie, extended=extended)

    def answer(self) -> Answer:
        """The next reply that is complete; a cookie not asked for, or twice, is an error."""
        while True:
            if self.dialect is Dialect.SIMPLE:
                return self._simple()
            if (answer := self._chunk()) is not None:
                return answer

    def call(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: bytes | None = None,
    ) -> Answer:
        """One request and its reply."""
        cookie = self.request(command, offset, length, flags, payload)
        answer = self.answer()
        assert answer.cookie == cookie
        return answer

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        """READ that must succeed."""
        return self.call(Command.READ, offset, length, flags).data()

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """WRITE that must succeed."""
        answer = self.call(Command.WRITE, offset, flags=flags, payload=data)
        assert answer.error == Errno.OK, answer.text

    def disconnect(self) -> None:
        """DISC, and the server's close."""
        self.request(Command.DISC)
        assert self.is_closed()
        self.close()

    def _simple(self) -> Answer:
        reply = struct.unpack(">IIQ", self.receive(16))
        magic, error, cookie = reply
        assert magic == SIMPLE_REPLY_MAGIC
        answer = self.pending.pop(cookie)
        assert error in set(Errno), f"error {error} is not a wire errno"
        answer.error = error
        asked = answer.asked
        if asked.command == Command.READ and not error and asked.length:
            answer.pieces.append((asked.offset, asked.length, self.receive(asked.length)))
        return answer

    def _chunk(self) -> Answer | None:
        if self.dialect is Dialect.EXTENDED:
            header = struct.unpack(">IHHQQQ", self.receive(32))
            magic, flags, kind, cookie, offset, length = header
            assert magic == EXTENDED_REPLY_MAGIC
            answer = self.pending[cookie]
            assert offset == answer.asked.offset, "the reply does not echo the offset"
        else:
            magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.receive(20))
            assert magic == STRUCTURED_REPLY_MAGIC
            answer = self.pending[cookie]
        assert length <= MAX_CHUNK
        if answer.take(kind, flags, self.receive(length)):
            return self.pending.pop(cookie)
        return None
