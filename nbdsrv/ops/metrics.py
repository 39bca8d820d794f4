"""The Prometheus endpoint: ``http://HOST:PORT/metrics``, off unless configured.

::

    scrape ── thread ── Figures.collect ──> the loop makes a snapshot ──> text

The page is made in a thread of its own; only the counters are looked at on the loop, so that a
scrape keeps no client waiting. Waits of reads that were answered at once are a sample (see
``nbdsrv.net.measures``) and a family of their own: their count says nothing about how many there
were, ``nbdsrv_requests_total`` does.
"""

import asyncio
import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from nbdsrv import __version__
from nbdsrv.errors import ListenError
from nbdsrv.net.measures import BUCKETS, Histogram, Tally, bucket_end
from nbdsrv.ops.endpoints import parse_tcp
from nbdsrv.ops.rates import totals
from nbdsrv.ops.status import Overview

__all__ = ["MetricsEndpoint"]

SNAPSHOT_S = 5.0
"""Seconds the loop may take to answer; a scraper gives up sooner or later anyway."""
SILENCE_S = 10.0
"""Seconds a scraper may take to say what it wants."""
_BOUNDS = [(exponent << 2) | 3 for exponent in range(9, 36, 2)]
"""Last bucket of each exported one: 1 us, 4 us, ... 69 s, in powers of two."""


@dataclass(frozen=True, slots=True)
class _Export:
    name: str
    clients: int
    attached: int
    failed: int
    tally: Tally
    quick: "_Counts"
    waited: dict[str, "_Counts"]


@dataclass(frozen=True, slots=True)
class _Counts:
    counts: list[int]
    total_s: float

    @classmethod
    def of(cls, histogram: Histogram) -> "_Counts":
        return cls(list(histogram.counts), histogram.total_s)

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus counts: how many took at most so long."""
        found: list[tuple[str, float]] = []
        seen, at = 0, 0
        for last in _BOUNDS:
            seen += sum(self.counts[at : last + 1])
            at = last + 1
            found.append((repr(bucket_end(last)), seen))
        return [*found, ("+Inf", seen + sum(self.counts[at:BUCKETS]))]


class _Figures(Collector):
    """Asks the loop, from any other thread."""

    def __init__(self, overview: Overview, loop: asyncio.AbstractEventLoop) -> None:
        self._overview = overview
        self._loop = loop

    def describe(self) -> Iterator[Metric]:
        """Registering must not ask the loop: it is the loop that registers."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        look = asyncio.run_coroutine_threadsafe(self._look(), self._loop)
        try:
            process, exports, lag = look.result(SNAPSHOT_S)
        except BaseException:
            look.cancel()
            raise
        yield from _of_process(process, lag)
        yield from _of_exports(exports)

    async def _look(self) -> tuple[dict[str, Any], list[_Export], _Counts]:
        server = self._overview.server
        moved = totals(server)
        clients: dict[str, int] = {}
        for session in server.sessions.values():
            key = session.export.collection or session.export
            clients[key.name] = clients.get(key.name, 0) + 1
        exports = [
            _Export(
                name,
                clients.get(name, 0),
                measures.attached,
                measures.failed,
                moved[name],
                _Counts.of(measures.quick),
                {
                    "read": _Counts.of(measures.reads),
                    "write": _Counts.of(measures.writes),
                    "other": _Counts.of(measures.others),
                },
            )
            for name, measures in server.measures.items()
        ]
        return self._overview.process(), exports, _Counts.of(server.lag)


def _of_process(process: dict[str, Any], lag: _Counts) -> Iterator[Metric]:
    yield _gauge("nbdsrv_info", "The program; always 1.", 1, {"version": __version__})
    connections, memory, cache = process["connections"], process["memory"], process["cache"]
    reloads = process["reloads"]
    yield _gauge("nbdsrv_clients_limit", "Clients at any one time.", connections["limit"])
    yield _gauge("nbdsrv_handshakes", "Clients in their handshake.", connections["handshakes"])
    yield _counter("nbdsrv_accepted", "Connections accepted.", connections["accepted"])
    yield _counter(
        "nbdsrv_refused", "Exports refused, and failed TLS handshakes.", connections["refused"]
    )
    yield _gauge("nbdsrv_buffer_bytes", "Lent to requests in flight.", memory["lent"])
    yield _gauge("nbdsrv_buffer_limit_bytes", "What may be lent.", memory["budget"])
    yield _gauge("nbdsrv_cache_bytes", "Decoded blocks in memory.", cache["held"])
    yield _gauge("nbdsrv_cache_limit_bytes", "What may be kept.", cache["limit"])
    yield _counter("nbdsrv_cache_hits", "Decoded blocks found in memory.", cache["hits"])
    yield _counter("nbdsrv_cache_misses", "Blocks that had to be decoded.", cache["misses"])
    yield _counter("nbdsrv_reloads", "Reloads that succeeded.", reloads["succeeded"])
    yield _counter("nbdsrv_reloads_failed", "Reloads that changed nothing.", reloads["failed"])
    late = HistogramMetricFamily("nbdsrv_loop_lag_seconds", "How late the event loop was.")
    late.add_metric([], lag.buckets(), lag.total_s)
    yield late


