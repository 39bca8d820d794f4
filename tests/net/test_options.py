"""Handshake rules as they show at the socket: every option, in every way it can be wrong.

proto.md "Option types"; reference rows "ABORT" to "SET_META same query twice".
"""

import itertools
import struct

import pytest
from served_images import DISK_SIZE, MIB
from serving import ServerProcess
from wire import Wire, info_data, meta_data, name_data, option

from protocol import structs
from protocol.constants import (
    IHAVEOPT,
    OPTION_REPLY_MAGIC,
    Dialect,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)

ALLOCATION, DEPTH = "base:allocation", "qemu:allocation-depth"


def opened(server: ServerProcess, dialect: Dialect = Dialect.SIMPLE) -> Wire:
    """A client in the middle of the haggling."""
    wire = server.connect()
    wire.greet()
    wire.use(dialect)
    return wire


def still_in_sync(wire: Wire) -> None:
    """Whatever came before, the next option is understood."""
    *servers, last = wire.ask(Option.LIST)
    assert last.reply == Reply.ACK
    assert [reply.reply for reply in servers] == [Reply.SERVER] * 3


# --- greeting ---------------------------------------------------------------------------------


def test_greeting_offers_fixed_newstyle_and_no_zeroes(readonly: ServerProcess) -> None:
    assert readonly.connect().receive(18) == b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.mark.parametrize("flags", [4, 7, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flag_closes(readonly: ServerProcess, flags: int) -> None:
    wire = readonly.connect()
    wire.greet(flags)
    assert wire.is_closed()


def test_bad_option_magic_closes(readonly: ServerProcess) -> None:
    wire = opened(readonly)
    wire.send(struct.pack(">QII", IHAVEOPT + 1, Option.LIST, 0))
    assert wire.is_closed()


@pytest.mark.parametrize(("flags", "zeroes"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_export_name_sends_124_zeroes_unless_declined(
    readonly: ServerProcess, flags: int, zeroes: int
) -> None:
    wire = readonly.connect()
    wire.greet(flags)
    wire.export_name("disk", zeroes=zeroes)
    assert wire.size == DISK_SIZE
    assert len(wire.read(0, 512)) == 512  # nothing stood between the reply and the data


def test_no_zeroes_follow_the_ack_of_go(readonly: ServerProcess) -> None:
    wire = readonly.connect()
    wire.greet(1)
    wire.go("disk")
    assert len(wire.read(0, 512)) == 512


@pytest.mark.parametrize("number", [Option.LIST, Option.GO, Option.ABORT, Option.STARTTLS])
def test_without_fixed_newstyle_anything_but_export_name_closes(
    readonly: ServerProcess, number: Option
) -> None:
    wire = readonly.connect()
    wire.greet(0)
    wire.send(option(number))
    assert wire.is_closed()


# --- EXPORT_NAME, ABORT, LIST, unknown --------------------------------------------------------


@pytest.mark.parametrize("name", [b"nothing", b"dis", b"disk\0", b"\xff\xfe", b"x" * 4096])
def test_export_name_that_does_not_exist_closes(readonly: ServerProcess, name: bytes) -> None:
    wire = opened(readonly)
    wire.send(option(Option.EXPORT_NAME, name))
    assert wire.is_closed()


def test_export_name_after_extended_headers_closes(readonly: ServerProcess) -> None:
    wire = opened(readonly, Dialect.EXTENDED)
    wire.send(option(Option.EXPORT_NAME, b"disk"))
    assert wire.is_closed()


@pytest.mark.parametrize("data", [b"", b"why not", bytes(4096)])
def test_abort_is_acknowledged_then_closed(readonly: ServerProcess, data: bytes) -> None:
    wire = opened(readonly)
    wire.send(option(Option.ABORT, data))
    assert wire.receive(20) == struct.pack(">QIII", OPTION_REPLY_MAGIC, 2, 1, 0)
    assert wire.is_closed()


def test_list_names_every_export_with_its_description(readonly: ServerProcess) -> None:
    *replies, last = opened(readonly).ask(Option.LIST)
    assert last.reply == Reply.ACK
    listed = [structs.ServerReply.parse(reply.data) for reply in replies]
    assert [entry.name.data for entry in listed] == [b"disk", b"huge", b"big"]


@pytest.mark.parametrize("number", [4, 12, 255, 0, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", b"some data nobody asked for"])
def test_unknown_option_is_unsupported(readonly: ServerProcess, number: int, data: bytes) -> None:
    wire = opened(readonly)
    assert wire.verdict(number, data) == Reply.ERR_UNSUP
    still_in_sync(wire)


@pytest.mark.parametrize(
    "number",
    [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS],
)
def test_data_for_an_option_without_data_is_invalid(
    readonly: ServerProcess, number: Option
) -> None:
    wire = opened(readonly)
    assert wire.verdict(number, b"x") == Reply.ERR_INVALID
    still_in_sync(wire)


def test_starttls_without_certificates_is_refused_by_policy(readonly: ServerProcess) -> None:
    wire = opened(readonly)
    assert wire.verdict(Option.STARTTLS) in {Reply.ERR_POLICY, Reply.ERR_UNSUP}
    still_in_sync(wire)


# --- INFO and GO ------------------------------------------------------------------------------


def test_info_and_go_give_the_same_data(readonly: ServerProcess) -> None:
    wire = opened(readonly)
    data = info_data("disk", [Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE])
    info, go = wire.ask(Option.INFO, data), wire.ask(Option.GO, data)
    assert [(r.reply, r.data) for r in info] == [(r.reply, r.data) for r in go]


def test_info_tells_the_size(readonly: ServerProcess) -> None:
    reply = opened(readonly).ask(Option.INFO, info_data("disk"))[0]
    export = structs.InfoExport.parse(reply.data)
    assert export.size == DISK_SIZE
    assert export.flags & TransmissionFlag.HAS_FLAGS
    assert export.flags & TransmissionFlag.READ_ONLY


def test_go_sends_name_description_and_block_sizes(readonly: ServerProcess) -> None:
    found = opened(readonly).go("disk", [Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE])
    assert structs.InfoText.parse(found[Info.NAME]).text == b"disk"
    assert structs.InfoText.parse(found[Info.DESCRIPTION]).text
    sizes = structs.InfoBlockSize.parse(found[Info.BLOCK_SIZE])
    assert sizes.minimum & (sizes.minimum - 1) == 0
    assert max(512, sizes.minimum) <= sizes.preferred <= sizes.maximum
    assert sizes.maximum >= MIB


def test_unknown_infos_are_ignored(readonly: ServerProcess) -> None:
    found = opened(readonly).go("disk", [4, 99, 0xFFFF, Info.EXPORT])
    assert set(found) <= {Info.EXPORT, Info.BLOCK_SIZE}


def test_df_is_offered_only_with_chunks(readonly: ServerProcess) -> None:
    for dialect in Dialect:
        wire = opened(readonly, dialect)
        wire.go("disk")
        offered = TransmissionFlag.SEND_DF in wire.flags
        assert offered == (dialect is not Dialect.SIMPLE)


def test_status_payload_is_offered_only_with_extended_headers(readonly: ServerProcess) -> None:
    for dialect in (Dialect.STRUCTURED, Dialect.EXTENDED):
        wire = readonly.connect().enter("disk", dialect, ALLOCATION)
        offered = TransmissionFlag.BLOCK_STATUS_PAYLOAD in wire.flags
        assert offered == (dialect is Dialect.EXTENDED)


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        bytes(4),
        name_data("disk"),
        info_data("disk") + b"x",
        info_data("disk")[:-1],
        name_data("disk") + struct.pack(">HH", 2, 3),  # two announced, one there
        name_data("disk") + struct.pack(">HHH", 1, 3, 0),  # one announced, two there
        struct.pack(">I", 5) + info_data("disk")[4:],
        struct.pack(">I", 0xFFFFFFFF) + info_data("disk")[4:],  # CVE-2022-26495
        struct.pack(">I", 0xFFFFFFFA) + info_data("disk")[4:],
        info_data(b"disk\0"),
        info_data(b"\xc3\x28"),
        info_data(b"x" * 4097),  # CVE-2022-26496
    ],
    ids=lambda data: f"{len(data)}B-{data[:6].hex()}" if isinstance(data, bytes) else None,
)
def test_malformed_info_is_invalid(readonly: ServerProcess, number: Option, data: bytes) -> None:
    wire = opened(readonly)
    assert wire.verdict(number, data) == Reply.ERR_INVALID
    still_in_sync(wire)


@pytest.mark.parametrize("name", ["nothing", "", "DISK", "disk/", "x" * 4096, "ä" * 2048])
def test_unknown_export_is_refused_with_a_short_text(readonly: ServerProcess, name: str) -> None:
    """A 4096-byte name quoted in an error text must still fit (CVE-2020-10761)."""
    wire = opened(readonly)
    for number in (Option.INFO, Option.GO):
        reply = wire.ask(number, info_data(name))[-1]
        assert reply.reply == Reply.ERR_UNKNOWN
        assert 0 < len(reply.data) <= 4096
        assert reply.text
    still_in_sync(wire)


# --- STRUCTURED_REPLY, EXTENDED_HEADERS -------------------------------------------------------


def test_structured_reply_twice_is_invalid(readonly: ServerProcess) -> None:
    wire = opened(readonly, Dialect.STRUCTURED)
    assert wire.verdict(Option.STRUCTURED_REPLY) == Reply.ERR_INVALID
    still_in_sync(wire)


def test_extended_headers_twice_is_invalid(readonly: ServerProcess) -> None:
    wire = opened(readonly, Dialect.EXTENDED)
    assert wire.verdict(Option.EXTENDED_HEADERS) == Reply.ERR_INVALID
    still_in_sync(wire)


def test_structured_reply_after_extended_headers_is_refused(readonly: ServerProcess) -> None:
    wire = opened(readonly, Dialect.EXTENDED)
    assert wire.verdict(Option.STRUCTURED_REPLY) == Reply.ERR_EXT_HEADER_REQD
    wire.go("disk")
    assert len(wire.read(0, 512)) == 512  # and the headers are still the extended ones


def test_extended_headers_win_over_structured_replies(readonly: ServerProcess) -> None:
    wire = opened(readonly, Dialect.STRUCTURED)
    wire.use(Dialect.EXTENDED)
    wire.go("disk")
    assert len(wire.read(0, 512)) == 512


def test_handshake_options_in_every_order(readonly: ServerProcess) -> None:
    """INFO then GO once asserted in nbdkit (CVE-2019-14851): no order may upset the server."""
    pieces = {
        Option.LIST: b"",
        Option.INFO: info_data("disk"),
        Option.STRUCTURED_REPLY: b"",
        Option.SET_META_CONTEXT: meta_data("disk", [ALLOCATION]),
        Option.EXTENDED_HEADERS: b"",
    }
    for order in itertools.permutations(pieces):
        wire = opened(readonly)
        for number in order:
            wire.ask(number, pieces[number])
        wire.dialect = Dialect.EXTENDED
        wire.go("disk")
        assert len(wire.read(0, 512)) == 512
        readonly.hang_up()
