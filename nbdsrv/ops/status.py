"""The status document: what a server tells about itself, as JSON values.

Sizes are bytes, times seconds, ``received`` and ``sent`` as the server sees it: what clients send,
requests included, and what they are sent, reply headers included.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from nbdsrv import __version__
from nbdsrv.disk.disk import Ability
from nbdsrv.disk.workers import Workers
from nbdsrv.export.exports import Catalogue, Collection, Export
from nbdsrv.net.measures import percentile
from nbdsrv.net.server import Server, measured_as
from nbdsrv.net.session import Session
from nbdsrv.ops.offers import Offer, Offers
from nbdsrv.ops.rates import PERCENTILES, Lately, Rates, totals

__all__ = ["Overview", "Reloads"]


@dataclass(slots=True)
class Reloads:
    """What became of the last one.

    Attributes:
        count: that succeeded.
        failed: likewise.
        when: of the last, seconds since the epoch; 0.0 if there was none.
        error: why it failed, or None.
    """

    count: int = 0
    failed: int = 0
    when: float = 0.0
    error: str | None = None


@dataclass(slots=True)
class Overview:
    """Where to look."""

    server: Server
    catalogue: Catalogue
    offers: Offers
    workers: Workers
    rates: Rates
    reloads: Reloads
    config: str | None
    started: float = field(default_factory=time.time)

    def document(self) -> dict[str, object]:
        """All of it."""
        return {
            "server": self.process(),
            "exports": self.exports(),
            "clients": self.clients(),
            "overlays": self.offers.overlays(),
        }

    def process(self) -> dict[str, object]:
        """The process as a whole."""
        server, reloads = self.server, self.reloads
        buffers, cache = server.buffers, self.workers.cache
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started": self.started,
            "uptime_s": time.time() - self.started,
            "config": self.config,
            "reloads": {
                "succeeded": reloads.count,
                "failed": reloads.failed,
                "last": reloads.when or None,
                "error": reloads.error,
            },
            "listening": [_place(listener.address) for listener in server.listeners],
            "tls": server.tls.value,
            "connections": {
                "attached": len(server.sessions),
                "handshakes": server.handshakes,
                "limit": server.limits.connections,
                "accepted": server.accepted,
                "refused": server.refused,
            },
            "memory": {
                "resident": _resident(),
                "lent": buffers.lent,
                "budget": buffers.budget,
            },
            "descriptors": len(os.listdir("/proc/self/fd")),
            "cache": {
                "limit": cache.limit,
                "held": cache.size,
                "hits": cache.hits,
                "misses": cache.misses,
            },
            "loop_lag": {
                name: percentile(server.lag.counts, share) for name, share in PERCENTILES.items()
            },
        }

    def exports(self) -> list[dict[str, object]]:
        """What is offered, and what is offered no more and still in use."""
        moved = totals(self.server)
        sessions: dict[str, list[Session]] = {}
        for session in self.server.sessions.values():
            sessions.setdefault(measured_as(session.export), []).append(session)
        found = []
        for offer, served in self.offers.served:
            users = sessions.get(served.name, [])
            known = [each for each in users if self._is_of(each.export, served)]
            found.append(self._export(offer, served, known, moved))
        leaving: dict[str, list[Session]] = {}
        for session in self.server.sessions.values():
            if not self.catalogue.has(session.export):
                leaving.setdefault(measured_as(session.export), []).append(session)
        found += [self._leaving(name, users) for name, users in leaving.items()]
        return found

    def clients(self) -> list[dict[str, object]]:
        """Who is attached."""
        return [self._client(session) for session in self.server.sessions.values()]

    def _is_of(self, export: Export, served: Export | Collection) -> bool:
        return served in {export, export.collection}

    def _export(
        self,
        offer: Offer,
        served: Export | Collection,
        users: list[Session],
        moved: Mapping[str, object],
    ) -> dict[str, object]:
        facts: dict[str, object] = {
            "name": offer.name,
            "kind": "export" if isinstance(served, Export) else "collection",
            "state": "served",
            "source": offer.source,
            "write": offer.write,
            "overlay": offer.overlay,
            "tls_only": offer.tls_only,
            "restricted": offer.access.rules is not None,
            "clients": len(users),
        }
        disk = served.disk if isinstance(served, Export) else None
        if disk is not None:
            facts["size"] = disk.size
            facts["format"] = disk.format
            facts["writable"] = Ability.WRITE in disk.abilities
            if offer.overlay:
                facts["facts"] = dict(disk.facts)
        return facts | self._figures(served.name, moved)

    def _figures(self, name: str, moved: Mapping[str, object]) -> dict[str, object]:
        measures = self.server.measures.get(name)
        tally = moved.get(name)
        if measures is None or tally is None:
            return {}
        figures = {key: getattr(tally, key) for key in ("received", "sent", *_REQUESTS)}
        lately = self.rates.lately(name)
        return figures | {
            "failed": measures.failed,
            "attached": measures.attached,
            "lately": _lately(lately),
        }

    def _leaving(self, name: str, users: list[Session]) -> dict[str, object]:
        kind = "export" if users[0].export.collection is None else "collection"
        return {"name": name, "kind": kind, "state": "leaving", "clients": len(users)}

    def _client(self, session: Session) -> dict[str, object]:
        tally = session.client.tally()
        return {
            "id": session.id,
            "export": session.name,
            "state": "served" if self.catalogue.has(session.export) else "leaving",
            "access": "ro" if session.read_only else "rw",
            "place": session.peer.place,
            **session.peer.facts(),
            "tls": session.tls or None,
            "dialect": session.dialect,
            "since": session.since,
            "duration_s": session.duration_s,
            "received": tally.received,
            "sent": tally.sent,
            **{key: getattr(tally, key) for key in _REQUESTS},
        }


_REQUESTS = ("reads", "writes", "others", "refused")


def _lately(lately: Lately) -> dict[str, object]:
    moved = lately.moved
    return {
        "seconds": lately.seconds,
        "received_per_s": lately.per_second(moved.received),
        "sent_per_s": lately.per_second(moved.sent),
        "reads_per_s": lately.per_second(moved.reads),
        "writes_per_s": lately.per_second(moved.writes),
        "others_per_s": lately.per_second(moved.others),
        "waits": {kind: dict(values) for kind, values in lately.waits.items()},
    }


def _place(address: tuple[str, int] | str) -> str:
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _resident() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
