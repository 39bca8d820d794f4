"""Repositories in real S3 services: OpenStack Swift here, Ceph's RADOS Gateway in the slow part.

::

    qcow2 ── backup ──> repo+s3://bucket/prefix ── serve ──> nbdcopy ── SHA-256 == qemu-img's
                            ls, verify, prune, gc

Both check signatures, which the double of the unit tests does not.
"""

import errno
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from threading import Barrier, Timer

from conformance.context import Context
from conformance.golden import Golden, read_back
from conformance.image import MIB
from conformance.outcome import CheckFailedError
from conformance.registry import Part, check, expect, expect_in
from conformance.repository import Repository, disk_of
from conformance.rgw import RadosGateway
from conformance.service import ObjectService
from conformance.swift import Swift
from nbdsrv.store.s3 import S3Store
from nbdsrv.store.s3_options import S3Options
from nbdsrv.store.store import Store, StoreError

BUCKET = "nbdsrv-conformance"
PREFIX = "some/prefix"
CRASH_S = 0.6
"""Seconds after which a service is gone: an interpreter has started, a backup has begun."""
RACING = "check_races"
"""The contract's check that of several creators at once one wins: see ``creators``."""


@dataclass(frozen=True, slots=True)
class Row:
    """One service of the table."""

    program: str
    start: Callable[[Context], ObjectService]
    part: Part
    needs: tuple[str, ...] = ()


ROWS = (
    Row("Swift", Swift, Part.QUICK),
    Row("Ceph RGW", RadosGateway, Part.REPOSITORY, RadosGateway.NEEDS),
)


def _register() -> None:
    for row in ROWS:
        for feature, judge, needs in (
            ("store contract", store_contract, ()),
            ("repository", repository, ("qemu-img", "nbdcopy")),
            ("refusals", refusals, ("qemu-img",)),
        ):

            def run(
                context: Context,
                judge: Callable[[Context, ObjectService], None] = judge,
                row: Row = row,
            ) -> None:
                service = row.start(context)
                service.create_bucket(BUCKET)
                judge(context, service)

            check(row.program, feature, needs=(*row.needs, *needs), part=row.part)(run)


def store_contract(context: Context, service: ObjectService) -> None:
    """The unit tests' contract of a store, check by check, through the real thing."""
    del context
    store = _store(service, "contract")
    try:
        for each in import_module("tests.store.check_store").CHECKS:
            if each.__name__ == RACING:
                continue
            try:
                each(store)
            except AssertionError as error:
                text = f"{each.__name__}: {error or 'see tests/store/check_store.py'}"
                raise CheckFailedError(text) from error
            expect([], list(store.list("")), f"objects that {each.__name__} leaves")
        creators(store)
    finally:
        store.close()


def creators(store: Store) -> None:
    """Of creators at the same moment at least one wins, and one's object is there as a whole.

    Exactly one would be the contract. Swift looks whether there is an object before it takes the
    data, and what comes last stays: several are told that they won. Nothing in a repository
    depends on it: objects that two can create at once have the same content or random names.
    """
    for turn in range(5):
        start = Barrier(6)

        def work(number: int, turn: int = turn, start: Barrier = start) -> bool:
            start.wait()
            return store.put_new(f"races/{turn}", b"%d" % number * 5000)

        with ThreadPoolExecutor(6) as threads:
            won = list(threads.map(work, range(6)))
        winners = [b"%d" % number * 5000 for number, did in enumerate(won) if did]
        if store.get(f"races/{turn}") not in winners:
            raise CheckFailedError(f"of six creators these were told that they won: {won}")
        expect(False, store.put_new(f"races/{turn}", b"late"), "a creator who comes later wins")
        store.delete(f"races/{turn}")


def _store(service: ObjectService, prefix: str) -> S3Store:
    options = S3Options(
        endpoint=service.endpoint,
        access_key=service.access_key,
        secret_key=service.secret_key,
    )
    return S3Store(BUCKET, prefix, options)


