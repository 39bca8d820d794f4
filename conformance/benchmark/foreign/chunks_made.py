"""A PBS datastore and casync images, made for measuring.

::

    pbs       1 TiB, 100 snapshots, data in one of 500 chunks of 4 MiB        sparse
              512 MiB, one snapshot, all of it text-like                      dense
    casync    1 TiB, 100 indexes of chunks of 256 KiB, 160 MB each            sparse
              512 MiB, made by casync itself                                  dense

The 100 points of a sparse disk share one index file by hard links: what is read of it at opening is
read all the same.
"""

import hashlib
import os
import random
import shutil
import subprocess
from pathlib import Path

from conformance.process import find_program
from tests.repository.casync import encoder as casync_encoder
from tests.repository.pbs.encoder import Datastore, fixed_index, stamp

__all__ = [
    "DENSE",
    "PBS_CHUNK",
    "STEP",
    "casync_dense",
    "casync_sparse",
    "pbs_dense",
    "pbs_sparse",
]

SPARSE = 1 << 40
DENSE = 512 << 20
POINTS = 100
PBS_CHUNK = 4 << 20
CASYNC_CHUNK = 256 << 10
STEP = 500
"""Every how many chunks there is one of data."""
T0 = 1767225600
DAY_S = 86400
DISK = "drive-scsi0"
_WORDS = [f"word{number} " for number in range(4000)]


def pbs_sparse(cache: str) -> Path:
    """A datastore of 100 snapshots of a disk of 1 TiB."""
    root = Path(cache) / "pbs-sparse"
    if (root / ".done").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    store = Datastore(root, chunk=PBS_CHUNK)
    data = store.put_chunk(_text(random.Random(1), PBS_CHUNK), None)
    zero = hashlib.sha256(bytes(PBS_CHUNK)).digest()
    digests = (data + zero * (STEP - 1)) * (SPARSE // PBS_CHUNK // STEP + 1)
    digests = digests[: SPARSE // PBS_CHUNK * 32]
    csum = hashlib.sha256(digests).hexdigest()
    first: Path | None = None
    for number in range(POINTS):
        path = store.snapshot("vm/100", T0 + DAY_S * number, {})
        index = path / f"{DISK}.img.fidx"
        if first is None:
            first = index
            index.write_bytes(fixed_index(SPARSE, PBS_CHUNK, digests))
        else:
            os.link(first, index)
        manifest = store.manifest(path)
        manifest["files"].append(
            {"filename": index.name, "crypt-mode": "none", "size": SPARSE, "csum": csum}
        )
        store.put_manifest(path, manifest)
    (root / ".done").touch()
    return root


def pbs_dense(cache: str) -> Path:
    """A datastore of one snapshot of a disk that is all data."""
    root = Path(cache) / "pbs-dense"
    if (root / ".done").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    Datastore(root, chunk=PBS_CHUNK).snapshot("vm/100", T0, {DISK: _dense()})
    (root / ".done").touch()
    return root


def casync_sparse(cache: str) -> Path:
    """A directory of 100 indexes of a disk of 1 TiB."""
    root = Path(cache) / "casync-sparse"
    if (root / "done").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    store = root / "default.castr"
    data = casync_encoder.put_chunk(store, _text(random.Random(1), CASYNC_CHUNK))
    zero = casync_encoder.content_id(bytes(CASYNC_CHUNK))
    items = [
        ((number + 1) * CASYNC_CHUNK, zero if number % STEP else data)
        for number in range(SPARSE // CASYNC_CHUNK)
    ]
    first = root / "vm1-2026-01-01.caibx"
    first.write_bytes(casync_encoder.index(items, (16 << 10, 64 << 10, CASYNC_CHUNK)))
    for number in range(1, POINTS):
        os.link(first, root / f"vm1-{stamp(T0 + DAY_S * number)[:10]}.caibx")
    (root / "done").touch()
    return root


def casync_dense(cache: str) -> Path:
    """An index and a store that casync itself made.

    Raises:
        MissingPeerError: it is not installed.
    """
    root = Path(cache) / "casync-dense"
    if (root / "done").exists():
        return root
    program = find_program("casync")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    raw = root / "disk.raw"
    raw.write_bytes(_dense())
    store = f"--store={root / 'default.castr'}"
    command = [program, store, "make", str(root / "vm1.caibx"), str(raw)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    raw.unlink()
    (root / "done").touch()
    return root


def _dense() -> bytes:
    chance = random.Random(1)
    return b"".join(_text(chance, 2 << 20) for _ in range(DENSE // (2 << 20)))


def _text(chance: random.Random, size: int) -> bytes:
    """What packs to about a third, as a file system with text does."""
    piece = "".join(chance.choices(_WORDS, k=8000)).encode()
    return (piece * (size // len(piece) + 1))[:size]
