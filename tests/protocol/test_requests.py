"""What a request gets: the whole matrix of commands, flags, dialects, abilities and ranges.

``expected_offer`` and ``expected_range`` are the specification's sentences, in the order in which
this server applies them; every combination is compared with them. The cases clients depend on
are written out below, each under a name of its own.
"""

from itertools import chain, combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.constants import Command, CommandFlag, Dialect, Errno, TransmissionFlag
from protocol.requests import Request, Rules
from protocol.terms import BlockSizes

F, C = TransmissionFlag, CommandFlag
READ, WRITE, FLUSH, TRIM = Command.READ, Command.WRITE, Command.FLUSH, Command.TRIM
CACHE, ZEROES, STATUS = Command.CACHE, Command.WRITE_ZEROES, Command.BLOCK_STATUS
SERVED = [READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS]
SIZE = 1 << 20
UNLIMITED = BlockSizes()
EVERYTHING = (
    F.HAS_FLAGS
    | F.SEND_FLUSH
    | F.SEND_FUA
    | F.SEND_TRIM
    | F.SEND_WRITE_ZEROES
    | F.SEND_DF
    | F.SEND_CACHE
    | F.SEND_FAST_ZERO
    | F.BLOCK_STATUS_PAYLOAD
)
ABILITIES = [
    F.READ_ONLY,
    F.SEND_FLUSH,
    F.SEND_FUA,
    F.SEND_TRIM,
    F.SEND_WRITE_ZEROES,
    F.SEND_FAST_ZERO,
    F.SEND_DF,
    F.BLOCK_STATUS_PAYLOAD,
]
COMMAND_FLAGS = [*range(64), 1 << 6, 1 << 15, 0xFFFF]
BIG, WHOLE = 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF


def rules(
    flags: TransmissionFlag = EVERYTHING,
    dialect: Dialect = Dialect.EXTENDED,
    *,
    size: int = SIZE,
    sizes: BlockSizes = UNLIMITED,
    contexts: bool = True,
) -> Rules:
    return Rules(size=size, flags=flags, dialect=dialect, block_sizes=sizes, has_contexts=contexts)


def request(command: int, flags: int = 0, offset: int = 0, length: int = 0) -> Request:
    return Request(command, flags, 7, offset, length)


def verdict(judge: Rules, asked: Request) -> Errno | None:
    """The error alone; every refusal must say something."""
    refusal = judge.check(asked)
    if refusal is None:
        return None
    assert refusal[1]
    return refusal[0]


def offers(dialect: Dialect) -> list[TransmissionFlag]:
    """Every set of abilities a server may offer in a dialect."""
    found = []
    for chosen in chain.from_iterable(combinations(ABILITIES, n) for n in range(9)):
        offered = F.HAS_FLAGS
        for ability in chosen:
            offered |= ability
        illegal = (
            (F.SEND_FAST_ZERO in offered and F.SEND_WRITE_ZEROES not in offered)
            or (F.SEND_DF in offered and dialect is Dialect.SIMPLE)
            or (F.BLOCK_STATUS_PAYLOAD in offered and dialect is not Dialect.EXTENDED)
        )
        if not illegal:
            found.append(offered)
    return found


# --- the matrix --------------------------------------------------------------------------------


def legal_flags(command: Command, dialect: Dialect, offered: TransmissionFlag) -> int:
    """proto.md, "Command flags"."""
    conditions = {
        C.FUA: F.SEND_FUA in offered,  # "valid for all commands"
        C.NO_HOLE: command is ZEROES,
        C.DF: command is READ and F.SEND_DF in offered,
        C.REQ_ONE: command is STATUS,
        C.FAST_ZERO: command is ZEROES and F.SEND_FAST_ZERO in offered,
        C.PAYLOAD_LEN: (command is WRITE and dialect is Dialect.EXTENDED)
        or (command is STATUS and F.BLOCK_STATUS_PAYLOAD in offered),
    }
    return sum(int(flag) for flag, legal in conditions.items() if legal)


