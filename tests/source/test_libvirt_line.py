"""The thread that libvirt is called on, with callables in the place of libvirt's."""

import asyncio
import sys
import threading

import pytest

from nbdsrv.errors import ConfigError
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.libvirt_line import NO_DOMAIN, Line, Refused, bindings


class LibvirtLikeError(Exception):
    def get_error_code(self):
        return NO_DOMAIN


async def test_calls_run_in_order_and_errors_say_what_was_done():
    line = Line("libvirt test")
    seen = []

    def fail():
        raise LibvirtLikeError("Domain not found: no domain with matching name 'x'")

    def refuse():
        raise PermissionError(13, "Permission denied", "/run/sock")

    try:
        await asyncio.gather(*(line.call("counting", seen.append, i) for i in range(20)))
        assert seen == list(range(20))
        with pytest.raises(Refused, match="libvirt test: looking up x: Domain not found") as raised:
            await line.call("looking up x", fail)
        assert raised.value.code == NO_DOMAIN
        with pytest.raises(SourceError, match=r"connecting: .*Permission denied"):
            await line.call("connecting", refuse)
        with pytest.raises(ZeroDivisionError):  # a fault of ours is not libvirt's
            await line.call("dividing", lambda: 1 // 0)
    finally:
        await line.close()
        await line.close()


async def test_what_follows_a_cancelled_call_comes_after_it():
    line = Line("libvirt test")
    go, seen = threading.Event(), []

    def slow():
        go.wait(10)
        seen.append("slow")

    call = asyncio.ensure_future(line.call("beginning", slow))
    await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    clean = asyncio.ensure_future(line.call("cleaning up", seen.append, "clean"))
    go.set()
    await clean
    assert seen == ["slow", "clean"]
    await line.close()


async def test_a_silent_libvirt_is_not_waited_for_twice():
    line = Line("libvirt test")
    go = threading.Event()
    with pytest.raises(SourceError, match="freezing: libvirt does not answer"):
        await line.call("freezing", go.wait, 10, deadline_s=0.02)
    with pytest.raises(SourceError, match="thawing: libvirt does not answer"):
        await line.call("thawing", go.wait, 10)
    await line.close()
    go.set()


def test_without_the_module_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(ConfigError, match=r"nbdsrv\[libvirt\].*python3-libvirt"):
        bindings()
