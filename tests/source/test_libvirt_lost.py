"""A domain that ends while it is read: that is told, and not what it did to a connection."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.source import libvirt
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.libvirt import LibvirtDomain


class Ended:
    """In the place of ``LibvirtFrozen``: libvirt has no job any more, once it is asked."""

    vm = "web"

    def __init__(self, reason: str) -> None:
        self.lost = ""
        self.left = False
        self._reason = reason

    async def still_frozen(self) -> None:
        assert not self.left
        self.lost = self._reason
        if self.lost:
            raise SourceError(f"web: {self.lost}")

    async def leave(self) -> None:
        self.left = True


class Domain(LibvirtDomain):
    frozen: Any

    @asynccontextmanager
    async def _linked(self) -> AsyncIterator[Any]:
        yield self

    async def xml(self) -> str:
        return ""

    async def is_running(self) -> bool:
        return True

    async def _begin(self, *_: Any) -> Any:
        return self.frozen


@pytest.mark.parametrize(
    ("reason", "told"),
    [("the VM was shut off", "^web: the VM was shut off$"), ("", "^vda: Connection refused")],
)
async def test_why_a_disk_could_not_be_read(
    reason: str, told: str, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: Any) -> list[str]:
        return []

    monkeypatch.setattr(libvirt, "parse_domain", lambda _: None)
    monkeypatch.setattr(libvirt, "_selected", lambda *_: [])
    monkeypatch.setattr(libvirt, "remove_remains", nothing)
    domain = Domain("qemu:///system", "web", workers)
    domain.frozen = Ended(reason)
    with pytest.raises(DiskError, match=told):
        async with domain.freeze({}):
            raise DiskError("vda: Connection refused", errno.ECONNREFUSED)
    assert domain.frozen.left
