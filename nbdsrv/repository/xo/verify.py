"""Looking for damage in a repository of Xen Orchestra.

::

    structure   every JSON, alias, header, footer, table, chain; every block of a table is there
    packs       also what blocks prove by themselves: tags of encrypted ones, checksums of gzip
    chunks      also every block unpacked and of the right length, and right by our checksums, if
                we wrote it; every chunk of an XVA against the checksum beside it

A disk is looked at once, however many points are made from it; what is broken in it hurts those
whose newer disks do not hide it.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.formats.turns import in_turns
from nbdsrv.repository.damage import Check, Finding, Hurt, Note
from nbdsrv.repository.repository import LEVELS, Point
from nbdsrv.repository.xo.chain import Chain, open_chain
from nbdsrv.repository.xo.checks import load_checks
from nbdsrv.repository.xo.disk_file import DiskFile
from nbdsrv.repository.xo.layers import BlockLayer, DirectoryLayer, RemoteLayer
from nbdsrv.repository.xo.layout import BAT, VHD
from nbdsrv.repository.xo.listing import Row
from nbdsrv.repository.xo.merging import Merge, read_merges, refused
from nbdsrv.repository.xo.records import DiskRecord
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.repository.xo.unproven import Unproven
from nbdsrv.repository.xo.verify_blocks import Broken, DiskExam
from nbdsrv.repository.xo.verify_xva import verify_xva
from nbdsrv.store.store import ObjectMissing

__all__ = ["verify"]

Advance = Callable[[int, int], None]
Merges = Mapping[str, Merge]

MAX_FINDINGS = 4096
"""Broken blocks of one disk that are named one by one."""
SUMS = "the disk itself may be whole, but nothing proves it; back up again"
TABLE = "our own reads know better; Xen Orchestra would restore old content: back up again"
MERGING = "let Xen Orchestra finish the merge: its next run for this VM does"
ADVICE = "the data is lost; a full backup of the VM makes points that do not need it"


@dataclass(slots=True)
class _Use:
    """A disk of a point."""

    row: Row
    record: DiskRecord

    def hurt(self, *, whole: bool = False) -> Hurt:
        """What damage does to it: nothing yet, or that nothing of it can be read."""
        hurt = Hurt(f"{self.row.point.group}/{self.row.point.id}", self.record.name)
        if whole and self.record.size:
            hurt.add(0, self.record.size)
        return hurt


@dataclass(slots=True)
class _Run:
    """One verification."""

    remote: Remote
    check: Check
    advance: Advance
    total: int = 0
    done: int = 0
    unproven: Unproven = field(default_factory=Unproven)
    _same: dict[str, Finding] = field(default_factory=dict)

    @property
    def deep(self) -> int:
        return LEVELS.index(self.check.level)

    def advanced(self, length: int) -> None:
        """So many bytes more."""
        self.done += length
        self.advance(min(self.done, self.total), self.total)

    def found(
        self, key: str, error: DiskError, hurts: Iterable[Hurt], advice: str = ADVICE
    ) -> None:
        """Something cannot be read; the same for several points is told once."""
        text = str(error)
        if not isinstance(error, CorruptImage | UnsupportedImage | ObjectMissing):
            if text not in self.check.unread:
                self.check.unread.append(text)
            return
        finding = self._same.get(text)
        if finding is None:
            finding = self._same[text] = Finding(key, None, text, advice=advice)
            self.check.findings.append(finding)
        finding.hurts += hurts


async def verify(
    remote: Remote,
    rows: Sequence[Row],
    workers: Workers,
    level: str,
    points: Sequence[Point] | None,
    disk: str | None,
    advance: Advance,
) -> Check:
    """See ``Repository.verify``. ``rows`` are all that there are.

    Raises:
        DiskError: the repository cannot be read at all.
    """
    run = _Run(remote, Check(level), advance)
    wanted = None if points is None else {(point.group, point.id) for point in points}
    vdis: dict[str, list[_Use]] = {}
    xvas: dict[str, list[_Use]] = {}
    for row in rows:
        if wanted is not None and (row.point.group, row.point.id) not in wanted:
            continue
        for use in _uses(run, row, disk):
            if row.point.facts.get("layout") == "xva":
                xvas.setdefault(use.record.path, []).append(use)
            else:
                vdis.setdefault(use.record.path.rpartition("/")[0], []).append(use)
    everything = wanted is None and disk is None
    for directory, uses in vdis.items():
        await in_turns(workers, _Vdi(run, directory, uses).run(everything=everything))
    for path, uses in xvas.items():
        try:
            said = await verify_xva(remote, path, run.deep, run.check, workers)
        except DiskError as error:
            run.found(path, error, [use.hurt(whole=True) for use in uses])
        else:
            run.unproven.sentences |= said
    run.check.unchecked += run.unproven.told(level)
    advance(run.total, run.total)
    return run.check


def _uses(run: _Run, row: Row, disk: str | None) -> Sequence[_Use]:
    """The disks of a point that are looked at; one that has none because it is damaged is told."""
    run.check.points += 1
    records = row.records
    if disk is not None:
        records = tuple(each for each in records if disk in {each.name, *each.aliases})
    if not row.records and "reason" in row.point.facts:
        error = row.unread or CorruptImage(str(row.point.facts["reason"]))
        run.found(row.path, error, [Hurt(f"{row.point.group}/{row.point.id}", "")])
    run.check.disks += len(records)
    run.total += sum(each.size for each in records)
    return [_Use(row, record) for record in records]


class _Vdi:
    """The disks of one VDI: one directory."""

    def __init__(self, run: _Run, directory: str, uses: Sequence[_Use]) -> None:
        self._run = run
        self._directory = directory
        self._uses = uses
        self._broken: dict[str, list[Broken]] = {}
        self._findings: dict[tuple[str, int], Finding] = {}

    def run(self, *, everything: bool) -> Generator[None, None, None]:
        """Look at each disk once, then whom it hurts. Blocking, step by step."""
        remote = self._run.remote
        try:
            nodes = remote.tree.entries(self._directory)
            merges = read_merges(remote, self._directory, nodes)
        except DiskError as error:
            self._run.check.unread.append(str(error))
            return
        for use in self._uses:
            try:
                chain = open_chain(remote, use.record.path, merges, use.record.snapshot)
            except DiskError as error:
                merging = refused(merges, use.record.path) is not None
                advice = MERGING if merging else ADVICE
                self._run.found(use.record.path, error, [use.hurt(whole=True)], advice)
                continue
            try:
                yield from self._examine(use, chain)
            finally:
                chain.close()
        for use in self._uses if self._broken else ():
            self._trace(use, merges)
            yield
        if everything:
            self._leftovers([node.name for node in nodes], merges)

    def _examine(self, use: _Use, chain: Chain) -> Generator[None, None, None]:
        layers = _layers(chain)
        for number, source in enumerate(chain.files):
            if source.path in self._broken:
                continue
            self._broken[source.path] = []
            if source.from_copy:
                text = "has lost the footer at its end; the copy at its beginning serves"
                self._run.check.notes.append(Note(source.place, text))
            last = chain.falls_to.get(number)
            checks = load_checks(self._run.remote, source)
            exam = DiskExam(
                self._run.remote,
                layers[number],
                layers[last] if last is not None else None,
                checks,
                self._run.deep,
                self._run.check,
            )
            try:
                lost = checks.lost(layers[number]) if checks is not None else []
                if lost:
                    self._told_lost(source, lost)
                    layers[number].insist(lost)
                broken = yield from exam.run(self._run.advanced)
            except DiskError as error:
                self._run.found(source.place, error, [use.hurt(whole=True)])
                continue
            proven = checks is not None and checks.damage is None
            if checks is not None and checks.damage is not None:
                self._run.found(checks.path or source.path, checks.damage, [], SUMS)
            self._run.unproven.add(self._run.remote, source, proven=proven)
            self._tell(source, broken)

    def _told_lost(self, source: DiskFile, lost: Sequence[int]) -> None:
        text = (
            f"the table leaves out {len(lost)} blocks that were backed up, the first is {lost[0]}"
        )
        key = source.place if source.directory is None else f"{source.place}/{BAT}"
        self._run.found(key, CorruptImage(f"corrupt image: {source.name}: {text}"), [], TABLE)

    def _tell(self, source: DiskFile, broken: Sequence[Broken]) -> None:
        self._broken[source.path] = list(broken)
        last: Finding | None = None
        for number, each in enumerate(broken):
            if number < MAX_FINDINGS:
                last = Finding(each.key, None, each.text, advice=ADVICE)
                self._run.check.findings.append(last)
            elif last is not None and number == MAX_FINDINGS:
                text = f"{len(broken) - number} more blocks are missing or broken"
                last = Finding(source.place, None, text, advice=ADVICE)
                self._run.check.findings.append(last)
            assert last is not None
            self._findings[source.path, each.block] = last

    def _trace(self, use: _Use, merges: Merges) -> None:
        """What the broken blocks do to a disk of a point."""
        try:
            chain = open_chain(self._run.remote, use.record.path, merges, use.record.snapshot)
        except DiskError:
            return  # told before
        try:
            hurts: dict[int, Hurt] = {}
            layers = _layers(chain)
            for number, source in enumerate(chain.files):
                for each in self._broken.get(source.path, ()):
                    self._hurt(use, layers, number, each.block, hurts)
        except DiskError:
            return
        finally:
            chain.close()

    def _hurt(
        self,
        use: _Use,
        layers: Sequence[BlockLayer],
        number: int,
        block: int,
        hurts: dict[int, Hurt],
    ) -> None:
        layer = layers[number]
        offset, length = block * layer.block_size, layer.block_size
        if offset >= layer.size or any(
            block < above.blocks and any(True for _ in above.present(block, block + 1))
            for above in layers[:number]
        ):
            return
        finding = self._findings[layer.source.path, block]
        hurt = hurts.get(id(finding))
        if hurt is None:
            hurt = hurts[id(finding)] = use.hurt()
            finding.hurts.append(hurt)
        hurt.add(offset, min(length, layer.size - offset))

    def _leftovers(self, names: Sequence[str], merges: Merges) -> None:
        """What is in the directory, and no point needs it."""
        notes = self._run.check.notes
        for path, merge in merges.items():
            if path.rpartition("/")[2] not in names:
                notes.append(Note(merge.state, "is about a merge that has ended"))
            else:
                notes.append(Note(merge.state, "says that a merge was begun and has not ended"))
        needed = {path for merge in merges.values() for path in merge.changing}
        needed |= self._broken.keys() | {use.record.path for use in self._uses}
        for name in names:
            path = f"{self._directory}/{name}"
            if name.endswith(VHD) and name[0] != "." and path not in needed:
                notes.append(Note(path, "is a disk that no point needs"))


def _layers(chain: Chain) -> list[BlockLayer]:
    """Of blocks, all of them: also those of files."""
    layers: list[BlockLayer] = []
    size = chain.files[0].footer.size
    for source in chain.files:
        size = min(size, source.footer.size)
        whole = DirectoryLayer if source.directory is not None else RemoteLayer
        layers.append(whole(source, size))
    return layers
