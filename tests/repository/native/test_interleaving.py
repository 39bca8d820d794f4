"""Writers, readers, pruning and collectors at work in any order: no point is ever lost.

The writers are the real ones; collectors go one call of the store at a time, so that everything
else may happen between any two of them. The clock is the store's and set by the test.
"""

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from nbdsrv.cli.running import delivering
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, PointMissing, RepositoryError
from nbdsrv.repository.native.collect import collect
from nbdsrv.repository.native.layout import (
    CONDEMNED,
    INDEX,
    LEASES,
    METAS,
    PACKS,
    POINTS,
    point_key,
)
from nbdsrv.repository.native.point import PointRecord
from nbdsrv.repository.native.slots import Page, Root
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.native.verify import verify
from nbdsrv.repository.native.writer import NativePointWriter, begin
from nbdsrv.store.faulty import Crashed
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import ObjectMissing, Store
from tests.repository.native.building import CHUNK
from tests.repository.native.read_back import fresh_vault, read_back
from tests.repository.native.stepped import SteppedRun
from tests.repository.native.test_collect import Time, keys

CHUNKS = 20
"""Of a disk: two pages."""
CONTENTS = [bytes(CHUNK), *(random.Random(seed).randbytes(CHUNK) for seed in range(10))]
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0

some_chunks = st.lists(
    st.tuples(st.integers(0, CHUNKS - 1), st.integers(0, len(CONTENTS) - 1)), min_size=1, max_size=8
)


@dataclass
class Writing:
    """A writer at work, and what its disk must become."""

    writer: NativePointWriter
    disk: bytearray
    told: set[int] = field(default_factory=set)


@dataclass
class Reading:
    """Who opened a point long ago: the maps as they were read then."""

    vault: Vault
    record: PointRecord
    root: Root
    pages: list[Page]
    disk: bytes


