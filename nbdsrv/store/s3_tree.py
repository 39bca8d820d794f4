"""A ``Tree`` of the objects of a bucket, their names divided by ``/``.

::

    entries   GET ?list-type=2&delimiter=/      one request for each thousand names
    find      HEAD, and if there is no such object a listing of one name: is it a directory?
    read      GET
"""

from collections.abc import Sequence

import obstore

from nbdsrv.store.s3_bucket import FAILURES, BucketReader
from nbdsrv.store.s3_options import S3Options
from nbdsrv.store.store import ObjectMissing
from nbdsrv.store.tree import MAX_FILE, Node, Tree, check_path

__all__ = ["S3Tree"]


class S3Tree(Tree):
    """The objects of a bucket below a prefix."""

    distant = True

    def __init__(self, bucket: str, prefix: str = "", options: S3Options | None = None) -> None:
        """Nothing is asked of the service yet.

        Raises:
            ConfigError: the options make no sense; see ``S3Options.check``.
        """
        self._reader = BucketReader(bucket, prefix, options or S3Options.from_environment())
        self.name = self._reader.name

    def entries(self, path: str = "") -> Sequence[Node]:
        check_path(self.name, path)
        below = f"{path}/" if path else None
        try:
            objects = self._reader.objects
            found = self._reader.ask(path, lambda: obstore.list_with_delimiter(objects, below))
        except FAILURES as error:
            raise self._reader.explain(path, error) from error
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
                row = self._reader.ask(path, lambda: obstore.head(self._reader.objects, path))
                modified = row["last_modified"].timestamp()
                return Node(name, directory=False, size=row["size"], modified=modified)
        except FAILURES as error:
            said = self._reader.explain(path, error)
            if not isinstance(said, ObjectMissing):
                raise said from error
        directory = Node(name, directory=True, size=0, modified=0)
        return directory if self.entries(path) else None

    def read(self, path: str, limit: int = MAX_FILE) -> bytes:
        check_path(self.name, path)
        return self._reader.get(path, limit)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        check_path(self.name, path)
        return bytes(self._reader.get_range(path, offset, length))
