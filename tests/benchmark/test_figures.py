"""The arithmetic from timings to figures, on timings that were made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from gametalearn.benchmark.figures import figures, reasons
from gametalearn.benchmark.report import summary, times_slower, unpublishable
from gametalearn.benchmark.sides import SIDES, Record, Side

Make = Callable[..., Record]


def rounds_of(record: Make, **ms: list[list[float]]) -> list[Mapping[Side, Record]]:
    """Three rounds; of some sides, by name with underscores, with these timings."""
    return [
        {s: record(s, *ms.get(s.replace("-", "_"), [[], [], []])[i]) for s in SIDES}
        for i in range(3)
    ]


def test_medians_ratios_and_spreads(record: Make) -> None:
    found = figures(
        rounds_of(
            record,
            gametalearn=[[10, 11, 12], [20, 21, 22], [10, 11, 30]],
            learn2learn=[[33], [42], [44]],
            learn2learn_as_shipped=[[55], [63], [66]],
        ),
        {},
    )
    assert found["gametalearn_ms"] == 12  # of 10 10 11 11 12 20 21 22 30
    assert found["gametalearn_ms_quartiles"] == [11, 12, 21]
    assert found["ms_by_round"]["gametalearn"] == [11, 21, 11]
    assert found["round_spread"]["gametalearn"] == pytest.approx(10 / 12)
    assert found["speedup"] == pytest.approx(42 / 12)
    assert found["speedup_by_round"] == pytest.approx([3, 2, 4])
    assert found["speedup_resolution"] == pytest.approx(3.5 - 2)
    assert found["speedup_as_shipped"] == pytest.approx(63 / 12)
    assert found["speedup_as_shipped_by_round"] == pytest.approx([5, 3, 6])
    assert found["speedup_as_shipped_resolution"] == pytest.approx(5.25 - 3)
    assert found["first_order_ms_quartiles"] == [60, 60, 60]
    assert (found["floor_ms"], found["first_order_floor_ms"]) == (80, 50)


def test_setup_is_the_first_call_less_a_later_one_and_the_median_of_the_rounds(
    record: Make,
) -> None:
    firsts = [3100.0, 90.0, 2100.0]  # the second was faster than the later calls: no set-up at all
    rounds = [
        {s: record(s, first_call_ms=firsts[i] if s == "gametalearn" else 9e9) for s in SIDES}
        for i in range(3)
    ]
    assert figures(rounds, {})["setup_s"] == 2.0


def test_memory_is_the_largest_of_gametalearn_and_of_learn2learn_as_shipped(record: Make) -> None:
    rss = {"gametalearn": 700.0, "learn2learn": 9999.0, "learn2learn-as-shipped": 600.0}
    rounds = [{s: record(s, peak_rss_mb=rss.get(s, 1.0) + i) for s in SIDES} for i in range(3)]
    assert figures(rounds, {})["peak_rss_mb"] == {"gametalearn": 702.0, "learn2learn": 602.0}


def test_an_idle_machine_gives_publishable_figures(record: Make) -> None:
    found = figures(rounds_of(record), {"float64_rel_error": 1e-13})
    assert found["publishable"] is True
    assert found["not_publishable_because"] == []
    assert found["others_share"] == dict.fromkeys(SIDES, 0.01)


def test_load_in_one_process_is_enough_to_forbid_publication(record: Make) -> None:
    rounds = rounds_of(record)
    rounds[1] = {**rounds[1], "learn2learn": record("learn2learn", others_share=0.43)}
    found = figures(rounds, {})
    assert found["publishable"] is False
    assert found["others_share"]["learn2learn"] == 0.43
    (why,) = found["not_publishable_because"]
    assert "others used up to 43% of the machine's CPU time while learn2learn was timed" in why


@pytest.mark.parametrize(
    ("changes", "errors", "count", "expected"),
    [
        ({"others_share": None}, {}, 3, "this system does not tell how much CPU time"),
        ({"others_share": 0.051}, {}, 3, "more than 5% disturbs"),
        ({}, {}, 2, "fewer than 3 rounds"),
        ({}, {"float64_rel_error": 1e-8}, 3, "float64_rel_error is 1.0e-08"),
        ({}, {"float64_rel_error": float("nan")}, 3, "float64_rel_error is nan"),
        ({}, {"float64_rel_error_learn2learn": 0.5}, 3, "float64_rel_error_learn2learn is 5.0e-01"),
        ({"warnings": ["gametalearn: Conv4 is slow"]}, {}, 3, "gametalearn: Conv4 is slow"),
    ],
)
def test_each_reason(
    record: Make, changes: dict[str, Any], errors: dict[str, float], count: int, expected: str
) -> None:
    rounds = [{s: record(s, **changes) for s in SIDES}] * count
    shares = {s: rounds[0][s].others_share for s in SIDES}
    (why,) = reasons(rounds, shares, errors)
    assert expected in why


def test_one_round_has_no_resolution(record: Make) -> None:
    found = figures([{s: record(s) for s in SIDES}], {})
    assert (found["speedup"], found["speedup_by_round"]) == (2.5, [2.5])
    assert found["speedup_resolution"] is None
    assert times_slower(found, "speedup") == "2.50 times slower (by round 2.50)"


def test_a_ratio_has_no_more_digits_than_its_rounds_agree_on(record: Make) -> None:
    ours = [[100.0]] * 3
    sharp = figures(rounds_of(record, gametalearn=ours, learn2learn=[[259], [261], [263]]), {})
    assert times_slower(sharp, "speedup") == "2.61 ± 0.02 times slower (by round 2.59, 2.61, 2.63)"
    blurred = figures(rounds_of(record, gametalearn=ours, learn2learn=[[210], [261], [290]]), {})
    assert times_slower(blurred, "speedup") == "2.6 ± 0.5 times slower (by round 2.1, 2.6, 2.9)"


def test_the_table_says_what_is_not_to_be_published(record: Make) -> None:
    about = {"config": "omniglot-5w1s", "threads": 1, "rounds": 3}
    quiet = about | figures(rounds_of(record), {})
    assert "not to be published" not in summary(quiet)
    assert unpublishable(quiet) == []
    busy = about | figures([{s: record(s, others_share=0.3) for s in SIDES}] * 3, {})
    assert "These figures are not to be published: others used up to 30%" in summary(busy)
    assert len(unpublishable(quiet, busy, busy)) == len(unpublishable(busy))