class Repository(RuleBasedStateMachine):
    """One repository, everybody at once."""

    def __init__(self) -> None:
        super().__init__()
        self.time = Time()
        self.store = MemoryStore(self.time)
        self.vault = fresh_vault(self.store)
        self.loop = asyncio.new_event_loop()
        self.workers = Workers()
        self.points: dict[str, tuple[PointRecord, bytes]] = {}
        self.pruned: list[PointRecord] = []
        self.writers: dict[int, Writing] = {}
        self.readers: list[Reading] = []
        self.collectors: dict[int, SteppedRun] = {}

    def do(self, coroutine):
        async def main():
            with delivering(self.workers):
                return await coroutine

        return self.loop.run_until_complete(main())

    def opened(self, store: Store | None = None) -> Vault:
        return Vault(store or self.store, self.vault.config, None)

    # --- writers -------------------------------------------------------------------------------

    @rule(which=st.integers(0, 1), choice=st.integers(0, 9), full=st.booleans())
    def begin(self, which: int, choice: int, full: bool) -> None:
        if which in self.writers:
            return
        self.time.now += 1
        known = list(self.points.values())
        parent = None if full or not known else known[choice % len(known)]
        record = parent[0] if parent else None
        writer = self.do(begin(self.opened(), self.workers, "vm", record))
        self.do(writer.disk("disk", CHUNKS * CHUNK))
        disk = bytearray(parent[1]) if parent else bytearray(CHUNKS * CHUNK)
        self.writers[which] = Writing(writer, disk)

    @precondition(lambda self: self.pruned)
    @rule(choice=st.integers(0, 9))
    def begin_from_a_point_that_is_gone(self, choice: int) -> None:
        record = self.pruned[choice % len(self.pruned)]
        with pytest.raises(PointMissing):
            self.do(begin(self.opened(), self.workers, "vm", record))

    @precondition(lambda self: self.writers)
    @rule(which=st.integers(0, 1), chunks=some_chunks)
    def write(self, which: int, chunks: list[tuple[int, int]]) -> None:
        writing = self.writers.get(which)
        if writing is None:
            return
        self.time.now += 1
        disk = writing.writer._disks["disk"]
        for index, number in chunks:
            if index in writing.told:
                continue
            writing.told.add(index)
            content = CONTENTS[number]
            self.do(disk.data(index * CHUNK, bytearray(content), CHUNK))
            writing.disk[index * CHUNK : (index + 1) * CHUNK] = content

    @precondition(lambda self: self.writers)
    @rule(which=st.integers(0, 1))
    def commit(self, which: int) -> None:
        writing = self.writers.pop(which, None)
        if writing is None:
            return
        try:
            record = self.do(writing.writer.commit_record())
        except RepositoryError as error:
            # A parent's chunk lies in a pack that is condemned: the engine would read its source.
            # Or its lease has lapsed. Nothing is visible.
            self.expected(error, "lease", "source")
            self.do(writing.writer.abort())
        else:
            self.points[record.id] = record, bytes(writing.disk)
        self.check()

    @precondition(lambda self: self.writers)
    @rule(which=st.integers(0, 1))
    def abort(self, which: int) -> None:
        writing = self.writers.pop(which, None)
        if writing is not None:
            self.do(writing.writer.abort())

    @precondition(lambda self: self.writers)
    @rule(which=st.integers(0, 1))
    def die(self, which: int) -> None:
        writing = self.writers.pop(which, None)
        if writing is not None:
            writing.writer._lease._stop.set()
            writing.writer._lease._thread.join()

    # --- readers -------------------------------------------------------------------------------

    @precondition(lambda self: self.points)
    @rule(choice=st.integers(0, 9))
    def open(self, choice: int) -> None:
        record, disk = list(self.points.values())[choice % len(self.points)]
        vault = self.opened()
        list(vault._elsewhere(bytes(32)))  # its index is as old as itself
        root = vault.root(record.disks[0].root)
        pages = [vault.page(root, number) for number in range(len(root))]
        self.readers = [*self.readers[-2:], Reading(vault, record, root, pages, disk)]

    @precondition(lambda self: self.readers)
    @rule()
    def read(self) -> None:
        for reading in self.readers:
            for number, page in enumerate(reading.pages):
                for index, id_, place in page.places():
                    at = number * reading.root.page_span + index * CHUNK
                    try:
                        content = reading.vault.chunk(id_, place, CHUNK)
                    except CorruptImage:
                        assert reading.record.id not in self.points
                    else:
                        assert content == reading.disk[at : at + CHUNK]

    # --- care ----------------------------------------------------------------------------------

    @precondition(lambda self: self.points)
    @rule(choice=st.integers(0, 9))
    def prune(self, choice: int) -> None:
        id_ = list(self.points)[choice % len(self.points)]
        record, _ = self.points.pop(id_)
        self.pruned.append(record)
        self.store.delete(point_key(record.group, record.id))

    @precondition(lambda self: not self.collectors)
    @rule()
    def collect_at_once(self) -> None:
        self.collector_begins(0, 0.0)
        self.collector_ended(0)

    @rule(which=st.integers(0, 1), grace=st.sampled_from([0.0, HOUR, DAY]))
    def collector_begins(self, which: int, grace: float) -> None:
        if which in self.collectors:
            return

        def work(store: Store) -> None:
            collect(self.opened(store), grace_s=grace, repack_below=70)

        self.collectors[which] = SteppedRun(self.store, work)

    @precondition(lambda self: self.collectors)
    @rule(which=st.integers(0, 1), calls=st.integers(1, 25))
    def collector_goes_on(self, which: int, calls: int) -> None:
        run = self.collectors.get(which)
        if run is None:
            return
        run.step(calls)
        if run.ended:
            self.collector_ended(which)
        self.check()

    @precondition(lambda self: self.collectors)
    @rule(which=st.integers(0, 1))
    def collector_finishes(self, which: int) -> None:
        if which in self.collectors:
            self.collector_ended(which)

    @precondition(lambda self: self.collectors)
    @rule(which=st.integers(0, 1))
    def collector_dies(self, which: int) -> None:
        run = self.collectors.pop(which, None)
        if run is not None:
            run.kill()
            assert run.ended
            assert run.error is None or isinstance(run.error, Crashed | RepositoryError)
            self.check()

    def collector_ended(self, which: int) -> None:
        run = self.collectors.pop(which)
        run.finish()
        if run.error is not None:
            # It may have slept until its lease was tidied away, and find that out in any call.
            gone = isinstance(run.error, ObjectMissing) and LEASES in str(run.error)
            if not gone:
                self.expected(run.error, "collector", "lease")
        self.check()

    def expected(self, error: BaseException, *words: str) -> None:
        """A refusal that may be, for one of these reasons; not any other."""
        if not isinstance(error, RepositoryError) or not any(word in str(error) for word in words):
            raise error

    # --- time ----------------------------------------------------------------------------------

    @rule(minutes=st.sampled_from([1, 70, 25 * 60]), asleep=st.booleans())
    def pass_time(self, minutes: int, asleep: bool) -> None:
        """Everybody keeps the lease fresh, or is asleep and must notice."""
        left = minutes
        while left > 0:
            step = left if asleep else min(left, 30)
            self.time.now += step * MINUTE
            left -= step
            if not asleep:
                for writing in self.writers.values():
                    writing.writer._lease.refresh()

    # --- what must hold ------------------------------------------------------------------------

    def check(self) -> None:
        vault = self.opened()
        listed = {key[-29:-3] for key in keys(self.store, POINTS)}
        assert listed == set(self.points)
        for record, disk in self.points.values():
            assert read_back(vault, record) == disk

    def teardown(self) -> None:
        try:
            for which in list(self.collectors):
                self.collector_ended(which)
            for writing in self.writers.values():
                self.do(writing.writer.abort())
            self.check()
            for _ in range(2):
                self.time.now += 3 * DAY
                collect(self.opened(), grace_s=0, repack_below=70)
            self.check()
            assert keys(self.store, LEASES, CONDEMNED) == []
            assert len(keys(self.store, INDEX)) <= 1
            assert bool(keys(self.store, PACKS, METAS)) <= bool(self.points)
            done = verify(self.opened(), "chunks")
            assert done.findings == []
            assert [note for note in done.notes if note.key != POINTS] == []
        finally:
            self.workers.close()
            self.loop.close()