def repository(context: Context, service: ObjectService) -> None:
    """A qcow2's life: two backups, both served; one pruned, its chunks collected."""
    repo = Repository(context, f"repo+s3://{BUCKET}/{PREFIX}", service.environment())
    golden = Golden(context)
    repo.init()
    disk = golden.convert("qcow2", "disk.qcow2")
    first = repo.backup(disk, read_back(context, disk, "qcow2"))
    with golden.raw.path.open("r+b") as file:
        file.write(random.Random(1).randbytes(MIB // 2))
    disk = golden.convert("qcow2", "disk.qcow2")
    second = repo.backup(disk, read_back(context, disk, "qcow2"))
    if not 0 < second["new_bytes"] < first["new_bytes"] // 2:
        raise CheckFailedError(f"stored first {first['new_bytes']}, then {second['new_bytes']}")
    with_server = repo.serve()
    expect([first["point"], second["point"]], repo.prove(with_server), "points listed and read")
    expect_in(repo.export(first["point"]), _listed(context, with_server.uri()), "nbdinfo --list")
    repo.run("verify", repo.target, "--level", "chunks")
    with_server.stop()
    _prune_and_collect(repo, service, second["point"])


def _listed(context: Context, uri: str) -> str:
    return context.run("nbdinfo", "--list", uri).stdout


def _prune_and_collect(repo: Repository, service: ObjectService, left: str) -> None:
    """Only the newest point stays, and reads; there is less in the bucket than before."""
    before = _bucket_bytes(service)
    repo.run("prune", repo.target, "--keep-last", "1")
    repo.run("gc", repo.target, "--grace", "0s", "--repack-below", "90")
    expect([left], repo.prove(repo.serve()), "points after prune")
    repo.run("verify", repo.target, "--level", "chunks")
    if _bucket_bytes(service) >= before:
        raise CheckFailedError(f"gc freed nothing of {before} bytes")


def _bucket_bytes(service: ObjectService) -> int:
    store = _store(service, PREFIX)
    try:
        return sum(row.size for row in store.list("packs/"))
    finally:
        store.close()


def refusals(context: Context, service: ObjectService) -> None:
    """A wrong key, no bucket, no service: one line each that says so, and nothing else."""
    repo = Repository(context, f"repo+s3://{BUCKET}/other", service.environment())
    disk = context.image(size=16 * MIB).path
    wrong = Repository(context, repo.target, service.environment(AWS_SECRET_ACCESS_KEY="wrong"))
    wrong.refused("init", wrong.target, saying="AWS_SECRET_ACCESS_KEY")
    repo.init()
    for target, words in (
        (wrong, ("ls", wrong.target)),
        (wrong, wrong.backup_words(disk)),
        (wrong, ("gc", wrong.target)),
        (wrong, ("serve", wrong.target, "--listen", f"unix:{context.directory / 'no'}")),
    ):
        target.refused(*words, saying="access denied")
    lost = Repository(context, "repo+s3://no-such-bucket/x", service.environment())
    for words in (("init", lost.target), ("ls", lost.target), lost.backup_words(disk)):
        lost.refused(*words, saying="no such bucket")
    empty = Repository(context, f"repo+s3://{BUCKET}/nothing/here", service.environment())
    empty.refused("ls", empty.target, saying="nbdsrv init")
    repo.backup(disk, "of no interest")
    _reading_alone(service)


def _reading_alone(service: ObjectService) -> None:
    """A missing object is not a missing bucket."""
    store = _store(service, "contract")
    try:
        store.get("nothing")
    except StoreError as error:
        expect(errno.ENOENT, error.errno, "errno of a missing object")
    finally:
        store.close()


@check("Swift", "crash and return", needs=("nbdcopy",), part=Part.REPOSITORY)
def crash(context: Context) -> None:
    """Gone in the middle of a backup: one line, nothing half made; back again: all goes on."""
    service = Swift(context)
    service.create_bucket(BUCKET)
    repo = Repository(context, f"repo+s3://{BUCKET}/{PREFIX}", service.environment())
    repo.init()
    source = random.Random(2)
    disk = context.directory / "disk.img"
    repo.backup(disk, disk_of(disk, 64 * MIB, source))
    server = repo.serve()
    digest = disk_of(disk, 64 * MIB, source)
    timer = Timer(CRASH_S, service.crash)
    timer.start()
    try:
        repo.refused(*repo.backup_words(disk), saying="connection refused")
    finally:
        timer.join()
    for words in (("ls", repo.target), ("gc", repo.target), ("verify", repo.target)):
        repo.refused(*words, saying="connection refused")
    expect(1, context.run("nbdinfo", server.uri(repo.export()), code=None).code, "nbdinfo's code")
    service.revive()
    expect(1, len(repo.prove(server)), "points after the crash")
    repo.backup(disk, digest)
    expect(2, len(repo.prove(server)), "points after the next backup")


_register()
