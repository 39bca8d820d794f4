"""libnbd's Python bindings (what nbdsh is made of): illegal requests and rare handshakes.

The scenarios are in libnbd_requests.py and libnbd_options.py; they run under the distribution's
Python, which has the bindings, and are told the URI and the image.
"""

from dataclasses import dataclass
from pathlib import Path

from conformance.context import Context
from conformance.image import MIB, Span
from conformance.outcome import CheckFailedError, MissingPeerError
from conformance.process import tail
from conformance.registry import check
from conformance.server import server_environment

__all__ = ["libnbd_python", "run_scenario"]

GIB = 1024 * MIB


@dataclass(frozen=True, slots=True)
class Need:
    """What one scenario wants to talk to."""

    module: str
    scenario: str
    feature: str
    write: bool = False
    size: int = 32 * MIB
    dense: bool = False


SCENARIOS = (
    Need("requests", "read_beyond_end", "read beyond end"),
    Need("requests", "write_beyond_end", "write beyond end", write=True),
    Need("requests", "unaligned_tail", "unaligned tail", write=True, size=16 * MIB + 333),
    Need("requests", "unknown_flags", "unknown flags", write=True),
    Need("requests", "read_only", "read-only EPERM"),
    Need("requests", "status_without_context", "status, no context"),
    Need("requests", "no_structured_replies", "simple replies"),
    Need("requests", "df_reads", "DF reads"),
    Need("requests", "sparse_reads", "sparse reads"),
    Need("requests", "zero_length", "zero length", write=True),
    Need("requests", "fast_zero", "FAST_ZERO", write=True),
    Need("requests", "zero_and_trim", "zeroes, trim, FUA", write=True),
    Need("requests", "many_in_flight", "512 in flight", write=True),
    Need("requests", "large_payloads", "large payloads", write=True, size=65 * MIB),
    Need("requests", "large_ranges", "4 GiB ranges", write=True, size=6 * GIB),
    Need("requests", "cache_and_status", "CACHE, REQ_ONE"),
    Need("options", "info_then_go", "INFO then GO"),
    Need("options", "unknown_export", "unknown export"),
    Need("options", "list_then_go", "LIST then GO"),
    Need("options", "abort", "ABORT"),
    Need("options", "list_meta_contexts", "list contexts"),
    Need("options", "several_contexts", "several contexts"),
    Need("options", "allocation_depth", "allocation depth"),
    Need("options", "handshake_flags", "handshake flags"),
    Need("options", "tls_not_offered", "TLS not offered"),
    Need("options", "go_twice_over", "64 reconnects"),
    Need("launch", "disconnect", "DISC behind 64 reads"),
    Need("launch", "several_clients", "4 clients, FLUSH", write=True),
    Need("launch", "truncated", "truncated image", dense=True),
)


def libnbd_python(context: Context) -> str:
    """The Python that has libnbd's bindings.

    Raises:
        MissingPeerError: there is none.
    """
    for candidate in ("/usr/bin/python3", "python3"):
        try:
            if context.run(candidate, "-c", "import nbd", code=None).code == 0:
                return candidate
        except MissingPeerError:
            continue
    raise MissingPeerError("libnbd's Python bindings (python3-libnbd) are not installed")


def run_scenario(context: Context, module: str, scenario: str, *arguments: str | Path) -> None:
    """Run one function of a libnbd_*.py module under that Python; it fails by its exit code."""
    finished = context.run(
        libnbd_python(context),
        "-m",
        f"conformance.programs.libnbd_{module}",
        scenario,
        *arguments,
        timeout_s=60,
        code=None,
        environment={**server_environment(), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    if finished.code != 0:
        raise CheckFailedError(f"{scenario}: {tail(finished.stderr)}")


def _register(need: Need) -> None:
    @check("nbdsh", need.feature)
    def scenario(context: Context) -> None:
        spans = (Span(0, need.size),) if need.dense else None
        image = context.image(size=need.size, spans=spans)
        server = context.serve(image, write=need.write)
        run_scenario(context, need.module, need.scenario, server.uri(), image.path)


for _need in SCENARIOS:
    _register(_need)
