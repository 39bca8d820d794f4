"""The two client programs, run and understood: fio's nbd engine and nbdcopy.

Both are libnbd underneath and the same for every server. A TLS client runs with the $HOME
of ``tls``, and as nobody when we are root, because only then libnbd looks there.
"""

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conformance.benchmark.cells import Cell
from conformance.benchmark.report import BenchmarkError
from conformance.benchmark.servers import Server

__all__ = ["Fio", "FioResult", "copy_rate", "measure", "start_fio", "understand"]

GRACE_S = 30.0
"""What fio may need beyond its run time: start, connect, drain, report."""
COPY_TIMEOUT_S = 120.0
NOBODY = 65534
MEGA = 1e6


@dataclass(frozen=True, slots=True)
class FioResult:
    """iops; rate in MB/s (10**6); completion latencies in microseconds."""

    iops: float
    rate: float
    p50_us: float
    p99_us: float
    p999_us: float
    max_us: float


@dataclass(frozen=True, slots=True)
class Fio:
    """A fio that is running; ``result`` waits for it."""

    process: subprocess.Popen[str]
    rw: str
    seconds: float

    def result(self) -> FioResult:
        """Raises BenchmarkError when fio failed, hung, or read nothing."""
        try:
            out, err = self.process.communicate(timeout=self.seconds + GRACE_S)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            self.process.communicate()
            raise BenchmarkError("fio hung: the server stopped answering") from error
        return understand(out, err, self.process.returncode, self.rw)


@contextlib.contextmanager
def start_fio(
    server: Server,
    export: str,
    rw: str,
    block: str,
    depth: int,
    *,
    seconds: float,
    size: int,
    once: bool = False,
) -> Iterator[Fio]:
    """fio on one connection to ``export``, for ``seconds``, over its first ``size`` bytes; again
    and again, or ``once`` at most.
    """
    command = ["fio", "--name=x", "--ioengine=nbd", f"--uri={server.uri(export)}", f"--rw={rw}"]
    command += [f"--bs={block}", f"--iodepth={depth}", f"--size={size}"]
    command += [] if once else ["--time_based"]
    command += [f"--runtime={round(seconds * 1000)}ms", "--output-format=json"]
    with _client(server, command) as process:
        yield Fio(process, rw, seconds)


def copy_rate(
    server: Server, connections: int, size: int, *, seconds: float, export: str = ""
) -> float:
    """MB/s of whole-image nbdcopy runs to ``null:``, repeated until ``seconds`` have passed."""
    command = ["nbdcopy", f"--connections={connections}", server.uri(export), "null:"]
    copied, start = 0, time.monotonic()
    while True:
        with _client(server, command) as process:
            try:
                _, err = process.communicate(timeout=COPY_TIMEOUT_S)
            except subprocess.TimeoutExpired as error:
                raise BenchmarkError("nbdcopy hung: the server stopped answering") from error
        if process.returncode:
            raise BenchmarkError(f"nbdcopy failed: {err.strip()[-300:]}")
        copied += size
        elapsed = time.monotonic() - start
        if elapsed >= seconds:
            return copied / elapsed / MEGA


def measure(
    server: Server, cell: Cell, size: int, *, seconds: float
) -> tuple[float, FioResult | None]:
    """Run one cell once: the rate in the cell's unit, and fio's details if it was fio."""
    if cell.rw == "copy":
        return copy_rate(server, cell.depth, size, seconds=seconds), None
    load = (cell.rw, cell.block, cell.depth)
    with start_fio(server, "", *load, seconds=seconds, size=size, once=cell.cold) as running:
        result = running.result()
    return (result.iops if cell.unit == "IOPS" else result.rate), result


@contextlib.contextmanager
def _client(server: Server, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A client program in an empty directory, killed if it is still there at the end."""
    environment = dict(os.environ)
    user = None
    if server.certificates:
        environment["HOME"] = server.certificates.home
        user = NOBODY if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="nbd-bench-client-") as directory:
        os.chmod(directory, 0o777)  # whoever the client runs as
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=directory,
                env=environment,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        except OSError as error:
            raise BenchmarkError(f"{command[0]}: {error}") from error
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


def understand(out: str, err: str, code: int, rw: str) -> FioResult:
    """fio's JSON report of one job; raises BenchmarkError when it failed or read nothing."""
    # fio's nbd engine prints "fio: connected to NBD server" into the JSON's stream, first.
    body = out[out.find("{") :] if "{" in out else ""
    chatter = (out[: len(out) - len(body)] + err).strip()[-300:]
    if code or not body:
        raise BenchmarkError(f"fio failed with {code}: {chatter}")
    try:
        job: dict[str, Any] = json.loads(body)["jobs"][0]
        side = job["write" if rw.endswith("write") else "read"]
        latency = side["clat_ns"]
        percentile = latency["percentile"]
        result = FioResult(
            iops=side["iops"],
            rate=side["bw_bytes"] / MEGA,
            p50_us=percentile["50.000000"] / 1000,
            p99_us=percentile["99.000000"] / 1000,
            p999_us=percentile["99.900000"] / 1000,
            max_us=latency["max"] / 1000,
        )
    except (ValueError, KeyError, IndexError) as error:
        raise BenchmarkError(f"fio's report is not understood: {error!r}; {chatter}") from error
    if job["error"] or not result.iops:
        raise BenchmarkError(f"fio reports error {job['error']}: {chatter}")
    return result
