"""Is a borg repository what it was? As far as borg itself can tell.

::

    structure   archives and the items of those that were asked for can be read
    packs       each chunk of the disks, once: its segment entry is there and has its CRC
    chunks      each chunk, once: CRC, authentication, and the id is that of its content
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.borg.archives import MIN_DISK, Archives, Row
from nbdsrv.repository.borg.process import CHUNK_S, WORKERS, BorgProcesses
from nbdsrv.repository.damage import Check, Finding, Hurt
from nbdsrv.repository.pieces import Pieces

__all__ = ["verify"]

ADVICE = "`borg check --verify-data`, and `--repair`, are what mends a repository"


def verify(
    borg: BorgProcesses,
    archives: Archives,
    rows: Sequence[Row],
    level: str,
    disk: str | None,
    *,
    advance: Callable[[int, int], None],
) -> Check:
    """Look at the archives in ``rows``. Blocking.

    Args:
        borg: its processes.
        archives: of the repository.
        rows: with their points.
        level: one of ``repository.LEVELS``.
        disk: only disks of that name.
        advance: called with (bytes done, bytes to do).

    Raises:
        DiskError: borg cannot be asked.
    """
    check = Check(level)
    needed: dict[bytes, int] = {}
    for row, name, pieces in _files(archives, rows, disk, check):
        if isinstance(pieces, DiskError):
            _unreadable(check, row, name, pieces)
            continue
        check.disks += 1
        for index in range(len(pieces)):
            needed.setdefault(pieces.id(index), pieces.length(index))
    check.objects = len(needed) + len(rows)
    if level == "structure":
        check.unchecked.append("no chunk was read; --level packs reads those of the disks")
    else:
        bad = _read(borg, needed, level, check, advance)
        if bad:
            _tell(check, _files(archives, rows, disk, Check(level)), bad)
    if level == "packs":
        check.unchecked.append(
            "a CRC tells of accidents; --level chunks proves each chunk's content by its id"
        )
    check.unchecked.append(
        f"files of less than {MIN_DISK} bytes are no disks: their chunks were not looked at"
    )
    return check


def _files(
    archives: Archives, rows: Sequence[Row], disk: str | None, check: Check
) -> Iterator[tuple[Row, str, Pieces | DiskError]]:
    """One after the other; archives that cannot be read become findings."""
    for row in rows:
        point = row.point
        check.points += 1
        if point is None:
            continue
        if "reason" in point.facts:
            hurt = Hurt(f"{point.group}/{point.id}", "")
            key = f"archive {point.id}"
            text = str(point.facts["reason"])
            check.findings.append(Finding(key, None, text, [hurt], advice=ADVICE))
        for each in point.disks:
            if disk not in {None, each.name}:
                continue
            try:
                yield row, each.name, archives.pieces(point.id, each.name)
            except DiskError as error:
                yield row, each.name, error


def _unreadable(check: Check, row: Row, name: str, error: DiskError) -> None:
    if not isinstance(error, CorruptImage):
        check.unread.append(f"{row.group}/{name}@{row.archive.name}: {error}")
        return
    hurt = Hurt(f"{row.group}/{row.archive.name}", name)
    key = f"archive {row.archive.name}"
    check.findings.append(Finding(key, None, str(error), [hurt], advice=ADVICE))


def _read(
    borg: BorgProcesses,
    needed: dict[bytes, int],
    level: str,
    check: Check,
    advance: Callable[[int, int], None],
) -> dict[bytes, str]:
    """Each chunk once: which are damaged, and how."""
    total, done = sum(needed.values()), 0
    bad: dict[bytes, str] = {}
    do = "raw" if level == "packs" else "get"

    def one(id_: bytes) -> tuple[str, str]:
        try:
            _, body = borg.call(do, CHUNK_S, id=id_.hex())
            if do == "get" and len(body) != needed[id_]:
                return "bad", f"it has {len(body)} bytes, its archive says {needed[id_]}"
            return "", ""
        except CorruptImage as error:
            return "bad", str(error)
        except DiskError as error:
            return "unread", str(error)

    with ThreadPoolExecutor(WORKERS, "borg-verify") as crew:
        for id_, (what, text) in zip(needed, crew.map(one, needed), strict=True):
            if what == "bad":
                bad[id_] = text
            elif what:
                check.unread.append(text)
            done += needed[id_]
            check.read_bytes = done
            advance(done, total)
    return bad


def _tell(
    check: Check,
    files: Iterator[tuple[Row, str, Pieces | DiskError]],
    bad: dict[bytes, str],
) -> None:
    findings = {
        id_: Finding(f"chunk {id_.hex()}", None, text, advice=ADVICE) for id_, text in bad.items()
    }
    check.findings += findings.values()
    for row, name, pieces in files:
        if isinstance(pieces, DiskError):
            continue
        hurts: dict[bytes, Hurt] = {}
        for index, begin, end in pieces.between(0, pieces.size):
            id_ = pieces.id(index)
            if id_ not in bad:
                continue
            if id_ not in hurts:
                hurts[id_] = Hurt(f"{row.group}/{row.archive.name}", name)
                findings[id_].hurts.append(hurts[id_])
            hurts[id_].add(begin, end - begin)
