"""How ``nbdsrv status`` looks: one picture for terminals that live, one for everything else.

::

    nbdsrv 0.1.0  pid 4711  up 3 h 20 min   2 listeners, TLS off   3 of 4096 clients   41 MiB
    EXPORT      STATE    CLIENTS   READ/S  WRITE/S   SENT   RECEIVED   p50   p99
    CLIENT      ...
    BACKUP      ...
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from nbdsrv.cli.words import printable

__all__ = ["plain", "render"]

MAX_ROWS = 200
"""Rows of a table; what does not fit is counted."""
WIDTH = 160
"""Columns of the plain picture."""

Document = Mapping[str, Any]


def render(document: Document, width: int = WIDTH) -> RenderableType:
    """For a terminal of that many columns; what does not fit a narrow one is left out."""
    parts: list[RenderableType] = [_head(document["server"])]
    parts.append(_exports(document["exports"], width))
    if document["clients"]:
        parts.append(_clients(document["clients"]))
    if document.get("overlays"):
        parts.append(_overlays(document["overlays"]))
    if document.get("backups"):
        parts.append(_backups(document["backups"]))
    return Group(*parts)


def plain(document: Document) -> str:
    """For a file or a pipe: no colours, no lines drawn."""
    console = Console(width=WIDTH, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as capture:
        console.print(render(document))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _head(server: Document) -> Text:
    connections, memory, cache = server["connections"], server["memory"], server["cache"]
    lookups = cache["hits"] + cache["misses"]
    lines = [
        f"nbdsrv {server['version']}  pid {server['pid']}  up {_duration(server['uptime_s'])}",
        f"listening on {', '.join(map(printable, server['listening']))}  TLS {server['tls']}",
        (
            f"clients {connections['attached']} of {connections['limit']}, "
            f"{connections['handshakes']} shaking hands, {connections['accepted']} came, "
            f"{connections['refused']} refusals"
        ),
        f"memory {_size(memory['resident'])}, lent {_size(memory['lent'])} of "
        f"{_size(memory['budget'])}  descriptors {server['descriptors']}  "
        f"cache {_size(cache['held'])} of {_size(cache['limit'])}"
        + (f", {cache['hits'] / lookups:.0%} hits" if lookups else ""),
        (
            f"loop late by p50 {_wait(server['loop_lag'].get('p50'))}, "
            f"p99 {_wait(server['loop_lag'].get('p99'))}"
        ),
    ]
    text = Text("\n".join(lines))
    reloads = server["reloads"]
    if reloads["error"]:
        text.append(f"\nlast reload failed: {printable(reloads['error'])}", style="bold red")
    text.append("\n")
    return text


def _table(columns: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    return table


_COLUMNS = {
    "EXPORT": 0,
    "STATE": 0,
    "CLIENTS": 0,
    "READ/S": 0,
    "WRITE/S": 0,
    "OTHER/S": 130,
    "SENT/S": 0,
    "RECEIVED/S": 110,
    "TOTAL SENT": 130,
    "READ p50": 140,
    "p99": 100,
    "WRITE p50": 140,
    "p99 ": 100,
}
"""Of exports, and from what width of the terminal on each is shown: names come first."""
_OF_WAITS = {"p99": "READ p99", "p99 ": "WRITE p99"}
"""What they are called where the p50 does not stand before them."""


def _exports(exports: Sequence[Document], width: int) -> Table:
    shown = [name for name, least in _COLUMNS.items() if width >= least]
    narrow = width < _COLUMNS["READ p50"]
    headings = [_OF_WAITS.get(name, name) if narrow else name for name in shown]
    table = _table(headings, headings[2:])
    for export in exports[:MAX_ROWS]:
        lately = export.get("lately")
        row = [printable(export["name"]) or '""', _state(export), str(export["clients"])]
        if lately is None:
            row += ["-"] * (len(_COLUMNS) - len(row))
        else:
            read, write = (lately["waits"].get(kind, {}) for kind in ("read", "write"))
            row += [f"{lately[f'{kind}s_per_s']:.0f}" for kind in ("read", "write", "other")]
            row += [f"{_size(lately['sent_per_s'])}/s", f"{_size(lately['received_per_s'])}/s"]
            row += [_size(export["sent"])]
            row += [_wait(each.get(name)) for each in (read, write) for name in ("p50", "p99")]
        cells = zip(_COLUMNS, row, strict=True)
        table.add_row(*(Text(cell) for name, cell in cells if name in shown))
    _count_rest(table, exports)
    return table


def _state(export: Document) -> str:
    words = [export["state"]]
    if export["kind"] == "collection":
        words.append("repository")
    if export.get("overlay"):
        words.append("overlay")
    elif export.get("write"):
        words.append("rw")
    return " ".join(words)


def _clients(clients: Sequence[Document]) -> Table:
    left = ("\nID", "\nCLIENT", "\nSUBJECT", "\nEXPORT", "\nACCESS", "\nFOR")
    right = ("\nREQUESTS", "\nSENT", "\nRECEIVED")
    table = _table((*left, *right), right)
    for client in clients[:MAX_ROWS]:
        access = client["access"] + (" leaving" if client["state"] == "leaving" else "")
        requests = client["reads"] + client["writes"] + client["others"]
        table.add_row(
            str(client["id"]),
            Text(printable(client["place"])),
            Text(printable(client.get("subject") or "-")),
            Text(printable(client["export"]) or '""'),
            access,
            _duration(client["duration_s"]),
            str(requests),
            _size(client["sent"]),
            _size(client["received"]),
        )
    _count_rest(table, clients)
    return table


def _overlays(overlays: Sequence[Document]) -> Table:
    figures = ("\nWRITTEN", "\nCOPIED", "\nTRACED", "\nPREFETCHED")
    table = _table(("\nOVERLAY", *figures, "\nHYDRATION"), figures)
    for each in overlays[:MAX_ROWS]:
        hydration = each["hydration"]
        said = "off"
        if hydration is not None:
            said = str(hydration["state"])
            if hydration["size"] and said != "complete":
                said += f", {hydration['position'] / hydration['size']:.0%}"
        sizes = ("dirty_bytes", "copied_bytes", "recorded_bytes", "prefetched_bytes")
        cells = (printable(each["name"]), *(_size(each[name]) for name in sizes), said)
        table.add_row(*map(Text, cells))
    _count_rest(table, overlays)
    return table


def _backups(backups: Sequence[Document]) -> Table:
    table = _table(("\nBACKUP", "\nPID", "\nFOR", "\nDONE"), ())
    for job in backups[:MAX_ROWS]:
        done, total = job["done"], job["total"]
        said = "-" if done is None else _size(done)
        if done is not None and total:
            said += f" of {_size(total)}, {done / total:.0%}"
        running_s = max(0.0, time.time() - job["started"])
        table.add_row(Text(printable(job["what"])), str(job["pid"]), _duration(running_s), said)
    return table


def _count_rest(table: Table, rows: Sequence[object]) -> None:
    if len(rows) > MAX_ROWS:
        table.add_row(f"... and {len(rows) - MAX_ROWS} more")


def _size(count: float) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def _wait(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
