"""One sequential read of an export by a client library; prints the seconds it took.

    python -m conformance.benchmark.libraries nbdsrv URI
    /usr/bin/python3 conformance/benchmark/libraries.py libnbd URI

One connection, and the clock runs from the moment it is there to the last byte, which is thrown
away like all before it. libnbd's has as much in flight as nbdcopy's default: 64 reads of 256 KiB.
The second one runs under the distribution's Python, so nothing but a library is imported here.
"""

import sys
import time
from importlib import import_module
from typing import Any

LENGTH = 256 << 10
IN_FLIGHT = 64


async def by_nbdsrv(uri: str) -> float:
    """Seconds."""
    import nbdsrv

    async with nbdsrv.connect(uri, connections=1) as disk:
        began, done = time.monotonic(), 0
        async for _, piece in nbdsrv.stream(disk, 0, disk.size):
            done += len(piece)
        assert done == disk.size, f"{done} bytes of {disk.size}"
        return time.monotonic() - began


def by_libnbd(uri: str) -> float:
    """Seconds."""
    nbd = import_module("nbd")  # the distribution's; no types

    handle = nbd.NBD()
    handle.connect_uri(uri)
    size, offset = handle.get_size(), 0
    free = [nbd.Buffer(LENGTH) for _ in range(IN_FLIGHT)]
    began = time.monotonic()
    while offset < size or len(free) < IN_FLIGHT:
        while free and offset < size:
            buffer = free.pop()

            def done(error: Any, buffer: Any = buffer) -> int:
                assert not error.value, f"errno {error.value}"
                free.append(buffer)
                return 1  # libnbd may forget it

            handle.aio_pread(buffer, offset, done)
            offset += LENGTH
        handle.poll(-1)
    return time.monotonic() - began


if __name__ == "__main__":
    library, address = sys.argv[1:]
    if library == "libnbd":
        seconds = by_libnbd(address)
    else:
        import uvloop

        seconds = uvloop.run(by_nbdsrv(address))
    sys.stdout.write(f"{seconds}\n")
