"""Repositories in a bucket: the same points, disks and damage as in a directory."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, RepositoryError
from tests.disk.check_disk import check_disk
from tests.repository.xo.made import BLOCK, Layer, Made, bits
from tests.repository.xo.opened import contents, opened, opener
from tests.repository.xo.test_xo_xva import DISKS, archive
from tests.repository.xo.test_xo_xva import made as made_xva
from tests.store.buckets import Service

A, B, C = (f"2026020{day}T000000Z" for day in (1, 2, 3))
_numbers = itertools.count()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    endpoint = f"http://127.0.0.1:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="somebody",
        aws_secret_access_key="secret",
    )
    yield Service(endpoint, client)
    client.close()
    server.stop()


@pytest.fixture(autouse=True)
def environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", service.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def uploaded(service: Service, root: Path) -> str:
    """The SOURCE of the same in a new bucket."""
    bucket = f"xo-{next(_numbers)}"
    service.client.create_bucket(Bucket=bucket)
    for path in root.rglob("*"):
        if path.is_file():
            key = f"a/prefix/{path.relative_to(root)}"
            service.client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    return f"xo+s3://{bucket}/a/prefix"


def block(seed: int) -> bytes:
    return bytes([seed]) * BLOCK


async def test_every_layout_in_one_chain(
    service: Service, tmp_path: Path, workers: Workers
) -> None:
    made = Made(tmp_path / "xo")
    size = 2 * BLOCK + 512
    made.point(A, [Layer(A, size, {0: block(1), 2: bytes(BLOCK)}, layout="vhd")])
    made.point(B, [Layer(B, size, {1: block(2)}, {1: bits(range(100))}, "none", A)])
    made.point(C, [Layer(C, size, {0: block(3)}, {0: bits(range(9, 4000))}, "vhd", B)])
    async with opened(uploaded(service, made.root), workers) as repository:
        points = await repository.points()
        assert [(point.id, point.flags) for point in points] == [(A, ()), (B, ()), (C, ())]
        assert points[0].facts["health"] == "not examined"
        for stamp in (A, B, C):
            assert await contents(repository, f"web@{stamp}") == made.content(stamp)
        await check_disk(opener(repository, points[-1], "root"), made.content(C))
        done = await repository.verify("chunks")
        assert (done.findings, done.unread) == ([], [])


async def test_a_long_chain(service: Service, tmp_path: Path, workers: Workers) -> None:
    made = Made(tmp_path / "xo")
    stamps = [f"202602{day:02}T000000Z" for day in range(1, 21)]
    for number, stamp in enumerate(stamps):
        parent = stamps[number - 1] if number else None
        made.point(stamp, [Layer(stamp, BLOCK, {}, parent=parent)])
    made.disk(Layer(stamps[0], BLOCK, {0: block(1)}))
    async with opened(uploaded(service, made.root), workers) as repository:
        for stamp in (stamps[-1], stamps[9], stamps[0]):
            assert await contents(repository, f"web@{stamp}") == block(1)


async def test_encrypted_and_an_xva(service: Service, tmp_path: Path, workers: Workers) -> None:
    made = Made(tmp_path / "one", "chacha20-poly1305")
    made.point(A, [Layer(A, BLOCK, {0: block(1)})])
    source = uploaded(service, made.root)
    async with opened(source, workers) as repository:
        assert await contents(repository, "web") == block(1)
    with pytest.raises(RepositoryError, match="does not open"):
        async with opened(source, workers, "f" * 32):
            pass
    source = uploaded(service, made_xva(tmp_path / "two", archive()).root)
    async with opened(source, workers) as repository:
        assert await contents(repository, "web/data") == DISKS["Ref:4"][1]


async def test_damage(service: Service, tmp_path: Path, workers: Workers) -> None:
    made = Made(tmp_path / "xo")
    made.point(A, [Layer(A, 2 * BLOCK, {0: block(1), 1: block(2)})])
    made.point(B, [Layer(B, 2 * BLOCK, {0: block(3)}, parent=A)])
    place = made.root / made.vdi() / "data" / f"{A}.vhd"
    (place / "blocks/0/1").unlink()
    async with opened(uploaded(service, made.root), workers) as repository:
        with pytest.raises(CorruptImage, match="blocks/0/1"):
            await contents(repository, f"web@{B}")
        (finding,) = (await repository.verify("structure")).findings
        assert [hurt.ranges for hurt in finding.hurts] == [[(BLOCK, BLOCK)]] * 2
    (place / "footer").unlink()
    async with opened(uploaded(service, made.root), workers) as repository:
        with pytest.raises(CorruptImage, match=r"footer.*the parent of"):
            await contents(repository, f"web@{B}")


async def test_an_empty_bucket_is_no_repository(service: Service, workers: Workers) -> None:
    service.client.create_bucket(Bucket="empty")
    with pytest.raises(RepositoryError, match="no backups of VMs"):
        async with opened("xo+s3://empty", workers):
            pass
