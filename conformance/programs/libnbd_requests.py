"""Requests that no well-behaved client sends, and the rare ones that some do.

Each scenario gets the URI and the image behind it, abuses the connection, and then proves that
it is still in sync. Spec: proto.md, "Request types", "Error values".
"""

from pathlib import Path
from typing import Any

from conformance.programs.libnbd_session import demand, fails, main, nbd, open_handle, still_in_sync

UNKNOWN_FLAG = 1 << 9
FAR = (1 << 63) - 4096
MIB = 1 << 20
SLACK = 128
"""Blocks of 512 bytes by which a file's allocation may differ without meaning anything."""


def _ignore(*_arguments: Any) -> int:
    return 0


def read_beyond_end(uri: str, image: str) -> None:
    """EINVAL for any read that touches what is not there."""
    handle = open_handle(uri)
    size = handle.get_size()
    for length, offset in ((512, size), (512, size - 511), (1, size), (size + 1, 0), (512, FAR)):
        fails("EINVAL", handle.pread, length, offset)
    still_in_sync(handle, Path(image))


def write_beyond_end(uri: str, image: str) -> None:
    """ENOSPC for writes, EINVAL for the others; the payload is consumed, nothing is written."""
    handle = open_handle(uri, contexts=["base:allocation"])
    size = handle.get_size()
    before = Path(image).read_bytes()
    for length, offset in ((512, size), (512, size - 511), (100_000, size - 1), (512, FAR)):
        fails("ENOSPC", handle.pwrite, bytes(length), offset)
        fails("ENOSPC", handle.zero, length, offset)
        fails("EINVAL", handle.trim, length, offset)
        fails("EINVAL", handle.block_status, length, offset, _ignore)
    demand(Path(image).read_bytes() == before, "a refused write changed the image")
    still_in_sync(handle, Path(image))


def unaligned_tail(uri: str, image: str) -> None:
    """The bytes behind the last full sector can be read, written and zeroed."""
    handle = open_handle(uri)
    content = bytearray(Path(image).read_bytes())
    size = len(content)
    demand(size % 512, "the scenario wants an odd size")
    for length in (1, 3, size % 512, 513, 5000):
        got = handle.pread(length, size - length)
        demand(got == content[-length:], f"wrong last {length} bytes")
    handle.pwrite(b"tail!", size - 5)
    handle.zero(7, size - 12)
    content[-12:] = bytes(7) + b"tail!"
    handle.flush()
    demand(Path(image).read_bytes() == content, "the image's last bytes are not what was written")
    demand(len(Path(image).read_bytes()) == size, "the image changed its size")
    still_in_sync(handle, Path(image))


def unknown_flags(uri: str, image: str) -> None:
    """Unknown flags and flags on the wrong command are EINVAL and change nothing."""
    handle = open_handle(uri, contexts=["base:allocation"])
    before = Path(image).read_bytes()
    for flag in (UNKNOWN_FLAG, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO):
        fails("EINVAL", handle.pread, 512, 0, flag)
        fails("EINVAL", handle.pwrite, b"x" * 70_000, 0, flag)
        fails("EINVAL", handle.trim, 4096, 0, flag)
    for flag in (UNKNOWN_FLAG, nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE):
        fails("EINVAL", handle.zero, 4096, 0, flag)
        fails("EINVAL", handle.flush, flag)
    fails("EINVAL", handle.block_status, 4096, 0, _ignore, UNKNOWN_FLAG)
    demand(Path(image).read_bytes() == before, "a refused request changed the image")
    still_in_sync(handle, Path(image))


def read_only(uri: str, image: str) -> None:
    """EPERM for everything that would change a read-only export."""
    handle = open_handle(uri)
    before = Path(image).read_bytes()
    demand(handle.is_read_only(), "the export is not read-only")
    for length in (512, 100_000, MIB):
        fails("EPERM", handle.pwrite, bytes(length), 0)
    fails("EPERM", handle.zero, 4096, 0)
    fails("EPERM", handle.trim, 4096, 0)
    demand(Path(image).read_bytes() == before, "a refused write changed the image")
    still_in_sync(handle, Path(image))


def status_without_context(uri: str, image: str) -> None:
    """BLOCK_STATUS with no context selected is EINVAL."""
    handle = open_handle(uri)
    fails("EINVAL", handle.block_status, 4096, 0, _ignore)
    still_in_sync(handle, Path(image))


def no_structured_replies(uri: str, image: str) -> None:
    """Simple replies: reads work, errors too; DF and BLOCK_STATUS were not offered."""
    handle = open_handle(uri, structured=False)
    demand(not handle.get_structured_replies_negotiated(), "structured replies were negotiated")
    demand(not handle.can_df(), "DF is advertised without structured replies")
    fails("EINVAL", handle.pread, 512, handle.get_size())
    fails("EINVAL", handle.pread, 512, 0, nbd.CMD_FLAG_DF)
    still_in_sync(handle, Path(image))


