"""What is to be served, and the exports that come of it; while clients are attached.

::

    offers ── prepare ──> Plan ── commit ──> the catalogue has what was offered
                           └───── discard    nothing has happened

    the same source, as before       the same Export, with what was opened; its terms may be new
    anything else                    a new Export: for new clients
    no longer offered                nobody finds it; who uses it keeps it, it closes behind them

Rule: a plan that cannot be carried out as a whole is not begun.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, NbdsrvError
from nbdsrv.export.access import EVERYBODY, Access
from nbdsrv.export.exports import Catalogue, Collection, Export
from nbdsrv.export.grammar import Kind, Source, parse_source
from nbdsrv.export.opener import open_collection, open_source
from nbdsrv.repository.passphrase import VARIABLE, passphrase_of

if TYPE_CHECKING:
    from nbdsrv.overlay.exports import Overlays

__all__ = ["Offer", "Offers", "Plan", "Served"]

MANY = frozenset({Kind.REPOSITORY, Kind.HYPERVISOR})
"""Kinds of SOURCE that are several exports."""

Served = Export | Collection


@dataclass(frozen=True, slots=True)
class Offer:
    """One SOURCE under a name.

    Attributes:
        name: of the export, or of a collection.
        source: a SOURCE.
        write: let clients write.
        overlay: directory for what they write, or None.
        hydrate: bytes of the base a second that are copied there meanwhile; 0: as fast as it
            goes; None: it is not.
        prefix: of the names of a collection's exports.
        passphrase_file: of a repository; None for the environment's.
        description: for LIST; None for the file's name.
        tls_only: never in plain text.
        access: who may.
        mistake: how to tell its user that it cannot be opened; None to raise what came.
    """

    name: str
    source: str
    write: bool = False
    overlay: str | None = None
    hydrate: int | None = None
    prefix: str = ""
    passphrase_file: str | None = None
    description: str | None = None
    tls_only: bool = False
    access: Access = EVERYBODY
    mistake: Callable[[str], ConfigError] | None = field(default=None, compare=False)

    @property
    def substance(self) -> tuple[object, ...]:
        """What cannot change without opening it anew."""
        return (
            self.name,
            self.source,
            self.write,
            self.overlay and os.path.abspath(self.overlay),
            self.hydrate,
            self.prefix,
            self.passphrase_file,
        )


@dataclass(slots=True)
class Plan:
    """What is to be served from now on.

    Attributes:
        served: all of it.
        fresh: those that were opened for it.
        added, removed, changed: names, compared with what is served now.
    """

    served: list[tuple[Offer, Served]] = field(default_factory=list)
    fresh: list[Served] = field(default_factory=list)
    catalogue: Catalogue = field(default_factory=Catalogue)
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


class Offers:
    """Keeps a catalogue as it is offered. Belongs to one event loop; one plan at a time.

    Attributes:
        served: what the catalogue has, and what it was offered as.
        traffic: of the clients; what goes on behind overlays waits for its pauses.
    """

    def __init__(self, catalogue: Catalogue, workers: Workers) -> None:
        self._catalogue = catalogue
        self._workers = workers
        self._leaving: list[tuple[Offer, Export]] = []
        self._retired: list[Collection] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._covers: dict[str, Overlays] = {}
        self.served: list[tuple[Offer, Served]] = []
        self.traffic: Callable[[], int | None] = lambda: 0

    def overlays(self) -> list[dict[str, object]]:
        """What is told of the overlays that are open."""
        return [facts for each in self._covers.values() for facts in each.facts()]

    async def prepare(self, offers: Sequence[Offer]) -> Plan:
        """Open what is new, and look whether it can be read.

        Raises:
            ConfigError: two of them have the same name, or make no sense.
            DiskError: one cannot be opened.
        """
        _check_bases(offers)
        plan = Plan()
        # An overlay that is leaving is taken back as it is: nobody can open it a second time.
        leaving = [each for each in self._leaving if each[0].overlay is not None]
        known = {offer.substance: served for offer, served in [*leaving, *self.served]}
        try:
            for offer in offers:
                served = known.get(offer.substance)
                try:
                    if served is None:
                        await self._check_in_use(offer)
                        served = await self._open(offer)
                        plan.fresh.append(served)
                        await _try(served)
                    self._enter(plan.catalogue, served)
                except NbdsrvError as error:
                    if offer.mistake is None:
                        raise
                    raise offer.mistake(str(error)) from error
                plan.served.append((offer, served))
        except BaseException:
            await self.discard(plan)
            raise
        self._compare(plan)
        return plan

    async def discard(self, plan: Plan) -> None:
        """Close what was opened for it."""
        for served in plan.fresh:
            if isinstance(served, Collection):
                await served.close()

    def commit(self, plan: Plan) -> None:
        """Serve that. Cannot fail."""
        for offer, served in plan.served:
            served.access = offer.access
            served.tls_only = offer.tls_only
            if isinstance(served, Export):
                served.description = _description(offer)
        kept = {id(served) for _, served in plan.served}
        self._leaving = [
            (offer, served)
            for offer, served in [*self._leaving, *self.served]
            if isinstance(served, Export) and id(served) not in kept
        ]
        before = self._catalogue.collections
        self._catalogue.become(plan.catalogue)
        self._retired += [each for each in before if each not in plan.catalogue.collections]
        self.served = plan.served
        self.clean_up()

    def clean_up(self) -> None:
        """Close collections that are served no more and that nobody uses any more."""
        self._leaving = [each for each in self._leaving if not each[1].at_rest]
        for collection in [each for each in self._retired if not self._catalogue.in_use(each)]:
            self._retired.remove(collection)
            task = asyncio.get_running_loop().create_task(collection.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all collections; a VM that is frozen must not stay so."""
        for overlays in self._covers.values():
            await overlays.close()
        for collection in [*self._catalogue.collections, *self._retired]:
            await collection.close()
        self._retired.clear()
        if self._closing:
            await asyncio.wait(self._closing)

    async def _check_in_use(self, offer: Offer) -> None:
        """An image with tables of its own has one reader of them, if somebody writes it.

        And nobody writes one that an overlay lies over, tables or not.
        """
        image = _image(offer)
        for other, served in [*self.served, *self._leaving]:
            if not isinstance(served, Export) or image is None or image != _image(other):
                continue
            await served.settled()  # an image that is being closed is still being written
            writes = _changes(offer) or _changes(other)
            plain = served.disk is not None and served.disk.format == "raw" and not offer.overlay
            if served.disk is not None and not plain and writes:
                text = f"{served.users} clients use this image as export {served.name!r}"
                hint = "wait until they have left, or end them with `nbdsrv status --drop ID`"
                raise ConfigError(f"{text}, and it can only be written by one; {hint}")

    async def _open(self, offer: Offer) -> Served:
        source = parse_source(offer.source)
        if offer.overlay is not None:
            from nbdsrv.overlay.exports import check_coverable

            check_coverable(source)
        passphrase = passphrase_of
        if offer.passphrase_file is not None:
            passphrase = partial(passphrase_of, {f"{VARIABLE}_FILE": offer.passphrase_file})
        if source.kind in MANY and source.partition is None:
            collection = await open_collection(
                source,
                self._workers,
                offer.name,
                offer.prefix,
                writable=_changes(offer),
                tls_only=offer.tls_only,
                passphrase=passphrase,
            )
            if collection is not None:
                if offer.overlay is not None:
                    self._overlays(offer.overlay).cover(collection, source, offer.hydrate)
                return collection
        export = Export(
            name=offer.name,
            open=self._opener(offer, source, passphrase),
            description=_description(offer),
            tls_only=offer.tls_only,
        )
        if offer.overlay is not None:
            opener = partial(open_source, workers=self._workers, passphrase=passphrase)
            self._overlays(offer.overlay).over(export, source, opener, offer.hydrate)
        return export

    def _overlays(self, directory: str) -> "Overlays":
        """Those in a directory; one object for each, however many exports have theirs there."""
        from nbdsrv.overlay.exports import Overlays

        key = os.path.abspath(directory)
        return self._covers.setdefault(key, Overlays(key, self._workers, self._traffic_now))

    def _traffic_now(self) -> int | None:
        return self.traffic()

    def _opener(
        self, offer: Offer, source: Source, passphrase: Callable[[], str]
    ) -> Callable[[], Awaitable[Disk]]:
        return partial(
            open_source, source, self._workers, writable=_changes(offer), passphrase=passphrase
        )

    @staticmethod
    def _enter(catalogue: Catalogue, served: Served) -> None:
        if isinstance(served, Export):
            catalogue.add(served)
        else:
            catalogue.collections.append(served)

    def _compare(self, plan: Plan) -> None:
        before = {offer.name: (offer, served) for offer, served in self.served}
        after = {offer.name: (offer, served) for offer, served in plan.served}
        plan.added = [name for name in after if name not in before]
        plan.removed = [name for name in before if name not in after]
        plan.changed = [name for name in after if name in before and after[name] != before[name]]


