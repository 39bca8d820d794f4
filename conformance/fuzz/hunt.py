"""The parent: orders cases, watches time and memory, starts the child anew when it is gone.

::

    hunt ── number ──> victim          end: counted, or kept as a finding
         <── begin, end ──             too long: SIGABRT (faulthandler says where), next child

Deadlines are in processor time of the child, so that a busy machine makes no findings; a child that
neither works nor answers gets a generous wall clock.
"""

import json
import os
import pickle
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from conformance.fuzz.cases import choose, write_files
from conformance.fuzz.specimen import Specimen, is_bomb_turn
from conformance.process import PROJECT, tail

__all__ = ["MAX_MEMORY", "Finding", "Hunt", "Tally"]

SPECIMENS = "specimens"
MAX_MEMORY = 300 << 20
"""Resident bytes of the child, all included, while it works on a case."""
MAX_CPU_S = 6.0
"""Processor time of one case; most take some milliseconds."""
MAX_BOMB_CPU_S = 30.0
"""The same for a bomb: unpacking hundreds of MiB may take a while, memory may not."""
MAX_WALL_S = 90.0
"""Time without an answer, whatever the machine is busy with."""
ENOUGH = 300
"""Findings of one format after which its hunt ends: they will be the same few."""
ENOUGH_DEATHS = 8
"""The same for what ends the child: hangs take their time."""
KEPT = 3
"""Findings that look alike of which the files are kept."""

_DIGITS = re.compile(r"[0-9]+|/[^ :]*/")
_FINE = frozenset({"accepted", "refused", "broken"})


@dataclass(frozen=True, slots=True)
class Finding:
    """A case that went wrong; ``kept`` is where its files are, "" if some like it were kept."""

    format: str
    specimen: str
    number: int
    kind: str
    detail: str
    done: Sequence[str]
    kept: str

    @property
    def likeness(self) -> str:
        """The same for findings that probably have one cause: what was found, without numbers."""
        _, at, where = self.detail.rpartition(" at ")
        text = where if at and ".py:" in where else _DIGITS.sub("#", self.detail)[:80]
        return f"{self.kind} {text}"


@dataclass(slots=True)
class Tally:
    """What a format's cases came to.

    Attributes:
        lenient: what qemu-img said against images that were accepted, without names and numbers.
    """

    format: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    broken: int = 0
    peak: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    lenient: Counter[str] = field(default_factory=Counter)


