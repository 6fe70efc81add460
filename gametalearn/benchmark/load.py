"""How much of the machine's CPU time others used while this process was timed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Reading", "others_share", "read"]

IDLE = (3, 4)
"""Of a line of ``/proc/stat``: the columns idle and iowait."""
COLUMNS = 8
"""Up to "steal": what follows is contained in the columns before. Stolen time counts as busy."""


@dataclass(frozen=True)
class Reading:
    """Clocks at one moment.

    Attributes:
        wall: seconds.
        own: CPU seconds of this process, all of its threads.
        busy: CPU seconds that the machine was not idle, on all cores, time that a virtual machine's
            host took away included; None where the system does not tell.
        cores: of the machine.
    """

    wall: float
    own: float
    busy: float | None
    cores: int


def read(stat: Path = Path("/proc/stat")) -> Reading:
    """The clocks now."""
    wall, own = time.perf_counter(), time.process_time()
    try:
        lines = [x.split() for x in stat.read_text().splitlines() if x.startswith("cpu")]
        counts = [int(x) for x in lines[0][1 : COLUMNS + 1]]
        ticks = sum(n for i, n in enumerate(counts) if i not in IDLE)
        busy = ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):  # no Linux: no such file, no sysconf
        return Reading(wall, own, None, os.cpu_count() or 1)
    return Reading(wall, own, busy, len(lines) - 1)


def others_share(before: Reading, after: Reading) -> float | None:
    """The share of the machine's CPU time between two readings that other processes used.

    1 is all cores all the time. None where the system does not tell.
    """
    if before.busy is None or after.busy is None:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others) / ((after.wall - before.wall) * after.cores)