def _of_exports(exports: list[_Export]) -> Iterator[Metric]:
    label = ["export"]
    clients = GaugeMetricFamily("nbdsrv_clients", "Clients attached.", labels=label)
    attached = CounterMetricFamily("nbdsrv_attached", "Clients that came.", labels=label)
    failed = CounterMetricFamily("nbdsrv_failed", "Requests the disk failed.", labels=label)
    refused = CounterMetricFamily("nbdsrv_requests_refused", "Not permitted.", labels=label)
    received = CounterMetricFamily(
        "nbdsrv_received_bytes", "From clients, requests included.", labels=label
    )
    sent = CounterMetricFamily(
        "nbdsrv_sent_bytes", "To clients, reply headers included.", labels=label
    )
    requests = CounterMetricFamily("nbdsrv_requests", "By kind.", labels=[*label, "kind"])
    quick = HistogramMetricFamily(
        "nbdsrv_quick_read_seconds", "Reads answered at once; a sample.", labels=label
    )
    waited = HistogramMetricFamily(
        "nbdsrv_request_seconds", "Requests that had to wait, all.", labels=[*label, "kind"]
    )
    for each in exports:
        name = each.name
        clients.add_metric([name], each.clients)
        attached.add_metric([name], each.attached)
        failed.add_metric([name], each.failed)
        refused.add_metric([name], each.tally.refused)
        received.add_metric([name], each.tally.received)
        sent.add_metric([name], each.tally.sent)
        requests.add_metric([name, "read"], each.tally.reads)
        requests.add_metric([name, "write"], each.tally.writes)
        requests.add_metric([name, "other"], each.tally.others)
        quick.add_metric([name], each.quick.buckets(), each.quick.total_s)
        for kind, counts in each.waited.items():
            waited.add_metric([name, kind], counts.buckets(), counts.total_s)
    yield from (clients, attached, failed, refused, received, sent, requests, quick, waited)


def _gauge(name: str, what: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    family = GaugeMetricFamily(name, what, labels=list(labels or ()))
    family.add_metric(list((labels or {}).values()), value)
    return family


def _counter(name: str, what: str, value: float) -> Metric:
    family = CounterMetricFamily(name, what)
    family.add_metric([], value)
    return family


class _HttpServer(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Without asking a name server what this host is called."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _HttpServer6(_HttpServer):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
        """Nothing: a scrape is no event."""


class MetricsEndpoint:
    """Answers scrapes until it is closed. Belongs to the running loop."""

    def __init__(self, where: str, overview: Overview) -> None:
        """Listen on HOST:PORT.

        Raises:
            ConfigError: the address makes no sense.
            ListenError: it cannot be listened on.
        """
        self.where = where
        place = parse_tcp(where)
        registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        figures = _Figures(overview, asyncio.get_running_loop())
        registry.register(figures)
        try:
            info = socket.getaddrinfo(
                place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            family, _, _, _, address = info[0]
            kind = _HttpServer6 if family == socket.AF_INET6 else _HttpServer
            self._http = make_server(
                str(address[0]),
                int(address[1]),
                make_wsgi_app(registry),
                server_class=kind,
                handler_class=_Handler,
            )
        except OSError as error:
            reason = error.strerror or str(error)
            raise ListenError(f"metrics: cannot listen on {where}: {reason}") from error
        except UnicodeError as error:
            raise ListenError(f"metrics: {where}: no host can have this name") from error
        self._thread = threading.Thread(
            target=self._http.serve_forever, name="nbdsrv-metrics", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The one it got, if it asked for any."""
        return self._http.server_port

    async def close(self) -> None:
        """Answer nobody any more."""
        await asyncio.to_thread(self._http.shutdown)
        with contextlib.suppress(OSError):
            self._http.server_close()
