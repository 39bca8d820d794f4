"""A bucket that is read: how it is opened, and what an answer must be.

::

    S3Options ── open_bucket ──> obstore's store
    BucketReader ── get, get_range ──> bytes        each answer checked for its length: services
                                                    exist that ignore Range or stop early
"""

import errno as os_errno
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store as Bucket

from nbdsrv.errors import ConfigError
from nbdsrv.store.answers import answered
from nbdsrv.store.s3_errors import explain
from nbdsrv.store.s3_options import S3Options
from nbdsrv.store.store import StoreError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config

__all__ = ["FAILURES", "BucketReader", "open_bucket"]

T = TypeVar("T")

FAILURES = (BaseError, OSError, ValueError)
"""What obstore raises."""


class BucketReader:
    """The objects of a bucket below a prefix. Thread-safe; all blocks, and lets go of the
    interpreter meanwhile.

    Attributes:
        name: ``s3://bucket/prefix``.
        bucket: the bucket's name.
        objects: obstore's store.
    """

    def __init__(self, bucket: str, prefix: str, options: S3Options) -> None:
        """Nothing is asked of the service yet.

        Raises:
            ConfigError: the options make no sense; see ``S3Options.check``.
        """
        options.check()
        self.name = f"s3://{bucket}/{prefix}".rstrip("/")
        self.bucket = bucket
        self.objects = open_bucket(bucket, prefix, options, stall=True)

    def get(self, key: str, limit: int) -> bytes:
        """A whole object.

        Raises:
            ObjectMissing: there is none.
            StoreError: EFBIG if it is longer than ``limit``; before it is read.
        """
        try:
            size, data = self.ask(key, lambda: self._whole(key, limit))
        except FAILURES as error:
            raise self.explain(key, error) from error
        if len(data) != size:
            raise StoreError(f"{self.name}/{key}: {len(data)} bytes of {size} arrived")
        return data.to_bytes()

    def get_range(self, key: str, offset: int, length: int) -> memoryview:
        """Exactly these bytes of an object.

        Raises:
            ObjectMissing: there is none.
            StoreError: no such range can be, or the object ends before that.
        """
        if offset < 0 or length < 1:
            raise StoreError(f"{self.name}/{key}: {length} bytes at {offset}: no such range")
        try:
            found = self.ask(
                key, lambda: obstore.get_range(self.objects, key, start=offset, length=length)
            )
        except FAILURES as error:
            raise self.explain(key, error) from error
        data = memoryview(found)
        if len(data) != length:
            raise StoreError(
                f"{self.name}/{key}: {length} bytes at {offset}, but it ends after {len(data)} "
                "of them"
            )
        return data

    def _whole(self, key: str, limit: int) -> tuple[int, "obstore.Bytes"]:
        answer = obstore.get(self.objects, key)
        size = answer.meta["size"]
        if size > limit:
            text = f"{self.name}/{key}: {size} bytes, more than {limit}"
            raise StoreError(text, os_errno.EFBIG)
        return size, answer.bytes()

    def ask(self, key: str, call: Callable[[], T]) -> T:
        """One call of obstore's about an object.

        Raises:
            StoreError: given up, for the process is to end; else what ``call`` raises.
        """
        return answered(f"{self.name}/{key}".rstrip("/"), call)

    def explain(self, key: str, error: Exception) -> StoreError:
        """What went wrong with an object, from what obstore raised."""
        return explain(f"{self.name}/{key}", self.bucket, error)


def open_bucket(bucket: str, prefix: str, options: S3Options, *, stall: bool) -> Bucket:
    # One DELETE for one object: Amazon's bulk form is not known everywhere.
    config: S3Config = {"disable_bulk_delete": True}
    if options.endpoint:
        config["aws_endpoint_url_s3"] = options.endpoint  # counts before all others
    if options.region:
        config["region"] = options.region
    if options.access_key:
        config["access_key_id"] = options.access_key
        config["secret_access_key"] = options.secret_key
    if options.session_token:
        config["session_token"] = options.session_token
    if options.virtual_hosted is not None:
        config["virtual_hosted_style_request"] = options.virtual_hosted
    client: ClientConfig = {
        # Whether to whom is decided by S3Options.check.
        "allow_http": options.endpoint.lower().startswith("http:"),
        "connect_timeout": timedelta(seconds=options.connect_timeout_s),
        "timeout": timedelta(seconds=options.timeout_s),
        "user_agent": "nbdsrv",
    }
    if stall:
        client["read_timeout"] = timedelta(seconds=options.stall_timeout_s)
    if options.ca_bundle:
        client["root_certificate"] = options.certificates()
    retry: RetryConfig = {
        "max_retries": options.retries,
        "retry_timeout": timedelta(seconds=options.patience_s),
        "backoff": {
            "init_backoff": timedelta(seconds=options.pause_s),
            "max_backoff": timedelta(seconds=options.pause_s * 50),
        },
    }
    try:
        return Bucket(
            bucket, prefix=prefix or None, config=config, client_options=client, retry_config=retry
        )
    except (BaseError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise ConfigError(f"s3://{bucket}/{prefix}: {said}") from error
