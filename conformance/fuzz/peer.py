"""A second opinion on what was accepted: what qemu-img reads from the same mutant.

Two readers that agree on a broken image may both be wrong; but where both read it, and differently,
one of them serves what is not there. And where qemu-img refuses what we serve, it knows a
rule we do not: that is counted as *lenient* and shown, and is for a human to judge.
"""

import subprocess
from pathlib import Path

from conformance.process import find_program

__all__ = ["KNOWN", "second_opinion"]

KNOWN = {
    "qcow2": "qcow2",
    "qcow": "qcow",
    "vhd": "vpc",
    "vhdx": "vhdx",
    "vmdk": "vmdk",
    "vdi": "vdi",
    "parallels": "parallels",
}
"""Formats both have, and QEMU's names of them."""
TIMEOUT_S = 10
MIB = 1 << 20


def second_opinion(form: str, image: Path, ours: bytes) -> tuple[str, str]:
    """What qemu-img makes of the beginning of an image of which ``ours`` is our content.

    Returns:
        A verdict: ``agreed``, ``lenient`` (it refuses), ``differs``, or ``silent`` (no answer).
    """
    target = image.with_name("second-opinion")
    count = -(-len(ours) // MIB)
    words = [find_program("qemu-img"), "dd", "-f", KNOWN[form], "-O", "raw", "bs=1M"]
    words += [f"count={count}", f"if={image}", f"of={target}"]
    try:
        done = subprocess.run(
            words, capture_output=True, timeout=TIMEOUT_S, check=False, cwd=image.parent
        )
    except subprocess.TimeoutExpired:
        return "silent", f"qemu-img did not end within {TIMEOUT_S} s"
    if done.returncode < 0:
        return "silent", f"qemu-img died by signal {-done.returncode}"
    if done.returncode:
        return "lenient", done.stderr.decode(errors="replace").strip()[-200:]
    theirs = target.read_bytes()
    common = min(len(ours), len(theirs))
    if ours[:common] == theirs[:common]:
        return "agreed", ""
    at = next(i for i in range(common) if ours[i] != theirs[i])
    return "differs", f"qemu-img reads other bytes from {at} on"
