"""Verifying data files: each once, however many points are made of it.

::

    structure   names, meta frames, chains, every frame of every file
    packs       also the Adler-32 beside each file (``vda.full.data.chksum``)
    chunks      also every LZ4 block against its own checksum, and every frame's content

Damage in a file hurts the points whose chain it is in, where no newer file hides it.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

from isal import isal_zlib

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.turns import in_turns
from nbdsrv.repository.damage import Check, Finding, Hurt, Note
from nbdsrv.repository.repository import LEVELS, Point
from nbdsrv.repository.virtnbdbackup.chains import PointFiles, chain_of
from nbdsrv.repository.virtnbdbackup.data_file import CHECKSUM, DataFile
from nbdsrv.repository.virtnbdbackup.disk import bounds
from nbdsrv.repository.virtnbdbackup.index import PLAIN, Index
from nbdsrv.repository.virtnbdbackup.layers import Layer, over
from nbdsrv.repository.virtnbdbackup.listing import Directory
from nbdsrv.repository.virtnbdbackup.lz4_frame import UNIT
from nbdsrv.repository.virtnbdbackup.open_files import OpenFile
from nbdsrv.repository.virtnbdbackup.repository import VirtnbdRepository
from nbdsrv.store.tree import Tree

__all__ = ["verify"]

STRETCH = 256 << 20
"""Bytes of a file between two calls of ``advance``."""
READ = 1 << 20
MAX_SUM = 64
"""Bytes of a .chksum file; it has ten digits."""
MAX_RANGES = 1 << 16
"""Broken ranges of a file that are remembered; what lies behind counts as one."""

Range = tuple[int, int]
Advance = Callable[[int, int], None]


@dataclass(slots=True)
class _User:
    """A disk of a point, and the chain it is made of."""

    point: str
    disk: str
    chain: Sequence[DataFile]


@dataclass(slots=True)
class _Work:
    directory: Directory
    file: DataFile
    users: list[_User] = field(default_factory=list)


async def verify(
    repository: VirtnbdRepository,
    level: str,
    points: Sequence[Point] | None,
    disk: str | None,
    advance: Advance,
) -> Check:
    """See ``Repository.verify``.

    Raises:
        DiskError: the repository cannot be read at all.
    """
    run = _Run(repository, level, advance)
    wanted = None if points is None else {(each.group, each.id) for each in points}
    for directory in await repository.directories():
        run.plan(directory, wanted, disk)
    await run.carry_out()
    if points is None:
        run.check.unread += repository.listing.unread
    return run.check


class _Run:
    def __init__(self, repository: VirtnbdRepository, level: str, advance: Advance) -> None:
        self.check = Check(level)
        self._repository = repository
        self._tree = repository.tree
        self._depth = LEVELS.index(level)
        self._advance = advance
        self._work: dict[str, _Work] = {}
        self._broken: dict[str, Finding] = {}
        self._done = self._total = 0
        self._unproven = self._doubtful = self._summed = 0

    # --- what is to be done --------------------------------------------------------------------

    def plan(
        self, directory: Directory, wanted: set[tuple[str, str]] | None, disk: str | None
    ) -> None:
        """Add the points of a directory."""
        for files in directory.points:
            if wanted is None or (directory.group, files.id) in wanted:
                self.check.points += 1
                for file in files.files:
                    if disk in {None, file.disk}:
                        self._plan_disk(directory, files, file)
        if wanted is not None:
            return
        for file in directory.files if disk is None else ():
            self._work.setdefault(file.path, _Work(directory, file))
        for name in directory.partial:
            key = f"{directory.path}/{name}" if directory.path else name
            self.check.notes.append(Note(key, "is being written, or was given up; not looked at"))

    def _plan_disk(self, directory: Directory, files: PointFiles, file: DataFile) -> None:
        self.check.disks += 1
        label = f"{directory.group}/{files.id}"
        hurt = Hurt(label, file.disk)
        hurt.add(0, file.size)
        try:
            if file.disk in files.twice:
                text = f"several files are {file.disk} at {files.id}"
                raise CorruptImage(f"corrupt image: {self._tree.full(file.path)}: {text}")
            chain = chain_of(self._tree, file, directory.makers)
        except DiskError as error:
            self._found(file.path, str(error), [hurt])
            return
        for each in chain:
            work = self._work.setdefault(each.path, _Work(directory, each))
            work.users.append(_User(label, file.disk, chain))

    def _found(self, key: str, text: str, hurts: Iterable[Hurt], advice: str = "") -> None:
        known = self._broken.get(key)
        if known is not None:
            known.hurts += hurts
            return
        finding = Finding(key, None, text, list(hurts), advice=advice)
        self._broken[key] = finding
        self.check.findings.append(finding)

    # --- doing it ------------------------------------------------------------------------------

    async def carry_out(self) -> None:
        """Look at all files."""
        sizes = {path: self._bytes_of(work) for path, work in self._work.items()}
        self._total = sum(sizes.values())
        for path, work in self._work.items():
            before = self._done
            if not work.file.reason:
                await self._look_at(work)
            elif not work.users and path not in self._broken:
                self._found(path, work.file.reason, [])
            self._done = before + sizes[path]
            self._advance(self._done, self._total)
        self._tell_unchecked()

    def _bytes_of(self, work: _Work) -> int:
        size = work.file.node.size
        if not self._depth:
            return 0
        packed = work.file.meta is not None and work.file.meta.packed
        return size * (_has_sum(work) + (packed and self._depth > 1))

    async def _look_at(self, work: _Work) -> None:
        files, check = self._repository.files, self.check
        check.objects += 1
        why = work.directory.logs.doubt(work.file)
        if why:
            self._doubtful += 1
            check.notes.append(Note(work.file.path, f"may have lost zeroes: {why}"))
        try:
            used = await files.acquire(work.file)
        except DiskError as error:
            check.unread.append(str(error))
            return
        try:
            index = await files.indexed(used)
            if index.fault is not None:
                ranges = [(index.end, work.file.size)]
                await self._damaged(work, str(index.fault), ranges)
            elif work.file.cut:
                await self._damaged(work, work.file.cut, [])
            if self._depth > 1 and work.file.meta is not None and work.file.meta.packed:
                await self._unpack(work, used, index)
            if self._depth:
                await self._sum(work, used.file, index)
        except DiskError as error:
            check.unread.append(str(error))
        finally:
            await files.release(used)

    async def _sum(self, work: _Work, file: ImageFile, index: Index) -> None:
        if not _has_sum(work):
            packed = work.file.meta is not None and work.file.meta.packed
            self._unproven += not packed
            return
        self._summed += 1
        told = await self._repository.workers.run(_told, self._tree, work.file.path + CHECKSUM)
        found = 1
        for position in range(0, file.size, STRETCH):
            length = min(STRETCH, file.size - position)
            found = await in_turns(self._repository.workers, _adler(file, position, length, found))
            self._step(length)
        if told is None:
            text = "holds no number"
            self.check.notes.append(Note(work.file.path + CHECKSUM, text))
        elif told != found:
            text = f"{file.path}: its Adler-32 is {found}, {told} was written down"
            known = self._broken.get(work.file.path)
            if known is not None and known.hurts:
                known.text += f"; and {text}"  # where is known better
                return
            held = zip(index.starts, index.lengths, strict=True)
            ranges = [(start, start + length) for start, length in held]
            await self._damaged(work, text, ranges[:MAX_RANGES] + _rest(ranges))

    async def _unpack(self, work: _Work, used: OpenFile, index: Index) -> None:
        broken: list[Range] = []
        text = ""
        entry = 0
        while entry < len(index):
            turn = _unpack(used, index, entry, broken)
            entry, read, said = await in_turns(self._repository.workers, turn)
            text = text or said
            self._step(read)
        if broken:
            await self._damaged(work, text, broken)

    def _step(self, read: int) -> None:
        self.check.read_bytes += read
        self._done += read
        self._advance(min(self._done, self._total), self._total)

    async def _damaged(self, work: _Work, text: str, ranges: Sequence[Range]) -> None:
        hurts: list[Hurt] = []
        for user in work.users:
            hurt = await self._hurt(user, work.file, ranges)
            if hurt is not None:
                hurts.append(hurt)
        self._found(work.file.path, text, hurts, "back up in full again")

    async def _hurt(self, user: _User, file: DataFile, ranges: Sequence[Range]) -> Hurt | None:
        """What of a file's broken ranges is seen in a disk."""
        number = next(n for n, each in enumerate(user.chain) if each.path == file.path)
        layers: list[Layer] = []
        for each, bound in zip(user.chain[: number + 1], bounds(user.chain), strict=False):
            used = await self._repository.files.acquire(each)
            try:
                layers.append(Layer(await self._repository.files.indexed(used), bound))
            finally:
                await self._repository.files.release(used)
        seen = await self._repository.workers.run(_seen, layers, number, ranges)
        if not seen:
            return None
        hurt = Hurt(user.point, user.disk)
        for start, end in seen:
            hurt.add(start, end - start)
        return hurt

    def _tell_unchecked(self) -> None:
        say = self.check.unchecked.append
        if not self._depth:
            say("this level reads no data; --level packs and chunks do")
        if self._unproven:
            say(
                f"{self._unproven} files have no {CHECKSUM} file and are not compressed: a flipped"
                " bit in them cannot be seen"
            )
        if self._summed:
            say(
                "Adler-32 finds accidents, no changes on purpose; it tells that something in a file"
                " is wrong, not where"
            )
        if self._doubtful:
            say(
                f"whether increments have lost zeroes ({self._doubtful} may have): none says what"
                " the guest has zeroed; only a full backup is beyond doubt"
            )
        say(
            "checkpoints have the same names in every directory: an increment that was copied here"
            " from another backup is noticed by its date only"
        )


