"""Verifying a storage: each block once, however many versions have it.

::

    structure   every version's head and list; every block's object and metadata are there
    packs       also what the metadata says: HMAC, sizes, the checksum the versions know
    chunks      also every block's content: decrypted, unpacked, hashed
"""

from collections.abc import Callable, Generator, Sequence

from nbdsrv.errors import ConfigError, CorruptImage, DiskError
from nbdsrv.formats.turns import in_turns
from nbdsrv.repository.benji.disk import block_at
from nbdsrv.repository.benji.listing import Version
from nbdsrv.repository.benji.objects import META, object_path
from nbdsrv.repository.benji.repository import DISK, BenjiRepository
from nbdsrv.repository.benji.versions import BlockMap, Head
from nbdsrv.repository.damage import Check, Finding, Hurt
from nbdsrv.repository.repository import LEVELS, Point
from nbdsrv.store.store import ObjectMissing

__all__ = ["verify"]

BATCH = 256
"""Blocks between two calls of ``advance``."""
MAX_FINDINGS = 10_000
"""Broken blocks that are told one by one; then it is the storage that is broken."""

Advance = Callable[[int, int], None]


async def verify(
    repository: BenjiRepository,
    level: str,
    points: Sequence[Point] | None,
    disk: str | None,
    advance: Advance,
) -> Check:
    """See ``Repository.verify``.

    Raises:
        DiskError: the storage cannot be read at all.
    """
    run = _Run(repository, level)
    wanted = None if points is None else {point.id for point in points}
    versions = await repository.workers.run(repository.listing.versions)
    chosen = [each for each in versions if wanted is None or each.uid in wanted]
    if disk not in {None, DISK}:
        chosen = []
    total = sum(each.head.size for each in chosen if each.head is not None)
    done = 0
    for version in chosen:
        run.check.points += 1
        if version.head is None:
            run.unreadable(version, version.reason)
            continue
        run.check.disks += 1
        try:
            blocks = await repository.workers.run(repository.blocks, version)
        except (DiskError, ConfigError) as error:
            run.unreadable(version, str(error))
            continue
        for first in range(0, len(blocks), BATCH):
            rows = range(first, min(first + BATCH, len(blocks)))
            await in_turns(repository.workers, run.look_at(version.head, blocks, rows))
            reached = blocks.indexes[rows[-1]] * version.head.block_size
            advance(min(done + reached, total), total)
        done += version.head.size
        advance(done, total)
    if wanted is None:
        run.check.unread += repository.listing.unread
    run.tell_unchecked()
    return run.check


class _Run:
    def __init__(self, repository: BenjiRepository, level: str) -> None:
        self.check = Check(level)
        self._repository = repository
        self._depth = LEVELS.index(level)
        self._seen: set[int] = set()
        self._broken: dict[int, Finding] = {}

    def unreadable(self, version: Version, reason: str) -> None:
        """A version that is lost as a whole."""
        group = version.head.volume if version.head else "unreadable"
        hurt = Hurt(f"{group}/{version.uid}", DISK if version.head else "")
        if version.head is not None:
            hurt.add(0, version.head.size)
        self.check.findings.append(
            Finding(
                version.path, None, reason, [hurt], advice="benji metadata-backup writes it anew"
            )
        )

    def look_at(self, head: Head, blocks: BlockMap, rows: range) -> Generator[None, None, None]:
        """Some blocks, in a thread."""
        for row in rows:
            uid = blocks.left[row] << 64 | blocks.right[row]
            if uid not in self._seen:
                self._seen.add(uid)
                self._look_at(head, blocks, row, uid)
            finding = self._broken.get(uid)
            if finding is not None:
                _hurts(finding, head, blocks.indexes[row])
            yield

    def _look_at(self, head: Head, blocks: BlockMap, row: int, uid: int) -> None:
        check = self.check
        check.objects += 1
        path = object_path("blocks", blocks.key(row))
        try:
            self._prove(head, blocks, row, path)
        except ObjectMissing as error:
            self._found(path, uid, str(error))
        except CorruptImage as error:
            self._found(path, uid, str(error))
        except (DiskError, ConfigError) as error:
            check.unread.append(str(error))

    def _prove(self, head: Head, blocks: BlockMap, row: int, path: str) -> None:
        repository, objects = self._repository, self._repository.objects
        if self._depth == LEVELS.index("chunks"):
            block_at(objects, repository.hashes, head, blocks, row)
            self.check.read_bytes += head.block_length(blocks.indexes[row])
            return
        for name in (path, path + META):
            if objects.tree.find(name) is None:
                raise ObjectMissing(f"{objects.tree.full(name)}: no such file")
        if not self._depth:
            return
        metadata = objects.metadata(path)
        node = objects.tree.find(path)
        size = node.size if node else 0
        if size != metadata.object_size:
            raise objects.corrupt(path, f"{size} bytes, the metadata says {metadata.object_size}")
        if metadata.size != head.block_length(blocks.indexes[row]):
            raise objects.corrupt(path, f"its metadata is that of a block of {metadata.size} bytes")
        if metadata.checksum and metadata.checksum != blocks.checksum(row).hex():
            raise objects.corrupt(path, "is another block than the version says")

    def _found(self, path: str, uid: int, text: str) -> None:
        if len(self._broken) >= MAX_FINDINGS:
            self.check.unread.append(text)
            return
        advice = "back up the volume again: blocks Benji knows to be broken are not built upon"
        finding = Finding(path, None, text, advice=advice)
        self._broken[uid] = finding
        self.check.findings.append(finding)

    def tell_unchecked(self) -> None:
        """What this level, and the format, leave open."""
        say = self.check.unchecked.append
        if self._depth < LEVELS.index("chunks"):
            say("this level reads no blocks; --level chunks does")
        if not self._repository.objects.authenticated:
            say(
                "no HMAC key is known: metadata that was changed on purpose is not noticed, nor"
                " are a version's lists"
            )
        say("versions have no checksum of their own: a changed date, name or label is not noticed")


def _hurts(finding: Finding, head: Head, index: int) -> None:
    """One more place that a broken block is at."""
    point = f"{head.volume}/{head.uid}"
    last = finding.hurts[-1] if finding.hurts else None
    if last is None or last.point != point:
        last = Hurt(point, DISK)
        finding.hurts.append(last)
    last.add(index * head.block_size, head.block_length(index))
