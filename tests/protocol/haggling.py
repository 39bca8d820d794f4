"""A client's half of the handshake, and a shell for the server's: what its tests are driven with.

::

    option(), info_data(), meta_data()   -->  Haggle.send  -->  ServerHandshake
    Answer(option, reply, data)          <--               <--  events answered from EXPORTS

The client's bytes are built, and the server's replies taken apart, with construct from
``structs``, not with the code under test. ``Haggle`` answers events the way ``nbdsrv`` does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protocol import structs
from protocol.constants import ClientFlag, HandshakeFlag, Info, Option, Reply, TransmissionFlag
from protocol.handshake.events import (
    Close,
    Event,
    ListExports,
    OpenExport,
    QueryContexts,
    StartTls,
    State,
    TlsMode,
    Transmit,
)
from protocol.handshake.options import ExportInfo
from protocol.handshake.server import ServerHandshake
from protocol.terms import BlockSizes

F = TransmissionFlag
FIXED = ClientFlag.FIXED_NEWSTYLE
NO_ZEROES = ClientFlag.NO_ZEROES
NOBODY_KNOWS = 99
"""The number of an option that does not exist."""

EXPORTS = {
    "": ExportInfo("disk", 1 << 40, F.HAS_FLAGS | F.READ_ONLY),
    "disk": ExportInfo("disk", 1 << 40, F.HAS_FLAGS | F.READ_ONLY, "a disk"),
    "sectors": ExportInfo("sectors", 4096, F.HAS_FLAGS, "", BlockSizes(512, 4096, 1 << 20)),
}
CONTEXTS = {
    "": ["base:allocation"],
    "disk": [
        "base:allocation",
        "qemu:dirty-bitmap:monday",
        "qemu:dirty-bitmap:tuesday",
        "qemu:allocation-depth",
    ],
    "sectors": [],
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One option reply."""

    option: int
    reply: int
    data: bytes = b""


def ack(number: int) -> Answer:
    return Answer(number, Reply.ACK)


def client_flags(flags: int = FIXED | NO_ZEROES) -> bytes:
    built: bytes = structs.ClientFlags.build({"flags": flags})
    return built


def option(number: int, data: bytes = b"") -> bytes:
    built: bytes = structs.OptionHeader.build({"option": number, "length": len(data)})
    return built + data


def announced(number: int, length: int) -> bytes:
    """The header of an option whose data never comes."""
    built: bytes = structs.OptionHeader.build({"option": number, "length": length})
    return built


def string(text: str | bytes) -> dict[str, object]:
    data = text if isinstance(text, bytes) else text.encode()
    return {"length": len(data), "data": data}


def info_data(name: str | bytes, infos: Sequence[int] = ()) -> bytes:
    built: bytes = structs.InfoRequest.build({"name": string(name), "infos": infos, "rest": b""})
    return built


def meta_data(name: str | bytes, queries: Iterable[str | bytes] = ()) -> bytes:
    wanted = [string(query) for query in queries]
    built: bytes = structs.MetaContextRequest.build(
        {"name": string(name), "queries": wanted, "rest": b""}
    )
    return built


def naming(number: int, name: str | bytes) -> bytes:
    """The data of an option that names an export."""
    if number == Option.EXPORT_NAME:
        return name if isinstance(name, bytes) else name.encode()
    if number in {Option.INFO, Option.GO}:
        return info_data(name, [Info.BLOCK_SIZE])
    if number in {Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT}:
        return meta_data(name, ["base:allocation"])
    return b""


def answers(data: bytes) -> list[Answer]:
    """Take option replies apart; every byte must belong to one."""
    found = []
    while data:
        header = structs.OptionReplyHeader.parse(data)
        end = structs.OptionReplyHeader.sizeof() + header.length
        assert end <= len(data), "a reply is cut short"
        found.append(Answer(header.option, header.reply, data[end - header.length : end]))
        data = data[end:]
    return found


class Haggle:
    """A handshake and its shell. Past the greeting, unless ``flags`` is None.

    Attributes:
        events: everything the server asked for, in order.
        sent: everything it sent behind the greeting.
        peak: most bytes it ever held between two calls.
    """

    def __init__(
        self,
        tls: TlsMode = TlsMode.OFF,
        flags: int | None = FIXED | NO_ZEROES,
        *,
        shell: bool = True,
    ) -> None:
        self.machine = ServerHandshake(tls)
        self.events: list[Event] = []
        self.sent = b""
        self.peak = 0
        self._shell = shell
        self._due = b""
        greeting = self.machine.to_send()
        expected = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        assert structs.Greeting.build({"flags": expected}) == greeting
        if flags is not None:
            self.feed(client_flags(flags))

    @property
    def state(self) -> State:
        return self.machine.state

    @property
    def over(self) -> bool:
        return self.state in {State.CLOSED, State.TRANSMISSION}

    @property
    def last(self) -> Event | None:
        return self.events[-1] if self.events else None

    def feed(self, data: bytes) -> bytes:
        """Give bytes, answer what is asked; returns what the server sends."""
        self.machine.receive(data)
        self.peak = max(self.peak, len(self.machine._buffer))
        while (event := self.machine.next_event()) is not None:
            self.events.append(event)
            if self._shell and (followed := self._answer(event)) is not None:
                self.events.append(followed)
        out, self._due = self._due + self.machine.to_send(), b""
        self.sent += out
        return out

    def send(self, number: int, data: bytes = b"") -> list[Answer]:
        """Send one whole option; returns the replies."""
        return answers(self.feed(option(number, data)))

    def send_all(self, *numbers: int) -> list[Answer]:
        """Send options without data, one after the other."""
        return [answer for number in numbers for answer in self.send(number)]

    def upgrade(self) -> "Haggle":
        """Begin TLS."""
        assert [ack(Option.STARTTLS)] == self.send(Option.STARTTLS)
        assert self.state is State.SECURED
        return self

    def transmit(self) -> Transmit:
        """How it ended, which must be well."""
        assert isinstance(self.last, Transmit), self.last
        assert self.state is State.TRANSMISSION
        return self.last

    def closed(self) -> Close:
        """How it ended, which must be badly (or by ABORT)."""
        assert isinstance(self.last, Close), self.last
        assert self.state is State.CLOSED
        return self.last

    def _answer(self, event: Event) -> Event | None:
        machine = self.machine
        if isinstance(event, StartTls):
            self._due += machine.to_send()
            machine.tls_started()
        elif isinstance(event, ListExports):
            machine.list_exports((name, export.description) for name, export in EXPORTS.items())
        elif isinstance(event, OpenExport | QueryContexts) and event.name not in EXPORTS:
            return machine.refuse(Reply.ERR_UNKNOWN, f"no export {event.name!r}")
        elif isinstance(event, OpenExport):
            return machine.accept(EXPORTS[event.name])
        elif isinstance(event, QueryContexts):
            machine.contexts(CONTEXTS[event.name])
        return None