def df_reads(uri: str, image: str) -> None:
    """DF: one chunk whatever lies beneath, at least to 64 KiB."""
    handle = open_handle(uri)
    content = Path(image).read_bytes()
    demand(handle.can_df(), "DF is not advertised")
    # The first megabyte is data, the second a hole: the reads straddle the edge.
    for length in (512, 4096, 65_536, MIB):
        chunks: list[int] = []
        offset = MIB - length // 2

        def note(
            _data: bytes, at: int, status: int, _error: Any, chunks: list[int] = chunks
        ) -> int:
            chunks.append(status)
            return at - at

        try:
            got = handle.pread_structured(length, offset, note, nbd.CMD_FLAG_DF)
        except nbd.Error as error:
            demand(length > 65_536, f"DF read of {length} bytes failed: {error}")
            demand(error.errno == "EOVERFLOW", f"a long DF read failed with {error.errno}")
            continue
        demand(got == content[offset : offset + length], f"wrong bytes in a DF read of {length}")
        demand(len(chunks) == 1, f"{len(chunks)} chunks in a DF read of {length}")
    still_in_sync(handle, Path(image))


def sparse_reads(uri: str, image: str) -> None:
    """Structured reads send holes as holes; chunks cover the request once."""
    handle = open_handle(uri)
    content = Path(image).read_bytes()
    chunks: list[tuple[int, int, int]] = []

    def note(data: bytes, at: int, status: int, _error: Any) -> int:
        chunks.append((at, len(data), status))
        return 0

    got = handle.pread_structured(10 * MIB, MIB // 2, note)
    demand(got == content[MIB // 2 : MIB // 2 + 10 * MIB], "wrong bytes in a sparse read")
    end = MIB // 2
    for offset, length, _ in sorted(chunks):
        demand(offset == end, f"the chunk at {offset} does not follow the one that ended at {end}")
        end += length
    demand(end == MIB // 2 + 10 * MIB, "the chunks do not cover the request")
    holes = sum(length for _, length, status in chunks if status == nbd.READ_HOLE)
    demand(holes >= 6 * MIB, f"only {holes} bytes of a hole of 7 MiB were sent as a hole")
    still_in_sync(handle, Path(image))


def zero_length(uri: str, image: str) -> None:
    """Length 0 is unspecified: done or EINVAL, but never a disconnect."""
    handle = open_handle(uri, contexts=["base:allocation"])
    before = Path(image).read_bytes()
    requests: list[tuple[Any, ...]] = [
        (handle.pread, 0, 0),
        (handle.pwrite, b"", 0),
        (handle.zero, 0, 0),
        (handle.trim, 0, 0),
        (handle.cache, 0, 0),
        (handle.block_status, 0, 0, _ignore),
    ]
    for request, *arguments in requests:
        try:
            request(*arguments)
        except nbd.Error as error:
            demand(error.errno == "EINVAL", f"{request.__name__} of 0 bytes: {error.errno}")
    demand(Path(image).read_bytes() == before, "a request of 0 bytes changed the image")
    still_in_sync(handle, Path(image))


def fast_zero(uri: str, image: str) -> None:
    """FAST_ZERO: done, or ENOTSUP with nothing changed; EINVAL where it is not advertised."""
    handle = open_handle(uri)
    before = bytearray(Path(image).read_bytes())
    flags = (nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
    for step, flag in enumerate(flags):
        offset = step * MIB // 4
        if not handle.can_fast_zero():
            fails("EINVAL", handle.zero, 65_536, offset, flag)
            continue
        try:
            handle.zero(65_536, offset, flag)
            before[offset : offset + 65_536] = bytes(65_536)
        except nbd.Error as error:
            demand(error.errno == "ENOTSUP", f"FAST_ZERO failed with {error.errno}: {error}")
    handle.flush()
    demand(Path(image).read_bytes() == before, "FAST_ZERO left something else than it answered")
    still_in_sync(handle, Path(image))


def zero_and_trim(uri: str, image: str) -> None:
    """Zeroing frees blocks, NO_HOLE keeps them, trim frees them; FUA goes with each."""
    handle = open_handle(uri)
    path = Path(image)
    fua = nbd.CMD_FLAG_FUA if handle.can_fua() else 0
    handle.pwrite(b"\xaa" * 4 * MIB, 16 * MIB, fua)
    handle.flush()
    full = path.stat().st_blocks
    # A file system may take or give back some blocks for its own records meanwhile.
    handle.zero(MIB, 16 * MIB, nbd.CMD_FLAG_NO_HOLE | fua)
    demand(path.stat().st_blocks >= full - SLACK, "NO_HOLE gave blocks back")
    handle.zero(MIB, 17 * MIB, fua)
    demand(
        path.stat().st_blocks <= full - 2048 + SLACK, "WRITE_ZEROES without NO_HOLE freed nothing"
    )
    handle.trim(MIB, 18 * MIB, fua)
    demand(path.stat().st_blocks <= full - 4096 + SLACK, "TRIM freed nothing")
    handle.zero(3, 19 * MIB + 511)
    handle.flush()
    got = path.read_bytes()[16 * MIB : 20 * MIB]
    demand(got[: 2 * MIB] == bytes(2 * MIB), "zeroed range is not zero")
    wanted = bytearray(b"\xaa" * MIB)
    wanted[511:514] = bytes(3)
    demand(got[3 * MIB :] == wanted, "an unaligned zero of 3 bytes changed something else")
    still_in_sync(handle, path)


def many_in_flight(uri: str, image: str) -> None:
    """256 mixed reads and writes at once; each reply reaches its own request."""
    handle = open_handle(uri)
    waiting = []
    for index in range(256):
        block = bytes([index]) * 4096
        waiting.append(handle.aio_pwrite(block, 20 * MIB + index * 4096))
        waiting.append(handle.aio_pread(nbd.Buffer(1 + index * 257), index * 4096))
    for cookie in waiting:
        while not handle.aio_command_completed(cookie):
            handle.poll(10_000)
    handle.flush()
    wanted = b"".join(bytes([index]) * 4096 for index in range(256))
    demand(Path(image).read_bytes()[20 * MIB : 21 * MIB] == wanted, "writes were mixed up")
    still_in_sync(handle, Path(image))


def large_payloads(uri: str, image: str) -> None:
    """32 MiB is always legal; 48 and 64 MiB are served or refused, in sync."""
    handle = open_handle(uri)
    content = Path(image).read_bytes()
    demand(handle.pread(32 * MIB, 1) == content[1 : 1 + 32 * MIB], "wrong bytes in 32 MiB")
    handle.pwrite(content[: 32 * MIB], 0)
    for length in (48 * MIB, 64 * MIB):
        try:
            demand(handle.pread(length, 0) == content[:length], f"wrong bytes in {length}")
        except nbd.Error as error:
            allowed = ("EINVAL", "EOVERFLOW", "ENOMEM")
            demand(error.errno in allowed, f"a read of {length} bytes: {error.errno}")
    still_in_sync(handle, Path(image))


def large_ranges(uri: str, image: str) -> None:
    """Requests without payload reach to 4 GiB: status, trim, zeroes, cache on a 6 GiB disk."""
    handle = open_handle(uri, contexts=["base:allocation"])
    gib, huge = 1 << 30, (1 << 32) - 4096
    seen: list[int] = []
    handle.block_status(0xFFFFFFFF, 0, lambda _c, _o, entries, _e: seen.extend(entries[::2]))
    demand(seen, "no extent at all for a status of 4 GiB - 1")
    handle.pwrite(b"kept", 5 * gib)
    handle.pwrite(b"gone", 3 * gib)
    handle.zero(huge, 0)
    handle.trim(huge, 0)
    demand(handle.pread(4, 3 * gib) == bytes(4), "zeroing 4 GiB left something at 3 GiB")
    demand(handle.pread(4, 5 * gib) == b"kept", "zeroing 4 GiB reached 5 GiB")
    demand(Path(image).stat().st_size == 6 * gib, "the image changed its size")


def cache_and_status(uri: str, image: str) -> None:
    """CACHE is taken or refused cleanly; REQ_ONE gives one extent, within the request."""
    handle = open_handle(uri, contexts=["base:allocation"])
    try:
        handle.cache(MIB, 0)
    except nbd.Error as error:
        demand(not handle.can_cache(), f"CACHE is advertised and fails: {error}")
        demand(error.errno in ("EINVAL", "ENOTSUP"), f"CACHE refused with {error.errno}")
    seen: list[list[int]] = []

    def note(_context: str, _offset: int, entries: list[int], _error: Any) -> int:
        seen.append(entries)
        return 0

    handle.block_status(20 * MIB, MIB // 2, note, nbd.CMD_FLAG_REQ_ONE)
    demand(len(seen) == 1, f"{len(seen)} replies for one context")
    demand(len(seen[0]) == 2, f"{len(seen[0]) // 2} extents for REQ_ONE")
    demand(seen[0] == [MIB // 2, 0], f"expected half a MiB of data, got {seen[0]}")
    still_in_sync(handle, Path(image))


if __name__ == "__main__":
    main(globals())