def _image(offer: Offer) -> str | None:
    """The file behind an offer that is an image."""
    source = parse_source(offer.source)
    return os.path.realpath(source.location) if source.kind is Kind.IMAGE else None


def _check_bases(offers: Sequence[Offer]) -> None:
    """What an overlay lies over stays as it is: a writer beside it would show through.

    Raises:
        ConfigError: it would not.
    """
    writers = {_image(offer): offer for offer in offers if _changes(offer)}
    writers.pop(None, None)
    for offer in offers:
        writer = writers.get(_image(offer)) if offer.overlay is not None else None
        if writer is not None:
            text = f"clients write to this image, and export {offer.name!r} has an overlay over it"
            error = ConfigError(f"{text}; give it another image, or this one an overlay as well")
            raise error if writer.mistake is None else writer.mistake(str(error))


def _changes(offer: Offer) -> bool:
    """Do clients write to the image itself?"""
    return offer.write and offer.overlay is None


def _description(offer: Offer) -> str:
    if offer.description is not None:
        return offer.description
    # Not the whole path: where things lie on this host is no concern of a client.
    return os.path.basename(parse_source(offer.source).location)


async def _try(served: Served) -> None:
    """Fail now rather than when the first client comes."""
    if isinstance(served, Export):
        await served.acquire()
        await served.release()
