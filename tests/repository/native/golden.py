"""How the golden repositories were made; see ``test_format``."""

import random
from pathlib import Path

from nbdsrv.store.directory import DirectoryStore
from tests.repository.native.made import CHUNK, add_point, made

GOLDEN = Path(__file__).parent / "golden"
GROUP = "vm/1 é"
KINDS = ("plain-blake3", "plain-sha256", "encrypted-blake3", "encrypted-sha256")


def history() -> list[dict[str, bytes]]:
    """The disks of each point, from old to new: what shrinks, what does not, zeroes, duplicates."""
    noise = random.Random("golden").randbytes(2000)
    first = _chunks("ab-a") + bytes(40 * CHUNK) + _chunks("c") + noise
    second = _chunks("a-da") + bytes(40 * CHUNK) + _chunks("c") + noise
    return [{"sda": first, "sdb": _chunks("e")}, {"sda": second, "sdb": _chunks("e")}]


def _chunks(letters: str) -> bytes:
    """A chunk for each letter, one of zeroes for a dash."""
    return b"".join(bytes(CHUNK) if x == "-" else x.encode() * CHUNK for x in letters)


def make(into: Path) -> None:
    """All of them, in new directories."""
    for kind in KINDS:
        cipher, _, hash_ = kind.partition("-")
        store = DirectoryStore(str(into / kind))
        vault = made(store, encrypted=cipher == "encrypted", hash_=hash_)
        for disks in history():
            add_point(vault, GROUP, disks)


if __name__ == "__main__":
    make(GOLDEN)
