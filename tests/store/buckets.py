"""The S3 service of a test run, and a client of it that is not ours."""

from typing import Any, NamedTuple

__all__ = ["Service"]


class Service(NamedTuple):
    """A running service.

    Attributes:
        endpoint: its URL.
        client: boto3's, which sees what our store does and does what it does not.
    """

    endpoint: str
    client: Any

    def keys(self, bucket: str) -> list[str]:
        """All keys of a bucket."""
        answer = self.client.list_objects_v2(Bucket=bucket)
        return [row["Key"] for row in answer.get("Contents", [])]
