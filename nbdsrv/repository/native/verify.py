"""Verification of a repository, as deep and for as long as is asked. Blocking.

::

    structure   points, maps, directories and index agree                reads no chunk
    packs       + every pack hashes to its name                          reads everything, no key
    chunks      + every entry opens, and its content hashes to its id    and unpacks it

    census ── maps ── directories ── index ── packs, from where the last run stopped ── hurts whom?

Packs are read in the order of their names, round and round: what was checked longest ago comes
next. A run may end early, by a budget or by kill -9; the next one goes on there (``scrub``). It
writes nothing but that.
"""

import math
import time
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from nbdsrv.repository.native.abreast import threads_for
from nbdsrv.repository.native.boot_trace import useless_traces
from nbdsrv.repository.native.census import THREADS, Census
from nbdsrv.repository.native.damage import Finding, Note, is_denied
from nbdsrv.repository.native.hurt import trace
from nbdsrv.repository.native.layout import pack_of
from nbdsrv.repository.native.point import PointRecord
from nbdsrv.repository.native.scrub import Round, Scrubbing
from nbdsrv.repository.native.tombstones import standing
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.native.verify_maps import (
    HEAL,
    MapWalk,
    check_directories,
    check_index,
)
from nbdsrv.repository.native.verify_packs import Examined, examine
from nbdsrv.store.store import Stored, StoreError

__all__ = ["LEVELS", "Budget", "Verified", "all_disks", "verify"]