@pytest.mark.parametrize("inherits", [False, True], ids=["deduplicates", "inherits"])
def test_a_writer_begins_and_commits_between_any_two_calls_of_a_collector(
    *, inherits: bool
) -> None:
    """What it finds in packs that only a pruned point needed stays, whenever it comes."""
    first = play(inherits, 0, 0)
    for begins in range(0, first, STRIDE):
        for commits in range(begins, first + STRIDE, STRIDE):
            play(inherits, begins, commits)


STRIDE = 5


def play(inherits: bool, begins: int, commits: int) -> int:
    """Calls the collector made; the writer's work is done before calls of these numbers."""
    world = Repository()
    try:
        world.begin(0, 0, full=True)
        world.write(0, [(index, 1 + index % 9) for index in range(CHUNKS)])
        world.commit(0)
        world.begin(0, 0, full=True)
        world.write(0, [(0, 10)])
        world.commit(0)
        world.time.now += MINUTE
        if not inherits:
            world.prune(0)
        world.collector_begins(0, 0.0)
        run = world.collectors[0]
        run.step(begins)
        world.begin(0, 0, full=not inherits)
        if inherits:
            world.prune(0)
        else:
            world.write(0, [(3, 4), (7, 8)])
        world.check()
        run.step(commits - begins)
        world.write(0, [(1, 2)] if inherits else [(11, 3)])
        world.commit(0)
        world.check()
        world.collector_ended(0)
        made = run.store.calls
        assert len(world.points) == 2
    finally:
        world.teardown()
    return made


TestInterleaving = Repository.TestCase
TestInterleaving.settings = settings(
    settings.get_profile("full" if settings().max_examples > 500 else "quick"),
    max_examples=settings().max_examples if settings().max_examples > 500 else 40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