def expected_offer(
    command: Command, flags: int, dialect: Dialect, offered: TransmissionFlag, contexts: bool
) -> Errno | None:
    legal = legal_flags(command, dialect, offered)
    needed = {FLUSH: F.SEND_FLUSH, TRIM: F.SEND_TRIM, ZEROES: F.SEND_WRITE_ZEROES}.get(command)
    if flags & C.PAYLOAD_LEN and not legal & C.PAYLOAD_LEN:
        return Errno.EINVAL  # "for other commands, the flag will trigger an NBD_EINVAL error"
    if command in {WRITE, TRIM, ZEROES} and F.READ_ONLY in offered:
        return Errno.EPERM  # "a write or trim request on a read-only export"
    if needed is not None and needed not in offered:
        return Errno.EINVAL
    if flags | legal != legal:
        return Errno.EINVAL  # "an unknown command flag", "not explicitly documented"
    if command is WRITE and dialect is Dialect.EXTENDED and not flags & C.PAYLOAD_LEN:
        return Errno.EINVAL  # "the flag MUST be set for NBD_CMD_WRITE"
    if command is STATUS and not contexts:
        return Errno.EINVAL
    return None


@pytest.mark.parametrize("dialect", Dialect, ids=lambda d: d.name)
@pytest.mark.parametrize("command", SERVED, ids=lambda c: c.name)
def test_every_flag_in_every_dialect_against_every_offer(
    command: Command, dialect: Dialect
) -> None:
    length = 0 if command is FLUSH else 4096
    for offered, contexts in product(offers(dialect), (True, False)):
        judge = rules(offered, dialect, contexts=contexts)
        for flags in COMMAND_FLAGS:
            expected = expected_offer(command, flags, dialect, offered, contexts)
            actual = verdict(judge, request(command, flags, 0, length))
            assert expected == actual, (offered, f"{flags:#x}", contexts)


RANGES = {
    "first byte": (0, 1),
    "all": (0, SIZE),
    "last byte": (SIZE - 1, 1),
    "nothing": (0, 0),
    "nothing at the end": (SIZE, 0),
    "one byte too far": (SIZE - 1, 2),
    "behind the end": (SIZE, 1),
    "nothing behind the end": (SIZE + 1, 0),
    "32 bits": (0, WHOLE),
    "32 bits less a sector": (0, 0xFFFFFE00),
    "sum of 64 bits": (BIG, 1),
    "everything": (BIG, BIG),
    "end at 64 bits": (1 << 63, 1 << 63),
}


def expected_range(command: Command, offset: int, length: int) -> Errno | None:
    if command is FLUSH:
        return Errno.EINVAL if offset or length else None
    if offset + length > SIZE:
        return Errno.ENOSPC if command in {WRITE, ZEROES} else Errno.EINVAL
    if command is STATUS and not length:
        return Errno.EINVAL
    return None


@pytest.mark.parametrize(("offset", "length"), RANGES.values(), ids=RANGES.keys())
@pytest.mark.parametrize("dialect", Dialect, ids=lambda d: d.name)
@pytest.mark.parametrize("command", SERVED, ids=lambda c: c.name)
def test_every_command_at_every_edge_of_the_export(
    command: Command, dialect: Dialect, offset: int, length: int
) -> None:
    """CVE-2025-47711, CVE-2025-47712: lengths about 2^32 and sums about 2^64 wrap nowhere."""
    flags = C.PAYLOAD_LEN if command is WRITE and dialect is Dialect.EXTENDED else 0
    offered = EVERYTHING if dialect is Dialect.EXTENDED else EVERYTHING & ~F.BLOCK_STATUS_PAYLOAD
    judge = rules(offered, dialect)
    expected = expected_range(command, offset, length)
    assert expected == verdict(judge, request(command, flags, offset, length))


