"""What may be in a configuration file: its tables and keys, their types and defaults.

::

    listen = [...]  socket_mode  allow = [...]
    [tls]  [limits]  [admin]  [metrics]  [audit]  [log]
    [repository.NAME]        a repository, served whole
    [[export]]               one disk by a name

Only the form is here. What one can tell only by looking at several keys together, or at the world,
is ``config``'s.
"""

from typing import Annotated, Literal

import msgspec

from nbdsrv.disk.blocks import DEFAULT_CACHE
from nbdsrv.net.buffers import DEFAULT_BUDGET

__all__ = [
    "AdminTable",
    "AuditTable",
    "ExportTable",
    "LimitsTable",
    "LogTable",
    "MetricsTable",
    "RepositoryTable",
    "RuleTable",
    "Settings",
    "TlsTable",
]

Number = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 2)]
"""A uid or gid; the largest one means nobody."""
Mebibytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Any table: unknown keys are mistakes."""


class RuleTable(_Table, frozen=True):
    """One entry of an ``allow`` list: who, and how."""

    subject: Text | None = None
    address: Text | None = None
    uid: Number | None = None
    gid: Number | None = None
    access: Literal["rw", "ro", "none"] = "rw"


class TlsTable(_Table, frozen=True):
    """``[tls]``: PEM files, and who is served over TLS."""

    cert: Text
    key: Text
    ca: Text | None = None
    mode: Literal["off", "required", "per-export"] = "required"


class LimitsTable(_Table, frozen=True):
    """``[limits]``: seconds, and MiB."""

    connections: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 4096
    memory: Annotated[int, msgspec.Meta(ge=64, le=1 << 20)] = DEFAULT_BUDGET >> 20
    cache: Mebibytes = DEFAULT_CACHE >> 20
    handshake_timeout: Annotated[float, msgspec.Meta(ge=0.01, le=3600)] = 10.0
    drain_timeout: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 30.0


class AdminTable(_Table, frozen=True):
    """``[admin]``: where ``nbdsrv status`` and ``nbdsrv reload`` ask."""

    socket: Text


class MetricsTable(_Table, frozen=True):
    """``[metrics]``: where Prometheus asks."""

    listen: Text


class AuditTable(_Table, frozen=True):
    """``[audit]``: a file of its own, instead of the log."""

    file: Text


class LogTable(_Table, frozen=True):
    """``[log]``: how much, and in which form."""

    level: Literal["warning", "info", "debug"] = "warning"
    format: Literal["text", "json"] = "text"


class RepositoryTable(_Table, frozen=True):
    """``[repository.NAME]``: exports as they come and go; ``prefix`` is ``NAME/`` unless given."""

    location: Text
    passphrase_file: Text | None = None
    serve: bool = True
    prefix: Annotated[str, msgspec.Meta(max_length=1024)] | None = None
    allow: tuple[RuleTable, ...] | None = None
    hidden: bool = True
    tls_only: bool = False


class ExportTable(_Table, frozen=True):
    """``[[export]]``: one disk."""

    name: Annotated[str, msgspec.Meta(max_length=4096)]
    source: Text
    write: bool = False
    overlay: Text | None = None
    hydrate: bool | Text = False
    description: Annotated[str, msgspec.Meta(max_length=4096)] | None = None
    allow: tuple[RuleTable, ...] | None = None
    hidden: bool = True
    tls_only: bool = False


class Settings(_Table, frozen=True):
    """A whole file. ``repository`` and ``export`` are converted apart, for better messages."""

    listen: tuple[Text, ...] | None = None
    socket_mode: Annotated[str, msgspec.Meta(pattern="^0?[0-7]{3}$")] = "600"
    allow: tuple[RuleTable, ...] | None = None
    tls: TlsTable | None = None
    limits: LimitsTable = LimitsTable()
    admin: AdminTable | None = None
    metrics: MetricsTable | None = None
    audit: AuditTable | None = None
    log: LogTable = LogTable()
    repository: dict[str, RepositoryTable] = {}
    export: tuple[ExportTable, ...] = ()
