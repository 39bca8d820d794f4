"""kill -9 of a writer, at any moment: whole objects, or none."""

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from nbdsrv.store.directory import DirectoryStore

ROOT = Path(__file__).parents[2]
ROUNDS = 20

WRITER = """
import hashlib, os, random, sys
from nbdsrv.store.directory import DirectoryStore
store, seed = DirectoryStore(sys.argv[1]), random.Random(int(sys.argv[2]))
os.write(1, b"ready\\n")
while True:
    data = seed.randbytes(seed.choice((0, 10, 5000, 300_000, 2_000_000)))
    name = hashlib.sha256(data).hexdigest()
    store.put_new(f"packs/{name[:2]}/{name}", data)
    store.put("lease", name.encode())
    os.write(1, name.encode() + b"\\n")
"""


def test_a_killed_writer_leaves_whole_objects(tmp_path: Path) -> None:
    chosen = random.Random(5)
    store = DirectoryStore(str(tmp_path))
    acknowledged: set[str] = set()
    for number in range(ROUNDS):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert writer.stdout is not None
        try:
            assert writer.stdout.readline() == b"ready\n"
            for _ in range(chosen.randrange(6)):
                acknowledged.add(writer.stdout.readline().decode().strip())
            for _ in range(chosen.randrange(200_000)):
                pass  # up to some milliseconds, about what one put takes
        finally:
            os.kill(writer.pid, signal.SIGKILL)
            rest = writer.communicate()[0].decode()
        acknowledged.update(line for line in rest.splitlines() if len(line) == 64)
        found = set()
        for row in store.list("packs/"):
            data = store.get(row.key)
            assert len(data) == row.size
            name = hashlib.sha256(data).hexdigest()
            assert row.key == f"packs/{name[:2]}/{name}"
            found.add(name)
        assert acknowledged <= found
        if acknowledged:
            assert store.get("lease").decode() in found
    assert len(acknowledged) > ROUNDS