class Hunt:
    """All cases of one format."""

    def __init__(
        self, specimens: Sequence[Specimen], seed: int, keep: Path, *, peer: bool = False
    ) -> None:
        """Findings go below ``keep``, which is made when there is one; ``peer``: see ``peer``."""
        self._peer = peer
        self._specimens = specimens
        self._seed = seed
        self._keep = keep
        self._deaths = 0
        self._directory = Path()
        self.tally = Tally(specimens[0].format)

    def run(self, wanted: Callable[[int, float], bool], first: int = 0) -> Tally:
        """The specimens as they are, then cases from ``first`` on.

        Args:
            wanted: called with the mutants done and the seconds spent on them; False ends it.
            first: number of the first case.
        """
        began = time.monotonic()
        with _scratch() as directory:
            (directory / SPECIMENS).write_bytes(pickle.dumps(self._specimens))
            self._directory = directory
            numbers = self._numbers(wanted, first)
            number = next(numbers, None)
            while number is not None:
                with self._child() as child:
                    number = self._feed(child, number, numbers)
        self.tally.seconds = time.monotonic() - began
        return self.tally

    def _child(self) -> "_Child":
        specimens = self._directory / SPECIMENS
        return _Child(specimens, self._seed, self._directory, peer=self._peer)

    def _numbers(self, wanted: Callable[[int, float], bool], first: int) -> Iterator[int]:
        yield from range(-1, -len(self._specimens) - 1, -1)
        number, began = first, time.monotonic()
        while (
            wanted(number - first, time.monotonic() - began)
            and len(self.tally.findings) < ENOUGH
            and self._deaths < ENOUGH_DEATHS
        ):
            yield number
            number += 1

    def _feed(self, child: "_Child", number: int, numbers: Iterator[int]) -> int | None:
        """Cases for one child; the next number when it is gone, None when all are done."""
        current: int | None = number
        while current is not None:
            fine = self._case(child, current)
            current = next(numbers, None)
            if not fine:
                break
        return current

    def _case(self, child: "_Child", number: int) -> bool:
        answer = child.work(number, self._limit_s(number))
        verdict, tally = answer["verdict"], self.tally
        peak = int(answer.get("peak", 0))
        tally.cases += 1
        tally.peak = max(tally.peak, peak)
        if verdict in _FINE and peak > MAX_MEMORY:
            # A process that has been through tens of thousands of images has a heap full of holes,
            # and its cache of decoded blocks. What this image takes, it takes alone too.
            child.retire()
            with self._child() as alone:
                again = alone.work(number, self._limit_s(number))
            if int(again.get("peak", 0)) > MAX_MEMORY or again["verdict"] not in _FINE:
                answer["detail"] = f"{peak >> 20} MiB resident ({verdict}: {answer['detail']})"
                verdict = "memory"
        if verdict in {"refused", "broken"} and self._is_valid(number):
            verdict = "valid image"
        if verdict not in _FINE:
            self._keep_finding(child, number, verdict, answer)
        elif verdict == "accepted":
            tally.accepted += 1
            if answer.get("peer") == "lenient":
                tally.lenient[_DIGITS.sub("#", answer["detail"])] += 1
        elif verdict == "refused":
            tally.refused += 1
        else:
            tally.broken += 1
        return not child.gone

    def _is_valid(self, number: int) -> bool:
        return number < 0 and not self._specimens[-1 - number].bomb

    def _limit_s(self, number: int) -> float:
        bombs = any(each.bomb for each in self._specimens)
        return MAX_BOMB_CPU_S if bombs and (number < 0 or is_bomb_turn(number)) else MAX_CPU_S

    def _keep_finding(
        self, child: "_Child", number: int, kind: str, answer: dict[str, Any]
    ) -> None:
        name = str(answer.get("specimen", "?"))
        place = self._keep / f"{self.tally.format}-{self._seed}-{number}"
        detail = str(answer["detail"])
        mutations = answer.get("done", [])
        finding = Finding(self.tally.format, name, number, kind, detail, mutations, str(place))
        self._deaths += child.gone
        alike = sum(found.likeness == finding.likeness for found in self.tally.findings)
        if alike < KEPT:
            shutil.rmtree(place, ignore_errors=True)
            # Made again: what the child had may have been written to.
            write_files(choose(self._specimens, self._seed, number).mutant, place)
            specimen = next((each for each in self._specimens if each.name == name), None)
            record = {
                "source": specimen.source if specimen else "",
                "writes": bool(specimen and specimen.writes),
                "number": number,
                "kind": kind,
                "detail": detail,
                "done": mutations,
            }
            (place / "finding.json").write_text(json.dumps(record, indent=1) + "\n")
        else:
            finding = replace(finding, kept="")
        shutil.rmtree(child.case, ignore_errors=True)
        self.tally.findings.append(finding)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A directory in memory where there is one: tens of thousands of files come and go."""
    memory = "/dev/shm"
    base = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="nbdsrv-fuzz-", dir=base) as directory:
        yield Path(directory)


class _Child:
    """A victim, from its start until it is gone."""

    def __init__(self, specimens: Path, seed: int, directory: Path, *, peer: bool) -> None:
        self._errors = directory / "stderr"
        self._command = [
            *(sys.executable, "-X", "faulthandler", "-m", "conformance.fuzz.victim"),
            *(str(specimens), str(seed), *(["peer"] if peer else [])),
        ]
        self.case = directory / "case"
        self.gone = False
        self._pending = b""

    def __enter__(self) -> Self:
        shutil.rmtree(self.case, ignore_errors=True)
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=PROJECT,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._selector.close()
        self._process.stdout.close()
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass

    def retire(self) -> None:
        """It has done enough; another one takes its place."""
        self.gone = True
        self._process.kill()

    def work(self, number: int, limit_s: float) -> dict[str, Any]:
        """Have it work on a case; its answer, or what is to be said in its place."""
        assert self._process.stdin is not None
        order = json.dumps({"number": number, "directory": str(self.case)}) + "\n"
        try:
            self._process.stdin.write(order.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._dead({})
        begun: dict[str, Any] = {}
        used, since = 0.0, time.monotonic()
        while True:
            line = self._line(0.2)
            if line is None:
                return self._dead(begun)
            if line:
                answer: dict[str, Any] = json.loads(line)
                if answer["event"] == "end":
                    return answer
                begun, used = answer, self._cpu_s()
                continue
            if begun and self._cpu_s() - used > limit_s:
                return self._hung(begun, f"more than {limit_s:g} s of processor time")
            if time.monotonic() - since > MAX_WALL_S:
                return self._hung(begun, f"no answer for {MAX_WALL_S:g} s")

    def _line(self, wait_s: float) -> bytes | None:
        """A line, b"" if there is none yet, None if there will be no more."""
        while b"\n" not in self._pending:
            if not self._selector.select(wait_s):
                return b""
            assert self._process.stdout is not None
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            if not more:
                return None
            self._pending += more
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _cpu_s(self) -> float:
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
        except OSError:
            return 0.0
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _hung(self, begun: dict[str, Any], why: str) -> dict[str, Any]:
        self._process.send_signal(signal.SIGABRT)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        answer = self._dead(begun)
        return answer | {"verdict": "hang", "detail": f"{why}: {answer['detail']}"}

    def _dead(self, begun: dict[str, Any]) -> dict[str, Any]:
        self.gone = True
        code = self._process.wait()
        said = self._errors.read_text(errors="replace")
        ours = [line.strip() for line in said.splitlines() if "nbdsrv/" in line]
        detail = " < ".join(ours[:4]) or tail(said)
        return {**begun, "verdict": "crash", "detail": f"exit code {code}: {detail}"}
