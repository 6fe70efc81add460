"""What other processes use is the machine's time less one's own; readings here are made up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gametalearn.benchmark.load import Reading, others_share, read

TICK = os.sysconf("SC_CLK_TCK")


def test_the_kernels_counters_are_read(tmp_path: Path) -> None:
    # user nice system idle iowait irq softirq steal guest guest_nice; guest is a part of user
    stat = tmp_path / "stat"
    stat.write_text(
        f"cpu  {4 * TICK} {TICK} {2 * TICK} {900 * TICK} {50 * TICK} 0 0 {3 * TICK} {TICK} 0\n"
        "cpu0 1 0 0 0 0 0 0 0 0 0\ncpu1 1 0 0 0 0 0 0 0 0 0\nintr 12 cpu 9\nctxt 5\n"
    )
    reading = read(stat)
    assert (reading.busy, reading.cores) == (10.0, 2)  # neither idle nor waiting for a disk


@pytest.mark.parametrize("text", [None, "", "cpu  1 two 3\n"])
def test_a_system_without_counters_is_unknown(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "stat").write_text(text)
    reading = read(tmp_path / "stat")
    assert reading.busy is None
    assert others_share(reading, reading) is None


def test_others_have_what_is_not_our_own() -> None:
    before = Reading(wall=10.0, own=5.0, busy=100.0, cores=2)
    after = Reading(wall=14.0, own=9.0, busy=106.0, cores=2)
    assert others_share(before, after) == pytest.approx((6 - 4) / (4 * 2))
    # the kernel counts in ticks, so that we may seem to have used more than there was
    assert others_share(before, Reading(14.0, 9.0, 103.9, 2)) == 0.0
    assert others_share(before, Reading(14.0, 9.0, None, 2)) is None
