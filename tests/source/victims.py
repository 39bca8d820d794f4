"""A backup in a process of its own, that is killed at a certain moment."""

import asyncio
import sys
from collections.abc import Mapping, Sequence

__all__ = ["victim"]

VICTIM = """
import asyncio, os, signal, sys
from nbdsrv.source.qemu import QemuVm
from nbdsrv.source.qemu_scratch import Scratch
from nbdsrv.source.qmp import QmpClient
from tests.disk.threads import running_workers
location, known, which, when = sys.argv[1], eval(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
count, execute = 0, QmpClient.execute

async def counted(self, command, arguments=None, **named):
    global count
    count += 1
    if count == which and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    if command == when:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGKILL)
    if count == which and when == "sent":
        asyncio.get_running_loop().call_later(0.002, os.kill, os.getpid(), signal.SIGKILL)
    answer = await execute(self, command, arguments, **named)
    if count == which:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

QmpClient.execute = counted

async def main():
    async with running_workers() as workers:
        async with QemuVm(location, workers).freeze(known) as frozen:
            await frozen.succeed()
    print(count)

asyncio.run(main())
"""


async def victim(location: str, before: Mapping[str, Sequence[str]], which: int, when: str) -> int:
    """A backup that is killed at its command number ``which``, or at the one of that name.

    Args:
        location: of the VM.
        before: the checkpoints that are known.
        which: 1 is the first.
        when: ``before`` it is sent, a little after it was ``sent``, ``after`` its answer; or the
            name of a command, upon which it is killed as soon as that is sent.

    Returns:
        How many commands it gave, if it was not killed.
    """
    arguments = [location, repr(dict(before)), str(which), when]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", VICTIM, *arguments, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    assert process.returncode == (0 if said else -9)
    return int(said or 0)