@given(
    st.integers(0, 2**16 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(0, BIG),
    st.integers(0, BIG),
    st.sampled_from(Dialect),
    st.sampled_from([1, 512, 65536]),
)
def test_a_request_of_any_kind_is_judged(
    command: int, flags: int, offset: int, length: int, dialect: Dialect, minimum: int
) -> None:
    """CVE-2005-3534: no header, however wild, is more than an error; what passes is in range."""
    judge = rules(dialect=dialect, sizes=BlockSizes(minimum, 65536, 1 << 25))
    asked = request(command, flags, offset, length)
    actual = verdict(judge, asked)
    assert actual in {None, Errno.EINVAL, Errno.ENOSPC, Errno.EOVERFLOW}
    payload_form = command == STATUS and flags & C.PAYLOAD_LEN
    if actual is None and not payload_form:
        assert offset + length <= SIZE


# --- commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [8, 9, 255, 32768, 65535])
@pytest.mark.parametrize("dialect", Dialect, ids=lambda d: d.name)
def test_unknown_commands_are_invalid_even_read_only_and_out_of_range(
    dialect: Dialect, command: int
) -> None:
    for offered in (EVERYTHING, EVERYTHING | F.READ_ONLY):
        for offset, length in ((0, 0), (BIG, BIG)):
            asked = request(command, C.FUA, offset, length)
            assert Errno.EINVAL is verdict(rules(offered, dialect), asked)


@pytest.mark.parametrize("command", SERVED, ids=lambda c: c.name)
def test_fua_is_legal_on_every_command_once_offered_and_on_none_before(command: Command) -> None:
    flags = C.FUA | (C.PAYLOAD_LEN if command is WRITE else 0)
    asked = request(command, flags, 0, 0 if command is FLUSH else 512)
    assert verdict(rules(), asked) is None
    assert Errno.EINVAL is verdict(rules(EVERYTHING & ~F.SEND_FUA), asked)


@pytest.mark.parametrize("command", [WRITE, TRIM, ZEROES], ids=lambda c: c.name)
@pytest.mark.parametrize("offset", [0, SIZE], ids=["inside", "beyond the end"])
def test_a_read_only_export_permits_no_change_anywhere(command: Command, offset: int) -> None:
    """Before the range is looked at, and before an offer that a read-only export never makes."""
    for offered in (EVERYTHING, F.HAS_FLAGS):
        judge = rules(offered | F.READ_ONLY, Dialect.STRUCTURED)
        assert Errno.EPERM is verdict(judge, request(command, 0, offset, 512))


@pytest.mark.parametrize("command", [READ, FLUSH, CACHE, STATUS], ids=lambda c: c.name)
def test_a_read_only_export_permits_all_else(command: Command) -> None:
    length = 0 if command is FLUSH else 512
    assert verdict(rules(EVERYTHING | F.READ_ONLY), request(command, 0, 0, length)) is None


def test_cache_is_served_though_not_offered_but_without_flags() -> None:
    judge = rules(F.HAS_FLAGS, Dialect.SIMPLE, contexts=False)
    assert verdict(judge, request(CACHE, 0, 0, 512)) is None
    for flag in CommandFlag:
        assert Errno.EINVAL is verdict(judge, request(CACHE, flag, 0, 512))


def test_fast_zero_that_was_not_offered_is_invalid() -> None:
    """nbdkit 1.32 and 1.42 abort the whole server here."""
    judge = rules(EVERYTHING & ~F.SEND_FAST_ZERO)
    assert Errno.EINVAL is verdict(judge, request(ZEROES, C.FAST_ZERO, 0, 512))


def test_a_fast_zero_is_never_too_long() -> None:
    judge = rules(size=1 << 50)
    assert verdict(judge, request(ZEROES, C.FAST_ZERO | C.NO_HOLE, 0, 1 << 50)) is None


def test_no_hole_comes_with_write_zeroes_whether_trim_is_offered_or_not() -> None:
    judge = rules(F.HAS_FLAGS | F.SEND_WRITE_ZEROES, Dialect.SIMPLE)
    assert verdict(judge, request(ZEROES, C.NO_HOLE, 0, 512)) is None


def test_status_without_contexts_is_invalid() -> None:
    for dialect in Dialect:
        judge = rules(dialect=dialect, contexts=False)
        assert Errno.EINVAL is verdict(judge, request(STATUS, 0, 0, 512))


@pytest.mark.parametrize(("offset", "length"), [(1, 0), (0, 1), (BIG, BIG), (512, 512)])
def test_flush_takes_no_range(offset: int, length: int) -> None:
    assert Errno.EINVAL is verdict(rules(), request(FLUSH, 0, offset, length))


# --- sizes -------------------------------------------------------------------------------------

LIMITED = BlockSizes(512, 4096, 1 << 16)


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        (Dialect.SIMPLE, Errno.EINVAL),
        (Dialect.STRUCTURED, Errno.EOVERFLOW),
        (Dialect.EXTENDED, Errno.EOVERFLOW),
    ],
    ids=["simple", "structured", "extended"],
)
@pytest.mark.parametrize("flags", [0, C.DF], ids=["plain", "df"])
def test_a_read_beyond_the_maximum_is_refused(
    dialect: Dialect, expected: Errno, flags: int
) -> None:
    """CVE-2005-3534, CVE-2011-0530: the reply's buffer is bounded before it is made."""
    if dialect is Dialect.SIMPLE and flags:
        flags = 0
    judge = rules(dialect=dialect, sizes=LIMITED)
    assert verdict(judge, request(READ, flags, 0, 1 << 16)) is None
    assert expected is verdict(judge, request(READ, flags, 0, (1 << 16) + 512))