LEVELS = ("structure", "packs", "chunks")
SAVE_S = 30.0
"""Seconds after which a run notes how far it has come."""
INTACT = "all its entries are intact; `nbdsrv gc` moves them into a new pack"
KEYLESS = "verify with the passphrase to see which entries of it, and whom that hurts"
MAX_READERS = 4
"""Packs that are read at a time, each held in memory."""


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop reading packs; None: never.

    Attributes:
        sample: percent of all packs.
        seconds: since the beginning.
        bytes: that are read. The pack that exceeds it is read to its end.
    """

    sample: float | None = None
    seconds: float | None = None
    bytes: int | None = None


UNLIMITED = Budget()


@dataclass(slots=True)
class Verified:
    """What was checked and found.

    Attributes:
        level: one of ``LEVELS``.
        points: that were read.
        disks: whose maps were.
        packs: of which the check is about.
        checked: packs that were read and hashed.
        entries: of them that were opened.
        read_bytes: of them.
        completed: all packs have been checked in this run, or with it in those before.
        findings: what is broken.
        notes: what is not.
        unread: what the store could not give: neither sound nor broken.
        last_round: when all packs had been checked before, seconds since 1970; 0: never.
    """

    level: str
    points: int = 0
    disks: int = 0
    packs: int = 0
    checked: int = 0
    entries: int = 0
    read_bytes: int = 0
    completed: bool = True
    findings: list[Finding] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    last_round: float = 0


def all_disks(record: PointRecord) -> Iterable[str]:
    """The names of all disks of a point."""
    return [disk.name for disk in record.disks]


def verify(
    vault: Vault,
    level: str = "structure",
    *,
    chosen: Callable[[PointRecord], Iterable[str]] | None = None,
    budget: Budget = UNLIMITED,
    keyless: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    advance: Callable[[int, int], None] = lambda _, __: None,
) -> Verified:
    """Verify a repository, or what some of its points refer to.

    Args:
        vault: the repository.
        level: one of ``LEVELS``; each contains those before it.
        chosen: the names of a point's disks that are meant; None for everything.
        budget: when to stop reading packs.
        keyless: the vault has no key, though it should: packs are hashed, nothing else.
        tell: of each step; for people.
        advance: called with the bytes of packs that have been read, and those that will be.

    Raises:
        StoreError: the store does not answer.
    """
    run = _Run(vault, level, chosen, budget, keyless=keyless, tell=tell)
    run.structure()
    if level != "structure":
        run.read_packs(advance)
    run.conclude()
    return run.done


class _Run:
    def __init__(
        self,
        vault: Vault,
        level: str,
        chosen: Callable[[PointRecord], Iterable[str]] | None,
        budget: Budget,
        *,
        keyless: bool,
        tell: Callable[[str], None],
    ) -> None:
        self._vault = vault
        self._level = level
        self._chosen = chosen
        self._budget = budget
        self._keyless = keyless
        self._tell = tell
        self._began = time.monotonic()
        self._saved = self._began
        self._scrubbing = Scrubbing(vault.store)
        self._unread: dict[str, None] = {}
        self._census = Census(vault, self._unread)
        self._threads = ThreadPoolExecutor(threads_for(vault.store, THREADS), "nbdsrv-verify")
        self._walk = MapWalk(vault, self._census, self._threads, chosen or all_disks, self._unread)
        self.done = Verified(level)

    # --- structure -----------------------------------------------------------------------------

    def structure(self) -> None:
        """Points, maps, directories, index."""
        walk, census, done = self._walk, self._census, self.done
        with self._threads:
            if not self._keyless:
                self._tell("maps")
                objects = self._vault.point_objects()
                census.recount()
                walk.walk(objects)
        done.points, done.disks = walk.found.points, walk.disks
        self._tell("directories")
        packs = self._packs()
        done.packs = len(packs)
        sums = check_directories(walk, census, packs)
        done.findings += walk.findings
        if self._chosen is None:
            check_index(census, sums, done.findings, done.notes)
            if not self._keyless:
                self._note_garbage()
                self._note_traces()
            with self._going_on():
                self._check_tombstones()
        self._note_missed()

    def _packs(self) -> list[Stored]:
        """Those that the check is about, by name."""
        packs = self._census.packs
        live = self._walk.found.live
        names = packs.keys() if self._chosen is None else packs.keys() & live.keys()
        return [packs[name] for name in sorted(names)]

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """What may not be read is told, and is no reason to look no further."""
        try:
            yield
        except StoreError as error:
            if not is_denied(error):
                raise
            self._unread[str(error)] = None

    def _note_garbage(self) -> None:
        census, live = self._census, self._walk.found.live
        idle = [
            stored
            for name, stored in census.first.items()
            if name in census.packs and name not in live
        ]
        if idle and not self._walk.blind:
            size = sum(stored.size for stored in idle)
            text = f"no point refers to {len(idle)} packs, {size} bytes; `nbdsrv gc` removes them"
            self.done.notes.append(Note("packs/", text))

    def _note_traces(self) -> None:
        for key, why in useless_traces(self._vault):
            text = f"a boot trace of no use: {why}; `nbdsrv gc` removes it"
            self.done.notes.append(Note(key, text))

    def _check_tombstones(self) -> None:
        for each in standing(self._vault.store):
            if not each.readable:
                text = "a tombstone that cannot be read; it condemns nothing"
                self.done.findings.append(
                    Finding(each.key, None, text, advice="`nbdsrv gc` removes it")
                )

    def _note_missed(self) -> None:
        """Points that others remember. Pruning leaves such gaps, and so does who hides a point."""
        for group, points in sorted(self._walk.previous.items()):
            there = {id_ for id_, _ in points}
            missed = sorted({before for _, before in points if before} - there)
            if missed:
                text = f"{group}: {len(missed)} points that later ones follow are not there any"
                text += f" more, the last of them {missed[-1]}: pruned, or hidden"
                self.done.notes.append(Note("points/", text))

    # --- packs ---------------------------------------------------------------------------------

    def read_packs(self, advance: Callable[[int, int], None]) -> None:
        """Read packs: those known to be damaged, then those that were checked longest ago."""
        packs = self._packs()
        state = self._scrubbing.round(self._level) if self._chosen is None else Round()
        self.done.last_round = state.completed
        again, turn = _in_turn(packs, state.cursor, self._scrubbing.state.damaged.keys())
        wanted = len(packs)
        if self._budget.sample is not None:
            wanted = min(wanted, math.ceil(wanted * self._budget.sample / 100))
        end = max((stored.key for stored in turn), key=_name_of, default="")
        self.done.completed = not turn
        self._tell("packs")
        chosen = [*again.values(), *turn][: max(wanted, len(again))]
        total = sum(stored.size for stored in chosen)
        for examined in self._examined(chosen):
            self._account(examined)
            advance(self.done.read_bytes, min(total, self._budget.bytes or total))
            if examined.stored.key not in again:
                state.cursor = examined.name.hex()
            if examined.stored.key == end:
                state.cursor, state.completed, state.began = "", time.time(), time.time()
                self.done.completed = True
            if time.monotonic() - self._saved > SAVE_S:
                self._save()
        if self.done.checked >= len(packs):
            self.done.completed = True

    def _examined(self, packs: list[Stored]) -> Iterator[Examined]:
        """Packs as they are checked, in their order, a few at a time, within the budget."""
        waiting: list[Future[Examined]] = []
        rest = iter(packs)
        planned = 0
        with ThreadPoolExecutor(MAX_READERS, "nbdsrv-packs") as threads:
            while True:
                while len(waiting) < MAX_READERS + 1 and not self._spent(planned):
                    stored = next(rest, None)
                    if stored is None:
                        break
                    planned += stored.size
                    waiting.append(threads.submit(self._examine, stored))
                if not waiting:
                    return
                yield waiting.pop(0).result()

    def _spent(self, planned: int) -> bool:
        budget = self._budget
        late = budget.seconds is not None and time.monotonic() - self._began >= budget.seconds
        return late or (budget.bytes is not None and planned >= budget.bytes)

    def _examine(self, stored: Stored) -> Examined:
        return examine(
            self._vault,
            stored,
            entries=self._level == "chunks",
            keyless=self._keyless,
        )

    def _account(self, examined: Examined) -> None:
        done = self.done
        if examined.unread:
            self._unread[examined.unread] = None
            return
        done.checked += 1
        done.read_bytes += examined.length
        done.entries += examined.entries
        if examined.broken:
            self._found(examined)
        else:
            self._scrubbing.sound(examined.name)

    def _found(self, examined: Examined) -> None:
        """A pack is broken: all of it, some entries, or nothing that matters."""
        key, bad = examined.stored.key, self._walk.bad
        self._scrubbing.damaged(examined.name, key, examined.broken)
        if examined.unreadable:
            bad.whole(examined.name, Finding(key, None, examined.broken, advice=HEAL))
        for offset, text in examined.parts:
            bad.part(examined.name, offset, Finding(key, offset, text, advice=HEAL))
        if not examined.unreadable and not examined.parts:
            advice = KEYLESS if self._keyless else INTACT
            self.done.findings.append(Finding(key, None, examined.broken, advice=advice))

    # --- the end -------------------------------------------------------------------------------

    def conclude(self) -> None:
        """Whom the damage hurts; and what is remembered of it."""
        walk, done = self._walk, self.done
        if not self._keyless and (walk.bad or walk.found.damage or walk.found.missing_count):
            self._tell("whom it hurts")
            self._census = Census(self._vault, self._unread)
            trace(self._vault, self._census, walk.bad)
        done.findings += walk.bad.findings
        done.unread = list(self._unread)
        named = set()
        for finding in walk.bad.findings:
            name = pack_of(finding.key)
            if name is not None:  # one that is missing too: a parent's map may lead there
                self._scrubbing.damaged(name, finding.key, finding.text)
                named.add(name.hex())
        if self._chosen is None and not self._keyless:
            there = {name.hex() for name in self._census.packs}
            for text in self._scrubbing.state.damaged.keys() - there - named:
                self._scrubbing.sound(bytes.fromhex(text))
        if self._level != "structure" or walk.bad.findings:
            self._save()

    def _save(self) -> None:
        """Where a repository may only be read, nothing is remembered."""
        self._saved = time.monotonic()
        try:
            self._scrubbing.save()
        except StoreError as error:
            note = Note("scrub/", f"what was checked is not remembered: {error}")
            if note not in self.done.notes:
                self.done.notes.append(note)


def _in_turn(
    packs: list[Stored], cursor: str, damaged: Container[str]
) -> tuple[dict[str, Stored], list[Stored]]:
    """Packs that are known to be damaged, by key; and the others, from the cursor on and round."""
    again = {stored.key: stored for stored in packs if _name_of(stored.key) in damaged}
    rest = [stored for stored in packs if stored.key not in again]
    before = [stored for stored in rest if _name_of(stored.key) <= cursor]
    return again, [*rest[len(before) :], *before]


def _name_of(key: str) -> str:
    return key[-67:-3]
