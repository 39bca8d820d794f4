"""What the libnbd scenarios share: opening a handle, demanding an errno, proving sync.

Runs under the distribution's Python, the only one that has libnbd's bindings; imports nothing
but them and the standard library. Started as ``python3 -m conformance.programs.libnbd_X
SCENARIO URI [IMAGE] [ARGUMENT...]``: silent and 0 if all was as it should be.
"""

import random
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["demand", "fails", "main", "nbd", "new_handle", "open_handle", "still_in_sync"]

# Not an import statement: it has no types, and is not there for the Python that checks ours.
nbd: Any = import_module("nbd")

PLACE = 65_536
"""Data and holes of the images change only at multiples of this."""

PROBES = 24
"""Reads compared after each abuse: enough to meet a reply that belongs to another request."""


def demand(condition: object, message: str) -> None:
    """Fail the scenario with this message unless the condition holds."""
    if not condition:
        sys.exit(message)


def new_handle() -> Any:
    """A handle that is not connected and takes URIs with a directory of certificates."""
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    return handle


def open_handle(uri: str, *, contexts: Sequence[str] = (), structured: bool = True) -> Any:
    """Connect with libnbd's own checks off, so that illegal requests reach the server."""
    handle = new_handle()
    handle.set_request_structured_replies(structured)
    for context in contexts:
        handle.add_meta_context(context)
    handle.set_strict_mode(0)
    handle.connect_uri(uri)
    return handle


def fails(expected: str | Sequence[str], request: Callable[..., object], *arguments: Any) -> None:
    """Demand that a request fails with this errno (or one of these)."""
    allowed = [expected] if isinstance(expected, str) else list(expected)
    shown = [f"{len(a)} bytes" if isinstance(a, bytes) else str(a) for a in arguments]
    name = f"{request.__name__}({', '.join(shown)})"[:200]
    try:
        request(*arguments)
    except nbd.Error as error:
        demand(error.errno in allowed, f"{name}: expected {allowed}, got {error.errno}: {error}")
    else:
        sys.exit(f"{name}: expected {allowed}, but it succeeded")


def still_in_sync(handle: Any, image: Path) -> None:
    """Demand that the connection lives and every reply carries the bytes it was asked for.

    The requests are all in flight at once, so that a stray reply cannot pass unnoticed.
    """
    content = image.read_bytes()
    demand(handle.aio_is_ready(), f"the connection is gone: {handle.connection_state()}")
    # Zeroes would hide a shifted or foreign reply, so only places with data are looked at.
    places = [at for at in range(0, len(content) - PLACE, PLACE) if any(content[at : at + 16])]
    source = random.Random(len(content))
    waiting = []
    for wanted_length in (1, 512, 4096, 70_000) * (PROBES // 4):
        offset = source.choice(places) + source.randrange(PLACE // 2)
        length = min(wanted_length, len(content) - offset)
        buffer = nbd.Buffer(length)
        waiting.append((handle.aio_pread(buffer, offset), buffer, offset, length))
    for cookie, buffer, offset, length in waiting:
        while not handle.aio_command_completed(cookie):
            handle.poll(10_000)
        wanted = content[offset : offset + length]
        demand(buffer.to_bytearray() == wanted, f"wrong bytes at {offset}+{length}: out of sync")


def main(module: Mapping[str, Any]) -> None:
    """Run the scenario, a public function of this module, that the command line names."""
    name, *arguments = sys.argv[1:]
    scenario = module[name]
    if name.startswith("_") or scenario.__module__ != "__main__":
        sys.exit(f"{name} is no scenario")
    try:
        scenario(*arguments)
    except nbd.Error as error:
        places = traceback.extract_tb(error.__traceback__)
        ours = [place for place in places if "conformance" in place.filename]
        sys.exit(f"{name} (line {ours[-1].lineno}): {error}")
