"""Our own repository as one that backups go to."""

from collections.abc import Sequence

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import RepositoryError
from nbdsrv.repository.destination import Destination, KnownPoint, Occasion
from nbdsrv.repository.native.damage import damage_in
from nbdsrv.repository.native.layout import is_text, point_prefix
from nbdsrv.repository.native.point import PointRecord
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.native.writer import NativePointWriter, begin
from nbdsrv.store.store import StoreError

__all__ = ["NativeDestination"]


class NativeDestination(Destination):
    """An open vault, which stays its opener's unless ``close`` is called.

    Attributes:
        vault: it.
    """

    def __init__(self, vault: Vault) -> None:
        self.name = vault.name
        self.place = f"repo {vault.repository.hex()}"
        self.granularity = vault.config.chunk_size
        self.vault = vault

    def check_group(self, group: str) -> None:
        """As promised."""
        try:
            point_prefix(group)
        except ValueError as error:
            raise RepositoryError(f"{self.name}: {error}") from error

    def stored(self, group: str) -> Sequence[str]:
        """As promised."""
        return [stored.key for stored in self.vault.point_objects(group)]

    def point(self, key: str) -> PointRecord:
        """As promised."""
        return self.vault.point(key)

    def prove(self, point: KnownPoint, disk: str) -> None:
        """The root of its map; pages that are damaged cost being read anew, no more."""
        assert isinstance(point, PointRecord)
        record = point.disk(disk)
        if record is None:
            return
        try:
            self.vault.root(record.root)
        except StoreError as error:  # a bad sector, or an object that was cut off
            raise damage_in(self.vault.store, error) from error

    async def begin(
        self, workers: Workers, occasion: Occasion, parent: KnownPoint | None
    ) -> NativePointWriter:
        """As promised."""
        assert parent is None or isinstance(parent, PointRecord)
        for name, value in occasion.labels.items():
            if not is_text(name + value):
                text = f"{self.name}: a label is UTF-8, and {f'{name}={value}'!r} is not"
                raise RepositoryError(f"{text}; choose another")
        return await begin(self.vault, workers, occasion.group, parent, level=occasion.level)

    def close(self) -> None:
        """As promised."""
        self.vault.close()
