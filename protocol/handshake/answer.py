"""The answer to one option, gathered from its replies and held within bounds.

::

    LIST  ──> SERVER, SERVER, SERVER, ... ACK       an endless list is cut off here
    GO    ──> INFO, INFO, INFO, ... ACK
    SET_META_CONTEXT ──> META_CONTEXT, ... ACK

Source: proto.md, "Option reply types".
"""

from protocol.constants import Info, Option
from protocol.errors import RemoteProtocolError
from protocol.handshake import option_replies
from protocol.handshake.option_replies import ExportTerms, Text
from protocol.handshake.wants import Export
from protocol.terms import BlockSizes

__all__ = ["Answer"]

MAX_REPLIES: dict[Option | None, int] = {
    Option.LIST: 1 << 17,
    Option.LIST_META_CONTEXT: 4096,
    Option.SET_META_CONTEXT: 4096,
}
"""Replies to one option. Every restore point of a large repository fits in a list; a server
that never stops (CVE-2017-2630 drained such a list recursively) does not."""
MAX_OTHER_REPLIES = 64
"""INFO and GO: one of each information type, and room for those to come."""
MAX_ANSWER = 16 * 1024 * 1024
"""Bytes of data in all replies to one option."""


class Answer:
    """What a server has said so far about one option.

    Attributes:
        exports: from LIST.
        names: meta contexts from LIST_META_CONTEXT.
        contexts: from SET_META_CONTEXT, id to name.
        terms: size and flags, from INFO or GO.
        blocks: size constraints, from INFO or GO.
        texts: NAME and DESCRIPTION, from INFO or GO.
    """

    def __init__(self, asked: Option | None = None) -> None:
        self.asked = asked
        self.exports: list[Export] = []
        self.names: list[str] = []
        self.contexts: dict[int, str] = {}
        self.terms: ExportTerms | None = None
        self.blocks: BlockSizes | None = None
        self.texts: dict[Info, str] = {}
        self._replies = 0
        self._length = 0

    def count(self, length: int) -> None:
        """Account for one reply with ``length`` bytes of data."""
        self._replies += 1
        self._length += length
        limit = MAX_REPLIES.get(self.asked, MAX_OTHER_REPLIES)
        if self._replies > limit:
            raise RemoteProtocolError(f"more than {limit} replies to {self._name()}")
        if self._length > MAX_ANSWER:
            raise RemoteProtocolError(f"more than {MAX_ANSWER} bytes in replies to {self._name()}")

    def add_export(self, data: bytes) -> None:
        """A SERVER reply."""
        self.count(len(data))
        self.exports.append(option_replies.server(data))

    def add_listed_context(self, data: bytes) -> None:
        """A META_CONTEXT reply to LIST; its id means nothing there."""
        self.count(len(data))
        self.names.append(option_replies.context(data).name)

    def add_context(self, data: bytes, queries: tuple[str, ...]) -> None:
        """A META_CONTEXT reply to SET: one of the queries, under an id of its own."""
        self.count(len(data))
        context = option_replies.context(data)
        if context.name not in queries:
            raise RemoteProtocolError(f"meta context {context.name!r} was not asked for")
        if context.id in self.contexts or context.name in self.contexts.values():
            raise RemoteProtocolError(f"meta context {context.id} {context.name!r} given twice")
        self.contexts[context.id] = context.name

    def add_info(self, data: bytes) -> None:
        """An INFO reply. The same again is tolerated, something else is not."""
        self.count(len(data))
        item = option_replies.info(data)
        match item:
            case ExportTerms():
                self._need_same(self.terms, item)
                self.terms = item
            case BlockSizes():
                self._need_same(self.blocks, item)
                self.blocks = item
            case Text(kind, text):
                self._need_same(self.texts.get(kind), text)
                self.texts[kind] = text
            case None:
                pass  # "the client MUST ignore information types that it does not recognize"

    def _need_same(self, known: object, item: object) -> None:
        if known is not None and known != item:
            raise RemoteProtocolError(f"two answers to {self._name()}: {known}, then {item}")

    def _name(self) -> str:
        return "nothing" if self.asked is None else self.asked.name
