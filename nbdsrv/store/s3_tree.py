"""A ``Tree`` of the objects of a bucket, their names divided by ``/``.

::

    entries   GET ?list-type=2&delimiter=/      one request for each thousand names
    find      HEAD, and if there is no such object a listing of one name: is it a directory?
    read      GET
"""

import errno as os_errno
from collections.abc import Sequence

import obstore
from obstore.exceptions import BaseError

from nbdsrv.store.s3 import open_bucket
from nbdsrv.store.s3_errors import explain
from nbdsrv.store.s3_options import S3Options
from nbdsrv.store.store import ObjectMissing, StoreError
from nbdsrv.store.tree import MAX_FILE, Node, Tree, check_path

__all__ = ["S3Tree"]

_FAILURES = (BaseError, OSError, ValueError)


class S3Tree(Tree):
    """The objects of a bucket below a prefix."""

    distant = True

    def __init__(self, bucket: str, prefix: str = "", options: S3Options | None = None) -> None:
        """Nothing is asked of the service yet.

        Raises:
            ConfigError: the options make no sense; see ``S3Options.check``.
        """
        options = options or S3Options.from_environment()
        options.check()
        self.name = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._objects = open_bucket(bucket, prefix, options, stall=True)

    def entries(self, path: str = "") -> Sequence[Node]:
        check_path(self.name, path)
        below = f"{path}/" if path else None
        try:
            found = obstore.list_with_delimiter(self._objects, below)
        except _FAILURES as error:
            raise self._explain(path, error) from error
        nodes = {
            name: Node(name, directory=True, size=0, modified=0)
            for prefix in found["common_prefixes"]
            if (name := prefix.rstrip("/").rpartition("/")[2])
        }
        for row in found["objects"]:
            name = row["path"].rpartition("/")[2]
            if not name or row["path"] == path:
                continue  # "folder/", an empty object other tools make
            modified = row["last_modified"].timestamp()
            nodes.setdefault(name, Node(name, directory=False, size=row["size"], modified=modified))
        return [nodes[name] for name in sorted(nodes)]

    def find(self, path: str) -> Node | None:
        check_path(self.name, path)
        name = path.rpartition("/")[2]
        try:
            if path:
                row = obstore.head(self._objects, path)
                modified = row["last_modified"].timestamp()
                return Node(name, directory=False, size=row["size"], modified=modified)
        except _FAILURES as error:
            said = self._explain(path, error)
            if not isinstance(said, ObjectMissing):
                raise said from error
        directory = Node(name, directory=True, size=0, modified=0)
        return directory if self.entries(path) else None

    def read(self, path: str, limit: int = MAX_FILE) -> bytes:
        check_path(self.name, path)
        try:
            answer = obstore.get(self._objects, path)
            size = answer.meta["size"]
            if size > limit:
                text = f"{self.full(path)}: {size} bytes, more than {limit}"
                raise StoreError(text, os_errno.EFBIG)
            data = answer.bytes()
        except StoreError:
            raise
        except _FAILURES as error:
            raise self._explain(path, error) from error
        if len(data) != size:
            raise StoreError(f"{self.full(path)}: {len(data)} bytes of {size} arrived")
        return data.to_bytes()

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        check_path(self.name, path)
        if offset < 0 or length < 1:
            raise StoreError(f"{self.full(path)}: {length} bytes at {offset}: no such range")
        try:
            data = obstore.get_range(self._objects, path, start=offset, length=length)
        except _FAILURES as error:
            raise self._explain(path, error) from error
        if len(data) != length:
            text = f"{self.full(path)}: {length} bytes at {offset}, but it ends after {len(data)}"
            raise StoreError(f"{text} of them")
        return data.to_bytes()

    def _explain(self, path: str, error: Exception) -> StoreError:
        return explain(self.full(path), self._bucket, error)
