"""Every number taken in a run, and how it is stored.

The JSON is the record: all raw samples beside the machine they come from. Tables are made from
it alone, so ``--from`` prints an old run again.
"""

import json
from dataclasses import asdict, dataclass, field

__all__ = [
    "BenchmarkError",
    "ColdSample",
    "ForeignSample",
    "IdleSample",
    "OverlaySample",
    "ProxySample",
    "Report",
    "RepositorySample",
    "Sample",
    "load",
    "store",
]

FORMAT = 1
"""Changes when an older reader would misunderstand the file."""


class BenchmarkError(Exception):
    """A program did not start, failed, or answered what cannot be understood."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one cell against one server.

    ``rate`` is in the cell's unit, ``server_cores`` the processors the server kept busy
    meanwhile (1.0 is one), ``idle_cores`` what the servers waiting for their turn burnt.
    """

    cell: str
    server: str
    round: int
    rate: float
    server_cores: float
    idle_cores: float
    p50_us: float | None = None
    p99_us: float | None = None


@dataclass(frozen=True, slots=True)
class ColdSample:
    """A client's 4 KiB reads of a cached export while a neighbour does ``phase``.

    Latencies in microseconds; rates in MB/s (10**6); ``disk_rate`` is what the server's
    process fetched from storage meanwhile, the proof that the neighbour's file was cold.
    """

    server: str
    phase: str
    round: int
    iops: float
    p50_us: float
    p99_us: float
    p999_us: float
    max_us: float
    neighbour_rate: float
    disk_rate: float


@dataclass(frozen=True, slots=True)
class IdleSample:
    """A server's memory and another client's speed in one state of its connections.

    ``iops`` are 4 KiB random reads, depth 1, the median of some runs. Memory in bytes.
    ``accepted`` requests were taken from clients that read no reply.
    """

    server: str
    state: str
    connections: int
    resident: int
    peak: int
    descriptors: int
    threads: int
    iops: float
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class RepositorySample:
    """One number of one backup program in one round, in its cell's unit."""

    cell: str
    program: str
    round: int
    value: float


@dataclass(frozen=True, slots=True)
class ForeignSample:
    """One number of one row of ``foreign`` in one round, in the row's unit."""

    row: str
    column: str
    round: int
    value: float


@dataclass(frozen=True, slots=True)
class OverlaySample:
    """One run of one load of ``overlay`` against one program: IOPS for 4 KiB, else MB/s."""

    cell: str
    kind: str
    round: int
    rate: float


@dataclass(frozen=True, slots=True)
class ProxySample:
    """One run of one load of ``proxy``, of one kind: MB/s, IOPS or microseconds, see the cell."""

    cell: str
    kind: str
    round: int
    value: float


@dataclass(slots=True)
class Report:
    environment: dict[str, str]
    samples: list[Sample] = field(default_factory=list)
    cold: list[ColdSample] = field(default_factory=list)
    idle: list[IdleSample] = field(default_factory=list)
    repository: list[RepositorySample] = field(default_factory=list)
    foreign: list[ForeignSample] = field(default_factory=list)
    overlay: list[OverlaySample] = field(default_factory=list)
    proxy: list[ProxySample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def store(report: Report, path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **asdict(report)}, file, indent=1)
        file.write("\n")


def load(path: str) -> Report:
    """A report stored before; raises BenchmarkError when the file is something else."""
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        if data.pop("format") != FORMAT:
            raise BenchmarkError(f"{path}: written by another version of this benchmark")
        return Report(
            environment=data["environment"],
            samples=[Sample(**each) for each in data["samples"]],
            cold=[ColdSample(**each) for each in data["cold"]],
            idle=[IdleSample(**each) for each in data["idle"]],
            repository=[RepositorySample(**each) for each in data.get("repository", [])],
            foreign=[ForeignSample(**each) for each in data.get("foreign", [])],
            overlay=[OverlaySample(**each) for each in data.get("overlay", [])],
            proxy=[ProxySample(**each) for each in data.get("proxy", [])],
            failures=data["failures"],
            notes=data["notes"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"{path}: not a report of this benchmark: {error}") from error
