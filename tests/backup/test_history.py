"""Whatever a guest does to its disk, every point reads as the disk did when it was made."""

from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdsrv.backup.engine import Order
from nbdsrv.backup.plan import Mode
from nbdsrv.repository.native.entry import ENTRY_SIZE
from nbdsrv.repository.native.frames import frame_count
from nbdsrv.repository.native.vault import Vault
from tests.backup.tracked import BITMAP, Guest, back_up
from tests.disk.threads import running_workers
from tests.repository.native.read_back import KIB, MIB, fresh_vault, listed, read_back

CHUNK = 64 * KIB
SIZES = st.integers(0, 40).map(lambda n: n * CHUNK) | st.integers(1, 40 * CHUNK)
OFFSETS = st.integers(0, 40 * CHUNK) | st.integers(0, 40).map(lambda n: n * CHUNK)
LENGTHS = st.integers(1, 5 * CHUNK) | st.integers(1, 40).map(lambda n: n * CHUNK)
DEED = (
    st.tuples(st.just("write"), OFFSETS, LENGTHS, st.integers(0, 5))
    | st.tuples(st.just("discard"), OFFSETS, LENGTHS)
    | st.tuples(st.just("resize"), SIZES)
    | st.tuples(st.just("backup"), st.sampled_from(["scan", "changed", "full"]))
)


def do(guest: Guest, deed: Sequence[Any]) -> None:
    if deed[0] == "write":
        _, offset, length, kind = deed
        block = bytes([kind]) if kind < 3 else bytes(range(kind, 251))
        guest.write(offset, (block * (length // len(block) + 1))[:length])
    elif deed[0] == "discard":
        guest.discard(deed[1], deed[2])
    elif deed[0] == "resize":
        guest.resize(deed[1])


@given(
    size=SIZES,
    deeds=st.lists(DEED, max_size=12),
    cipher=st.sampled_from([None, "aes-256-gcm"]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
async def test_every_point_of_a_history_reads_as_the_disk_did(
    size: int, deeds: list[Sequence[Any]], cipher: str | None
) -> None:
    vault = fresh_vault(chunk=CHUNK, page_slots=16, cipher=cipher)
    guest = Guest(bytearray(size))
    past: dict[str, bytes] = {}
    async with running_workers() as workers:
        for deed in [("backup", "scan"), *deeds, ("backup", "changed")]:
            if deed[0] != "backup":
                do(guest, deed)
                continue
            order = Order("vm")
            if past and deed[1] == "changed":
                order = Order("vm", since=listed(vault)[-1].id, changed=BITMAP, recheck=100)
            elif deed[1] == "full":
                order = Order("vm", since="full")
            report = await back_up(workers, vault, guest, order)
            (disk,) = report.disks
            assert disk.recheck_mismatches == 0
            if past and deed[1] == "changed":
                assert disk.mode == Mode.INCREMENTAL
            past[disk.point] = bytes(guest.content)
            guest.backed_up()
    assert {record.id: read_back(vault, record) for record in listed(vault)} == past


@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=20, deadline=None)
async def test_accounts_add_up(seed: int) -> None:
    """Every byte of a disk is new, a duplicate, zero or unchanged; once."""
    from tests.backup.tracked import chance

    dice = chance(seed)
    vault = fresh_vault(chunk=CHUNK, page_slots=16)
    guest = Guest(bytearray(dice.randbytes(MIB + 5)))
    async with running_workers() as workers:
        for _ in range(3):
            order = Order("vm", since="full", level=0)
            if points := listed(vault):
                order = Order("vm", since=points[-1].id, changed=BITMAP, level=0)
            report = await back_up(workers, vault, guest, order)
            (disk,) = report.disks
            chunks = -(-len(guest.content) // CHUNK)
            new = len(guest.content) - (
                disk.duplicate_bytes + disk.zero_bytes + disk.unchanged_bytes
            )
            assert new <= disk.new_bytes <= new + chunks * (ENTRY_SIZE + 18 * frame_count(CHUNK))
            guest.backed_up()
            guest.write(dice.randrange(MIB), dice.randbytes(3 * CHUNK))
            guest.discard(dice.randrange(MIB), 2 * CHUNK)


async def test_a_zeroed_range_comes_back_as_zero() -> None:
    """Zero is data: where the parent has something else, the point says zero."""
    vault: Vault = fresh_vault(chunk=CHUNK)
    guest = Guest(bytearray(b"\xaa" * (4 * MIB)))
    async with running_workers() as workers:
        first = await back_up(workers, vault, guest)
        guest.backed_up()
        guest.write(MIB, bytes(CHUNK))  # zeroes that were written
        guest.discard(2 * MIB, MIB)  # a hole
        guest.write(3 * MIB + 5, bytes(CHUNK))  # not whole chunks
        order = Order("vm", since=first.disks[0].point, changed=BITMAP)
        report = await back_up(workers, vault, guest, order)
    (disk,) = report.disks
    assert disk.mode == Mode.INCREMENTAL
    assert disk.zero_bytes == MIB + CHUNK
    assert disk.read_bytes == 3 * CHUNK
    record = listed(vault)[-1]
    assert read_back(vault, record) == guest.content
    content = read_back(vault, record)
    assert not any(content[2 * MIB : 3 * MIB])
