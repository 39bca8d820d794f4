"""LIST_META_CONTEXT and SET_META_CONTEXT: what is named, what is refused, what gets an id.

proto.md "Metadata querying"; what a selection means for BLOCK_STATUS is in ``test_status``.
"""

import struct

import pytest
from serving import ServerProcess
from wire import Wire, meta_data, name_data

from protocol import structs
from protocol.constants import Dialect, Option, Reply

ALLOCATION, DEPTH = "base:allocation", "qemu:allocation-depth"


def opened(server: ServerProcess, dialect: Dialect = Dialect.SIMPLE) -> Wire:
    """A client in the middle of the haggling."""
    wire = server.connect()
    wire.greet()
    wire.use(dialect)
    return wire


def names(wire: Wire, number: Option, export: str, *queries: str) -> list[tuple[int, str]]:
    """(id, name) of what the server answered."""
    *replies, last = wire.ask(number, meta_data(export, queries))
    assert last.reply == Reply.ACK
    parsed = [structs.MetaContextReply.parse(reply.data) for reply in replies]
    return [(context.id, context.name.decode()) for context in parsed]


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], [ALLOCATION, DEPTH]),
        (["base:"], [ALLOCATION]),
        (["qemu:"], [DEPTH]),
        ([ALLOCATION], [ALLOCATION]),
        (["x-unknown:", "no namespace", "base:nothing"], []),
        ([ALLOCATION, "base:", "x-other:thing"], [ALLOCATION]),
    ],
)
def test_list_meta_context(
    readonly: ServerProcess, queries: list[str], expected: list[str]
) -> None:
    wire = opened(readonly)  # allowed before structured replies
    found = names(wire, Option.LIST_META_CONTEXT, "disk", *queries)
    assert found == [(0, name) for name in expected]


@pytest.mark.parametrize("queries", [[], ["base:"], ["x-unknown:y"], [""]])
def test_set_meta_context_selects_nothing(readonly: ServerProcess, queries: list[str]) -> None:
    wire = opened(readonly, Dialect.STRUCTURED)
    assert names(wire, Option.SET_META_CONTEXT, "disk", *queries) == []


def test_set_meta_context_gives_unique_ids(readonly: ServerProcess) -> None:
    wire = opened(readonly, Dialect.STRUCTURED)
    found = names(wire, Option.SET_META_CONTEXT, "disk", DEPTH, ALLOCATION)
    assert {name for _, name in found} == {ALLOCATION, DEPTH}
    assert len({context for context, _ in found}) == 2


def test_same_query_twice_selects_once(readonly: ServerProcess) -> None:
    wire = opened(readonly, Dialect.STRUCTURED)
    assert len(names(wire, Option.SET_META_CONTEXT, "disk", ALLOCATION, ALLOCATION)) == 1


def test_set_meta_context_needs_chunks(readonly: ServerProcess) -> None:
    wire = opened(readonly)
    data = meta_data("disk", [ALLOCATION])
    assert wire.verdict(Option.SET_META_CONTEXT, data) == Reply.ERR_INVALID


@pytest.mark.parametrize("number", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_meta_context_of_an_unknown_export(readonly: ServerProcess, number: Option) -> None:
    wire = opened(readonly, Dialect.STRUCTURED)
    assert wire.verdict(number, meta_data("nothing", [ALLOCATION])) == Reply.ERR_UNKNOWN
    assert wire.verdict(Option.LIST) == Reply.ACK


@pytest.mark.parametrize("number", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        name_data("disk"),
        meta_data("disk", ["a"]) + b"x",
        meta_data("disk", ["a"])[:-1],
        struct.pack(">I", 0xFFFFFFFF) + meta_data("disk", [])[4:],
        name_data("disk") + struct.pack(">II", 1, 0xFFFFFFFF) + b"abc",
        meta_data(b"x" * 4097, []),
        meta_data("disk", ["x" * 4097]),
        meta_data(b"di\0sk", []),
    ],
    ids=lambda data: f"{len(data)}B-{data[:6].hex()}" if isinstance(data, bytes) else None,
)
def test_malformed_meta_context_is_invalid(
    readonly: ServerProcess, number: Option, data: bytes
) -> None:
    wire = opened(readonly, Dialect.STRUCTURED)
    assert wire.verdict(number, data) == Reply.ERR_INVALID
    assert wire.verdict(Option.LIST) == Reply.ACK


@pytest.mark.parametrize("count", [65, 4096, 0xFFFFFFFF])
def test_too_many_queries_are_refused(readonly: ServerProcess, count: int) -> None:
    wire = opened(readonly, Dialect.STRUCTURED)
    data = name_data("disk") + struct.pack(">I", count) + bytes(4 * min(count, 4096))
    verdict = wire.verdict(Option.SET_META_CONTEXT, data)
    assert verdict in {Reply.ERR_TOO_BIG, Reply.ERR_INVALID}
    assert wire.verdict(Option.LIST) == Reply.ACK
