"""What a check needs of an S3 service, whoever's it is; and one for the buckets of each.

A service is a set of real servers on loopback that were started for this check and end with it.
"""

import socket
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import timedelta

import obstore
from obstore.store import S3Store

from conformance.outcome import CheckFailedError

__all__ = ["ObjectService", "free_ports", "is_listening"]


class ObjectService(ABC):
    """A running service.

    Attributes:
        name: for messages.
        endpoint: its URL.
        access_key: of the one user.
        secret_key: its other half.
    """

    name: str
    endpoint: str
    access_key: str
    secret_key: str

    def environment(self, **changes: str) -> Mapping[str, str]:
        """What an S3 client is told by environment variables; ``changes`` replace or add some."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            **changes,
        }

    def create_bucket(self, name: str) -> None:
        """Make an empty bucket, by a signed URL: no client library here makes buckets.

        Raises:
            CheckFailedError: the service said no.
        """
        store = S3Store(
            bucket=name,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            client_options={"allow_http": True},
        )
        url = obstore.sign(store, "PUT", "", timedelta(minutes=1))
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=30):
                pass
        except urllib.error.URLError as error:
            text = f"{self.name} makes no bucket {name}: {error}; {self.said()}"
            raise CheckFailedError(text) from None

    @abstractmethod
    def said(self) -> str:
        """The end of what its servers logged, in one line."""


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that nobody listens on now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def is_listening(port: int) -> bool:
    """Does anybody accept connections there?"""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
