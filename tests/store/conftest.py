"""Stores of every kind, empty, for the tests of this folder."""

import itertools
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

pytest.register_assert_rewrite("tests.store.check_store")

from nbdsrv.store.s3 import S3Store  # noqa: E402 - once asserts are rewritten
from nbdsrv.store.s3_options import S3Options  # noqa: E402
from tests.store.buckets import Service  # noqa: E402

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine is set up for, the tests are not."""
    import os

    for name in list(os.environ):
        if name.startswith("AWS_") or name == "SSL_CERT_FILE":
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """An S3 service over real HTTP, in this process."""
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
        verify=False,
    )
    yield Service(endpoint, client)
    client.close()
    server.stop()


@pytest.fixture
def options(service: Service) -> S3Options:
    """How to reach it, without patience."""
    return S3Options(
        endpoint=service.endpoint,
        access_key="somebody",
        secret_key="secret",
        retries=2,
        pause_s=0.01,
    )


@pytest.fixture
def bucket(service: Service) -> str:
    """An empty bucket's name."""
    name = f"bucket-{next(_numbers)}"
    service.client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def s3(bucket: str, options: S3Options) -> Iterator[S3Store]:
    """An empty store below a prefix."""
    store = S3Store(bucket, "some/prefix", options)
    yield store
    store.close()
