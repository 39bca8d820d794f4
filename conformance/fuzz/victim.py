"""The child: case after case in one process, each announced before it begins.

::

    stdin    {"number": 7, "directory": ...}     stdout   {"event": "begin", "number": 7}
                                                          {"event": "end", "number": 7, ...}

Started as ``python -m conformance.fuzz.victim SPECIMENS SEED [peer]``. If it dies or hangs, the
last "begin" says in which case. Standard error holds what faulthandler has to say about it.
"""

import asyncio
import faulthandler
import gc
import json
import pickle
import random
import resource
import shutil
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from conformance.fuzz.cases import choose, write_files
from conformance.fuzz.change import change
from conformance.fuzz.examine import (
    FoundError,
    Outcome,
    check_descriptors,
    check_message,
    examine,
    open_descriptors,
)
from conformance.fuzz.peer import KNOWN, second_opinion
from conformance.fuzz.specimen import Specimen
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import NbdsrvError

__all__ = ["main"]

HEADROOM = 2 << 30
"""Address space beyond what the process has at the beginning; threads' stacks and arenas take much
of it. Only there to protect the machine: resident memory is what is judged."""
DEEP_TRACE = 6


class _Victim:
    def __init__(self, specimens: Sequence[Specimen], seed: int, *, peer: bool) -> None:
        self._specimens = specimens
        self._seed = seed
        self._peer = peer and specimens[0].format in KNOWN
        self._workers = Workers()
        self._stray: list[str] = []

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self._stray.append(str(context)))
        sys.unraisablehook = lambda hook: self._stray.append(f"{hook.err_msg}: {hook.exc_value!r}")
        threading.excepthook = lambda hook: self._stray.append(f"thread: {hook.exc_value!r}")
        loop.add_reader(self._workers.fileno(), self._workers.complete)
        # An own thread: the loop must be free while we wait for the parent.
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            order = json.loads(line)
            await self._case(order["number"], Path(order["directory"]))

    async def _case(self, number: int, directory: Path) -> None:
        case = choose(self._specimens, self._seed, number)
        write_files(case.mutant, directory)
        specimen = case.mutant.specimen
        told: dict[str, Any] = {"number": number, "specimen": specimen.name}
        told["done"] = case.mutant.done
        _say(event="begin", **told)
        _forget_peak()
        source = specimen.source.replace("{}", str(directory))
        rng = random.Random(number)
        names = list(case.mutant.files)
        outcome = await self._judge(source, names, rng, case.content, writes=specimen.writes)
        if self._peer and specimen.peer and outcome.verdict == "accepted":
            image = Path(source.partition(":")[2])
            opinion, why = second_opinion(specimen.format, image, outcome.beginning)
            told["peer"] = opinion
            if opinion == "differs":
                outcome = Outcome("differs", why)
            elif opinion == "lenient":
                outcome = Outcome("accepted", why)
        # Kept for its parent where something is wrong; it knows the directory.
        if outcome.verdict in {"accepted", "refused", "broken"}:
            shutil.rmtree(directory)
        told |= {"verdict": outcome.verdict, "detail": outcome.detail, "peak": _peak()}
        _say(event="end", **told)

    async def _write(
        self, source: str, names: Sequence[str], rng: random.Random, read: Outcome
    ) -> Outcome:
        """``read`` is what came of reading; refused means here: not for writing."""
        descriptors = open_descriptors()
        try:
            done, problem = await change(source, names, self._workers, rng)
        except NbdsrvError as error:
            check_message(error, names)
            outcome = Outcome("refused", str(error))
        else:
            outcome = Outcome("broken", problem) if problem else read
            outcome.detail += f" ({done} changes)"
        check_descriptors(descriptors)
        return outcome

    async def _judge(
        self,
        source: str,
        names: Sequence[str],
        rng: random.Random,
        content: bytes | None,
        *,
        writes: bool,
    ) -> Outcome:
        self._stray.clear()
        try:
            outcome = await examine(source, names, self._workers, rng, content)
            if writes and outcome.verdict != "refused":
                outcome = await self._write(source, names, rng, outcome)
            if self._stray:
                gc.collect()
                return Outcome("stray", "; ".join(self._stray)[:600])
            return outcome
        except FoundError as error:
            return Outcome(error.kind, str(error))
        except Exception as error:  # noqa: BLE001 - every one of them is a finding
            lines = traceback.extract_tb(error.__traceback__)[-DEEP_TRACE:]
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(lines))
            return Outcome(type(error).__name__, f"{str(error)[:300]} at {where}")


def _say(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _forget_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _peak() -> int:
    """Bytes that were resident at most since ``_forget_peak``."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _limit_address_space() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limit = now + HEADROOM + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Run until standard input ends."""
    faulthandler.enable()
    path, seed, *options = sys.argv[1:]
    with open(path, "rb") as file:
        specimens = pickle.load(file)
    _limit_address_space()
    uvloop.run(_Victim(specimens, int(seed), peer="peer" in options).serve())


if __name__ == "__main__":
    main()
