"""Contents of disks: holes, text that compresses, noise that does not, an odd tail."""

import random

__all__ = ["changed", "striped"]


def striped(size: int, seed: int = 0, step: int = 64 << 10) -> bytes:
    """Stretches of zeroes, text and noise, a few steps each."""
    chance = random.Random(seed)
    made = bytearray()
    while len(made) < size:
        length = chance.randrange(1, 6) * step
        kind = chance.randrange(3)
        if kind == 0:
            made += bytes(length)
        elif kind == 1:
            made += (b"%08d lines of text\n" % chance.randrange(1 << 20)) * (length // 24 + 1)
        else:
            made += chance.randbytes(length)
        if chance.randrange(2):
            made += chance.randbytes(chance.randrange(5000))
    return bytes(made[:size])


def changed(content: bytes, seed: int, count: int = 5) -> bytes:
    """With some stretches overwritten, or zeroed."""
    chance = random.Random(seed)
    made = bytearray(content)
    for _ in range(count):
        at = chance.randrange(len(made))
        length = min(chance.randrange(1, 200_000), len(made) - at)
        made[at : at + length] = (
            bytes(length) if chance.randrange(3) == 0 else chance.randbytes(length)
        )
    return bytes(made)