# --- in threads ----------------------------------------------------------------------------------


def _has_sum(work: _Work) -> bool:
    return work.file.node.name + CHECKSUM in work.directory.names


def _rest(ranges: Sequence[Range]) -> list[Range]:
    """What is beyond the ranges that are remembered, as one."""
    left = ranges[MAX_RANGES:]
    return [(left[0][0], left[-1][1])] if left else []


def _told(tree: Tree, path: str) -> int | None:
    text = tree.read(path, MAX_SUM).decode(errors="replace").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _adler(file: ImageFile, position: int, length: int, value: int) -> Generator[None, None, int]:
    end = position + length
    while position < end:
        part = min(READ, end - position)
        value = isal_zlib.adler32(file.read(position, part, "the file"), value)
        position += part
        yield
    return value


def _unpack(
    used: OpenFile, index: Index, entry: int, broken: list[Range]
) -> Generator[None, None, tuple[int, int, str]]:
    """Prove some frames: the next entry, bytes read, and what was wrong first."""
    read = 0
    text = ""
    while entry < len(index) and read < STRETCH:
        if index.packed[entry] > PLAIN:
            position, packed = index.positions[entry], index.packed[entry]
            length = index.lengths[entry]
            try:
                used.frames.unpack(position, packed, length)
            except CorruptImage as error:
                text = text or str(error)
                broken += _broken_units(used, index, entry)
            read += packed
            yield
        entry += 1
    return entry, read, text


def _broken_units(used: OpenFile, index: Index, entry: int) -> list[Range]:
    """The parts of a frame that nobody can read; all of it if each can, and the whole is wrong."""
    start, length = index.starts[entry], index.lengths[entry]
    found: list[Range] = []
    for number in range(-(-length // UNIT)):
        try:
            used.frames.read(index.positions[entry], index.packed[entry], length, number)
        except CorruptImage:
            begin = start + number * UNIT
            found.append((begin, min(begin + UNIT, start + length)))
    return found or [(start, start + length)]


def _seen(layers: Sequence[Layer], number: int, ranges: Sequence[Range]) -> list[Range]:
    found: list[Range] = []
    for start, end in ranges:
        bound = min(end, layers[0].bound)
        for piece in over(layers, start, bound) if start < bound else ():
            if piece.layer == number:
                found.append((piece.start, piece.end))
                if len(found) > MAX_RANGES:
                    found[-1] = found[-1][0], ranges[-1][1]
                    return found
    return found
