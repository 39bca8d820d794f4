"""Unusual ways through the handshake. Spec: proto.md, "Option types".

Each scenario ends in a transmission phase that works, or shows that there is none.
"""

from pathlib import Path
from typing import Any

from conformance.programs.libnbd_session import (
    demand,
    fails,
    main,
    nbd,
    new_handle,
    open_handle,
    still_in_sync,
)

ALLOCATION = "base:allocation"
DEPTH = "qemu:allocation-depth"


def _haggling(uri: str) -> Any:
    handle = new_handle()
    handle.set_strict_mode(0)
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    demand(handle.aio_is_negotiating(), "the server left the negotiation by itself")
    return handle


def _listed(handle: Any) -> list[str]:
    found: list[str] = []
    handle.opt_list_meta_context(found.append)
    return found


def info_then_go(uri: str, image: str) -> None:
    """INFO and GO with equal arguments tell the same."""
    handle = _haggling(uri)
    handle.add_meta_context(ALLOCATION)
    handle.set_full_info(True)
    answers = []
    for option in (handle.opt_info, handle.opt_info, handle.opt_go):
        option()
        answers.append(
            (
                handle.get_size(),
                handle.is_read_only(),
                handle.can_df(),
                handle.can_multi_conn(),
                handle.can_cache(),
                handle.can_meta_context(ALLOCATION),
                [handle.get_block_size(kind) for kind in range(3)],
            )
        )
    demand(answers[0] == answers[1] == answers[2], f"INFO and GO differ: {answers}")
    still_in_sync(handle, Path(image))


def unknown_export(uri: str, image: str) -> None:
    """INFO and GO for a name that is not served fail; the negotiation goes on."""
    handle = _haggling(uri)
    name = handle.get_export_name()
    for wrong in ("no such export", "n" * 4096, "../../etc/passwd", "ü" * 40):
        handle.set_export_name(wrong)
        fails("ENOENT", handle.opt_info)
        fails("ENOENT", handle.opt_go)
        demand(handle.aio_is_negotiating(), f"a wrong name of {len(wrong)} ended the negotiation")
    handle.set_export_name(name)
    handle.opt_go()
    still_in_sync(handle, Path(image))


def list_then_go(uri: str, image: str) -> None:
    """LIST, twice, then GO."""
    handle = _haggling(uri)
    for _ in range(2):
        names: list[str] = []
        count = handle.opt_list(lambda name, _description, names=names: names.append(name))
        demand(count == len(names) >= 1, f"LIST counted {count} and named {names}")
    handle.opt_go()
    still_in_sync(handle, Path(image))


def abort(uri: str, _image: str) -> None:
    """ABORT is acknowledged and closes."""
    handle = _haggling(uri)
    handle.opt_abort()
    demand(handle.aio_is_closed(), f"after ABORT: {handle.connection_state()}")


def list_meta_contexts(uri: str, image: str) -> None:
    """LIST_META_CONTEXT: all, by namespace, by name, and unknown ones ignored."""
    handle = _haggling(uri)
    everything = _listed(handle)
    demand(ALLOCATION in everything, f"{ALLOCATION} is not listed: {everything}")
    queries = {
        "base:": [name for name in everything if name.startswith("base:")],
        ALLOCATION: [ALLOCATION],
        "x-nobody:nothing": [],
        "base:nothing": [],
    }
    for query, wanted in queries.items():
        handle.clear_meta_contexts()
        handle.add_meta_context(query)
        got = _listed(handle)
        demand(got == wanted, f"listing {query!r}: expected {wanted}, got {got}")
    handle.clear_meta_contexts()
    handle.opt_go()
    still_in_sync(handle, Path(image))


def several_contexts(uri: str, image: str) -> None:
    """Several contexts at once: all that are listed are negotiated, each answers."""
    haggling = _haggling(uri)
    listed = _listed(haggling)
    haggling.opt_abort()
    wanted = [ALLOCATION, DEPTH, "x-nobody:nothing"]
    handle = open_handle(uri, contexts=wanted)
    for name in wanted:
        agreed = handle.can_meta_context(name)
        demand(agreed == (name in listed), f"{name}: listed {name in listed}, negotiated {agreed}")
    demand(handle.can_meta_context(ALLOCATION), f"{ALLOCATION} was not negotiated")
    covered: dict[str, int] = {}

    def note(name: str, offset: int, entries: list[int], _error: Any) -> int:
        demand(offset == 0, f"{name}: an answer for offset {offset}")
        demand(name not in covered, f"{name}: answered twice")
        covered[name] = sum(entries[::2])
        return 0

    handle.block_status(handle.get_size(), 0, note)
    agreed_names = {name for name in wanted if handle.can_meta_context(name)}
    demand(set(covered) == agreed_names, f"answers of {set(covered)}, negotiated {agreed_names}")
    demand(all(covered.values()), f"an answer without extents: {covered}")
    still_in_sync(handle, Path(image))


def allocation_depth(uri: str, image: str) -> None:
    """qemu:allocation-depth next to base:allocation: 1 where there is data, 0 in holes."""
    handle = open_handle(uri, contexts=[ALLOCATION, DEPTH])
    demand(handle.can_meta_context(DEPTH), f"{DEPTH} is not offered")
    answers: dict[str, list[int]] = {}
    handle.block_status(
        handle.get_size(), 0, lambda name, _o, entries, _e: answers.update({name: entries})
    )
    depth = answers[DEPTH]
    demand(depth[:2] == [1 << 20, 1], f"the first MiB of data is {depth[:2]}")
    demand(depth[2:4] == [7 << 20, 0], f"the hole of 7 MiB is {depth[2:4]}")
    still_in_sync(handle, Path(image))


def handshake_flags(uri: str, image: str) -> None:
    """Newstyle without FIXED (EXPORT_NAME only), and with and without the 124 zeroes."""
    fixed, no_zeroes = nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, nbd.HANDSHAKE_FLAG_NO_ZEROES
    for flags in (0, no_zeroes, fixed, fixed | no_zeroes):
        handle = new_handle()
        handle.set_handshake_flags(flags)
        handle.connect_uri(uri)
        demand(handle.get_handshake_flags() & ~flags == 0, "a flag was agreed that we withheld")
        demand(handle.get_structured_replies_negotiated() == bool(flags & fixed), f"flags {flags}")
        still_in_sync(handle, Path(image))
        handle.shutdown()


def tls_not_offered(uri: str, image: str) -> None:
    """Without certificates STARTTLS is refused: a willing client goes on, a strict one leaves."""
    willing = new_handle()
    willing.set_tls(nbd.TLS_ALLOW)
    willing.connect_uri(uri)
    demand(not willing.get_tls_negotiated(), "TLS was negotiated without certificates")
    still_in_sync(willing, Path(image))
    strict = new_handle()
    strict.set_tls(nbd.TLS_REQUIRE)
    fails(("ENOTSUP", "EPROTO"), strict.connect_uri, uri)


def go_twice_over(uri: str, image: str) -> None:
    """64 connections in turn, left politely or not: the next one is served as the first."""
    for index in range(64):
        handle = open_handle(uri)
        if index % 2:
            handle.shutdown()
        del handle
    still_in_sync(open_handle(uri), Path(image))


if __name__ == "__main__":
    main(globals())
