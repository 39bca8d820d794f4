"""A hypervisor for tests: a VM whose writes are logged by checkpoints, as the seam demands it.

::

    write ──> content, and the dirty blocks of every checkpoint there is
    freeze    the content at this moment, a new checkpoint, a job that a kill leaves behind
    step      every step of the way is announced: there a test writes, raises, kills

The real ones are driven in the conformance checks.
"""

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.source.hypervisor import Frozen, FrozenDisk, Hypervisor, SourceError
from nbdsrv.source.opening import Machine
from nbdsrv.store.faulty import Crashed
from protocol.extents import ExtentList
from tests.copying.disks import MemoryDisk

__all__ = ["BLOCK", "CONTEXT", "KIND", "STEPS", "Killed", "TrackedVm", "as_machine"]

BLOCK = 4096
CONTEXT = "test:changed"
KIND = "qemu"
STEPS = (
    "vm",
    "clean",
    "freeze",
    "frozen",
    "read",
    "confirm",
    "succeed",
    "succeeded",
    "thaw",
    "thawed",
)


class Killed(BaseException):
    """The process is no more; nothing after it changes anything."""


@dataclass
class TrackedVm(Hypervisor):
    """A VM.

    Attributes:
        name: its name.
        content: of each disk, now.
        checkpoints: by identity: by disk, the dirty blocks since then.
        moments: by identity: what each disk was then. Kept by the test, not the hypervisor.
        unconfirmed: the checkpoint of a freeze that did not succeed (yet).
        merges: after a crash, is that one removed? Else it is kept like any other.
        job: is a freeze under way, or left by a kill?
        step: called at every step with its name.
        blind: disks of which nothing is tracked.
        wrong_context: serve another context than promised.
    """

    name: str
    content: dict[str, bytearray]
    checkpoints: dict[str, dict[str, set[int]]] = field(default_factory=dict)
    moments: dict[str, dict[str, bytes]] = field(default_factory=dict)
    unconfirmed: str = ""
    merges: bool = True
    job: bool = False
    step: Callable[[str], None] = lambda _: None
    blind: frozenset[str] = frozenset()
    wrong_context: bool = False
    consistency: str = "crash"
    numbers: Any = field(default_factory=lambda: count(1))
    dead: bool = False

    def write(self, disk: str, offset: int, data: bytes) -> None:
        content = self.content[disk]
        data = data[: max(0, len(content) - offset)]
        content[offset : offset + len(data)] = data
        for dirty in self.checkpoints.values():
            blocks = range(offset // BLOCK, -(-(offset + len(data)) // BLOCK))
            dirty.setdefault(disk, set()).update(blocks)

    def reborn(self) -> None:
        """A new process of ours."""
        self.dead = False

    def _at(self, step: str) -> None:
        if self.dead:
            raise Killed
        try:
            self.step(step)
        except Killed:
            self.dead = True
            raise

    async def vm(self) -> str:
        self._at("vm")
        return self.name

    async def clean(self) -> Sequence[str]:
        self._at("clean")
        removed = []
        if self.job:
            self.job = False
            removed.append("job backup0")
        if self.unconfirmed:
            if self.merges:
                del self.checkpoints[self.unconfirmed]
                removed.append(f"checkpoint {self.unconfirmed}")
            self.unconfirmed = ""
        return removed

    @asynccontextmanager
    async def freeze(
        self, known: Mapping[str, Sequence[str]], disks: Sequence[str] = ()
    ) -> AsyncIterator[Frozen]:
        self._at("freeze")
        if self.job:
            raise SourceError(f"{self.name}: a job is running")
        names = [name for name in self.content if not disks or name in disks]
        since = {name: self._since(name, known) for name in names}
        new = f"c{next(self.numbers)}"
        self.job, self.unconfirmed = True, new
        self.moments[new] = {name: bytes(self.content[name]) for name in names}
        dirty = {name: set(self.checkpoints.get(since[name], {}).get(name, ())) for name in names}
        self.checkpoints[new] = {}
        frozen = _Frozen(self, new, since, dirty)
        try:
            self._at("frozen")
            yield frozen
            self._at("thaw")
        except Crashed:
            self.dead = True
            raise
        finally:
            if not self.dead:
                self.job = False
                if self.unconfirmed:
                    del self.checkpoints[self.unconfirmed]
                    self.unconfirmed = ""
        self._at("thawed")

    def _since(self, name: str, known: Mapping[str, Sequence[str]]) -> str:
        if name in self.blind:
            return ""
        return next((each for each in known.get(name, ()) if each in self.checkpoints), "")


class _Frozen(Frozen):
    def __init__(
        self, vm: TrackedVm, new: str, since: Mapping[str, str], dirty: Mapping[str, set[int]]
    ) -> None:
        self.vm = vm.name
        self.consistency = vm.consistency
        self.facts = {"machine": {"name": vm.name}, "domain.xml": "<domain/>"}
        self._of, self._new, self._since = vm, new, since
        self.disks = [
            FrozenDisk(
                name=name,
                uri="",
                size=len(vm.moments[new][name]),
                context=CONTEXT if since[name] else "",
                since=since[name],
                checkpoint="" if name in vm.blind else new,
                reason="" if since[name] else "no checkpoint of this disk is known",
                facts={"format": "memory"},
                open=self._opener(name, dirty[name]),
            )
            for name in since
        ]

    def _opener(self, name: str, dirty: set[int]) -> Any:
        @asynccontextmanager
        async def opened(workers: Workers, _: Sequence[str]) -> AsyncIterator[Disk]:
            self._of._at("read")
            yield FrozenMemory(workers, self._of, self._of.moments[self._new][name], dirty)

        return opened

    async def still_frozen(self) -> None:
        self._of._at("confirm")

    async def succeed(self, needed: Collection[str] = ()) -> None:
        vm = self._of
        vm._at("succeed")
        vm.unconfirmed = ""
        keep = {self._new, *self._since.values(), *needed}
        vm.checkpoints = {each: dirty for each, dirty in vm.checkpoints.items() if each in keep}
        vm._at("succeeded")


class FrozenMemory(MemoryDisk):
    """A disk at one moment, and what had changed."""

    def __init__(self, workers: Workers, vm: TrackedVm, content: bytes, dirty: set[int]) -> None:
        super().__init__(workers, content)
        self._vm = vm
        self._dirty = dirty
        name = "test:other" if vm.wrong_context else CONTEXT
        self.contexts = (*MemoryDisk.contexts, name)

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        if context != CONTEXT:
            return await super().status(context, offset, length)
        found, at = [], offset
        while at < offset + length:
            end = min((at // BLOCK + 1) * BLOCK, offset + length)
            found.append((end - at, int(at // BLOCK in self._dirty)))
            at = end
        return ExtentList(offset, found)


def as_machine(vm: TrackedVm, disks: Sequence[str] = ()) -> Machine:
    return Machine(vm, KIND, f"test:{vm.name}", disks)
