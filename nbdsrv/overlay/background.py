"""What goes on behind an overlay that is in use: boot traces, and hydration.

::

    open ── the last boot's trace ── prefetched, in its order ──┐
       │                                                        ├── hydration, if it is wanted
       └── this boot is recorded, until a lull ── kept ─────────┘
    close ── all of it ends; a trace that is long enough is kept

A boot is recorded over an overlay that nothing was written to yet: later ones read in part what
the guest has written, which no other overlay has.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from itertools import pairwise

from nbdsrv.disk.patience import set_within
from nbdsrv.disk.throttle import Rate
from nbdsrv.errors import DiskError
from nbdsrv.overlay.hydrate import HYDRATE_PATIENCE_S, Hydration, Range
from nbdsrv.overlay.overlay import Overlay
from nbdsrv.overlay.prefetch import PREFETCH_PATIENCE_S, Prefetch
from nbdsrv.overlay.quiet import Quiet, Traffic
from nbdsrv.overlay.recording import Recording
from nbdsrv.overlay.trace import Trace, merged
from nbdsrv.overlay.trace_place import TracePlace

__all__ = ["Background"]

log = logging.getLogger(__name__)

RECORD_S = 180.0
"""Seconds from the first read: a system has booted, and what it reads then is its work."""
LULL_S = 15.0
"""Seconds without anything new being read that end a boot."""
SETTLE_S = 3.0
"""Seconds a client has to begin to read before the base is copied all the same. Who only asks for
the size is gone by then."""
SHORTEST = 16
"""Units of the shortest trace that is kept: somebody has looked at a partition table."""
BACKWARDS = 4
"""Steps from one unit to the next that lead back on the disk, at least; who goes through it in
order copies or searches it."""


class Background:
    """Of one open overlay. Belongs to its loop."""

    def __init__(
        self,
        overlay: Overlay,
        recording: Recording,
        place: TracePlace,
        traffic: Traffic,
        hydrate: Rate | None,
    ) -> None:
        """Nothing happens yet.

        Args:
            overlay: open, over ``recording``.
            recording: the base.
            place: where traces are kept.
            traffic: of the server's clients.
            hydrate: copy the base, at this rate; or not.
        """
        self._overlay = overlay
        self._recording = recording
        self._place = place
        base = recording.inside
        if any(overlay.states.counts):
            recording.stop()
        self._prefetch = Prefetch(base, Quiet(traffic, PREFETCH_PATIENCE_S))
        self._hydration: Hydration | None = None
        if hydrate is not None:
            quiet = Quiet(traffic, HYDRATE_PATIENCE_S)
            self._hydration = Hydration(overlay, base, quiet, hydrate)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def facts(self) -> dict[str, object]:
        """For ``status``."""
        found: dict[str, object] = {"name": self._overlay.name, **self._overlay.facts}
        found["recorded_bytes"] = len(self._recording.units) << 16
        found["recording"] = self._recording.recording
        found["prefetched_bytes"] = self._prefetch.done
        found["hydration"] = self._hydration.facts if self._hydration is not None else None
        return found

    def start(self) -> None:
        """Begin, in tasks of our own, until ``stop``."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._go_on()), loop.create_task(self._record())]

    async def stop(self) -> None:
        """End all of it, and keep the trace. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled() and (error := task.exception()) is not None:
                    log.error("overlay.background overlay=%s", self._overlay.name, exc_info=error)
        await self._keep()

    async def _go_on(self) -> None:
        trace = await self._place.load()
        ranges: Sequence[Range] = ()
        if trace is not None:
            ranges = list(trace.byte_ranges(self._overlay.size))
            await self._prefetch.run(ranges)
        if self._hydration is None:
            return
        await self._booted()
        try:
            await self._hydration.run(ranges)
        except DiskError as error:  # the overlay can store nothing: the guest is told so as well
            self._hydration.state, self._hydration.error = "failed", str(error)
            log.warning("overlay.hydrate overlay=%s reason=%s", self._overlay.name, error)

    async def _booted(self) -> None:
        """Return when what the guest reads need not be seen any more: what is copied is not."""
        recording = self._recording
        if not recording.recording:
            return
        if await set_within(recording.begun, SETTLE_S):
            await recording.ended.wait()

    async def _record(self) -> None:
        recording = self._recording
        await recording.begun.wait()
        deadline = time.monotonic() + RECORD_S
        while True:
            before = len(recording.units)
            left = deadline - time.monotonic()
            if await set_within(recording.ended, min(LULL_S, max(0.0, left))):
                break
            if left <= LULL_S or len(recording.units) == before:
                break
        await self._keep()

    async def _keep(self) -> None:
        """Record no more, and keep what there is, if a boot it was."""
        self._recording.stop()
        units, self._recording.units = self._recording.units, {}
        name = self._overlay.name
        back = sum(after < before for before, after in pairwise(units))
        log.debug("trace.recorded overlay=%s units=%d back=%d", name, len(units), back)
        if self._recording.overrun or len(units) < SHORTEST or back < BACKWARDS:
            return
        size, point = self._overlay.size, self._overlay.point
        trace = Trace(size=size, recorded=time.time(), point=point, ranges=merged(units))
        await self._place.keep(trace)
        log.info("trace.kept overlay=%s units=%d", name, len(units))
