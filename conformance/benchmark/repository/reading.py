"""fio on a restore point: its nbd engine, or libaio with O_DIRECT on a file in a FUSE mount."""

import subprocess
import tempfile
from dataclasses import dataclass

from conformance.benchmark.load import FioResult, understand
from conformance.benchmark.report import BenchmarkError
from conformance.benchmark.repository.service import Target

__all__ = ["Load", "read"]

GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """fio's pattern, block size and depth, and when it ends.

    ``amount`` bytes, but ``limit_s`` seconds at most; ``amount`` None is for the whole time.
    """

    rw: str
    block: str
    depth: int
    limit_s: float
    amount: int | None = None


def read(target: Target, load: Load, size: int) -> FioResult:
    """Read the first ``size`` bytes of a target; offsets are the same for all of them."""
    command = ["fio", "--name=x", f"--rw={load.rw}", f"--bs={load.block}", f"--size={size}"]
    command += [f"--iodepth={load.depth}", f"--runtime={round(load.limit_s * 1000)}ms"]
    command += ["--output-format=json", "--readonly"]
    command += ["--time_based"] if load.amount is None else [f"--io_size={load.amount}"]
    if target.uri:
        command += ["--ioengine=nbd", f"--uri={target.uri}"]
    else:
        command += ["--ioengine=libaio", "--direct=1", f"--filename={target.path}"]
    with tempfile.TemporaryDirectory(prefix="nbd-bench-client-") as directory:
        try:
            done = subprocess.run(
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=load.limit_s + GRACE_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BenchmarkError(f"fio: {error}") from error
    return understand(done.stdout, done.stderr, done.returncode, load.rw)
