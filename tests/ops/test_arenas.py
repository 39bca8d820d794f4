"""Arenas: the limit holds for threads that come later, and an operator's own is left alone."""

import subprocess
import sys

import pytest

from nbdsrv.ops.arenas import few_arenas

HEAPS = """
import ctypes, sys, tempfile, threading
from nbdsrv.ops.arenas import few_arenas
if sys.argv[1] == "few" and not few_arenas():
    sys.exit(77)
def work(barrier):
    kept = [bytearray(100_000) for _ in range(4)]
    barrier.wait()
barrier = threading.Barrier(9)
threads = [threading.Thread(target=work, args=(barrier,)) for _ in range(8)]
for thread in threads:
    thread.start()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
with tempfile.TemporaryDirectory() as directory:
    path = directory + "/heaps.xml"
    stream = ctypes.c_void_p(libc.fopen(path.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(open(path).read().count("<heap nr="))
barrier.wait()
"""


@pytest.mark.parametrize(("how", "least", "most"), [("few", 1, 2), ("many", 3, 99)])
def test_threads_share_arenas(how: str, least: int, most: int) -> None:
    environment = {"PATH": "/usr/bin"}
    command = [sys.executable, "-c", HEAPS, how]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=30
    )
    if done.returncode == 77:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    assert least <= int(done.stdout) <= most


@pytest.mark.parametrize(
    "environment", [{"MALLOC_ARENA_MAX": "9"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=9"}]
)
def test_an_operators_number_is_left_alone(environment: dict[str, str]) -> None:
    assert not few_arenas(environment)