@pytest.mark.parametrize("command", [TRIM, CACHE, ZEROES, STATUS], ids=lambda c: c.name)
def test_requests_without_data_may_exceed_the_maximum(command: Command) -> None:
    judge = rules(size=1 << 50, sizes=LIMITED)
    assert verdict(judge, request(command, 0, 0, 1 << 50)) is None


def test_an_unlimited_maximum_still_keeps_reads_below_four_gigabytes() -> None:
    judge = rules(size=1 << 50, sizes=BlockSizes(1, 4096, WHOLE))
    assert verdict(judge, request(READ, 0, 0, WHOLE)) is None
    assert Errno.EOVERFLOW is verdict(judge, request(READ, 0, 0, WHOLE + 1))


@pytest.mark.parametrize(
    ("offset", "length", "aligned"),
    [
        (0, 512, True),
        (512, 1024, True),
        (0, 0, True),
        (1, 512, False),
        (0, 511, False),
        (0, 513, False),
        (511, 1, False),
        (SIZE - 512, 300, False),
        (SIZE - 512, 812, True),  # the tail of an export that is no multiple
        (SIZE, 300, True),
        (SIZE + 1, 299, False),
    ],
)
@pytest.mark.parametrize("command", [READ, WRITE, TRIM, ZEROES, CACHE], ids=lambda c: c.name)
def test_alignment_is_demanded_but_for_the_odd_tail(
    command: Command, offset: int, length: int, aligned: bool
) -> None:
    judge = rules(size=SIZE + 300, sizes=LIMITED, dialect=Dialect.STRUCTURED)
    expected = None if aligned else Errno.EINVAL
    assert expected is verdict(judge, request(command, 0, offset, length))


def test_misalignment_is_told_before_the_end() -> None:
    judge = rules(sizes=LIMITED, dialect=Dialect.STRUCTURED)
    assert Errno.EINVAL is verdict(judge, request(WRITE, 0, SIZE, 1))
    assert Errno.ENOSPC is verdict(judge, request(WRITE, 0, SIZE, 512))
