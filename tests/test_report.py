"""Pictures and ``report.html``: what stands there, and that nothing in it is more than text."""

from __future__ import annotations

import collections
import dataclasses
import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gametalearn
from gametalearn.canvas import COLOURS
from gametalearn.cautions import AFTER_A_LOOK, cautions
from gametalearn.cli import main
from gametalearn.config import TrainConfig
from gametalearn.evaluation import Evaluation
from gametalearn.figures import weights
from gametalearn.logs import Record, Records
from gametalearn.report import _settings, html_of
from gametalearn.results import Comparison, Result
from gametalearn.statistics import over_seeds

HOSTILE = '<script>alert("$x_1$")</script>&amp;'


def results(
    *others: str, seeds: int = 5, best: int = 40, level: float = 0.0, **more: Any
) -> dict[str, Any]:
    """A comparison of uniform and others, in which ``agreement`` is behind."""
    generator = np.random.default_rng(0)
    found = {}
    for rule in ("uniform", *others):
        shift = {"agreement": -0.05, "uniform": 0.0}.get(rule, level)
        found[rule] = [
            Result(
                Evaluation(
                    0.7 + shift + 0.01 * generator.random(20), np.zeros(20, dtype=np.int64),
                    "accuracy", "transductive", seed,
                ),
                12.0, best,
            )
            for seed in range(seeds)
        ]  # fmt: skip
    config = TrainConfig.of("glyphs", threads=1, iterations=100, meta_lr=0.001)
    return Comparison(config, tuple(range(seeds)), 20, ("glyphs",), found, **more).as_dict()


def records(found: dict[str, Any], skipped: int = 0, diverged: bool = False) -> Records:
    generator = np.random.default_rng(0)
    return {
        rule: [
            [
                Record(
                    i,
                    np.full(4, 0.25) if rule == "uniform" else generator.normal(0.25, 0.2, 4),
                    (np.nan if diverged and i == 50 else 0.5) if i % 10 == 0 else None,
                    skipped,
                )
                for i in range(1, 101)
            ]
            for _ in entry["seeds"]
        ]
        for rule, entry in found["rules"].items()
    }


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: collections.Counter[str] = collections.Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


def page(found: dict[str, Any], **more: Any) -> Page:
    return Page(html_of(found, more.pop("records", records(found)), [], Path("runs/a"), **more))


def test_a_report_has_what_a_reader_wants() -> None:
    found = results("agreement", "norm-control", command="gametalearn compare --seeds 5")
    read = page(found)
    assert read.open == []
    assert read.tags["svg"] == 5  # accuracy, differences, curves, two rules' weights
    assert "agreement is behind uniform by 5." in read.text
    assert "behind on 5 of 5 seeds." in read.text
    assert read.tags["h1"] == read.tags["main"] == 1
    assert "gametalearn compare --seeds 5" in read.text
    again = "gametalearn compare --dataset glyphs --iterations 100 --meta-lr 0.001 --threads 1 "
    again += "--rules uniform,agreement,norm-control --seeds 5 --episodes 20 --out runs/a"
    assert again in read.text
    assert read.text.count("gametalearn train --dataset glyphs") == 15
    changed = read.values("class").count("changed")
    assert changed == len({"iterations", "meta_lr", "threads"})


def test_every_picture_is_told_in_words_and_has_ids_of_its_own() -> None:
    read = page(results("agreement", "norm-control"))
    ids = read.values("id")
    assert len(ids) == len(set(ids))
    labelled = [v for tag, name, v in read.attributes if (tag, name) == ("svg", "aria-labelledby")]
    assert len(labelled) == 5
    assert set(labelled) <= set(ids)
    for attribute in ("href", "xlink:href", "clip-path"):
        for value in read.values(attribute):
            assert value.strip("url()#") in ids


def test_nothing_is_fetched_and_names_are_text() -> None:
    found = results("agreement", HOSTILE)
    found["dataset"] = found["config"]["dataset"] = f"folder:/{HOSTILE}"
    text = html_of(found, records(found), [3], Path(HOSTILE), missing=HOSTILE)
    read = Page(text)
    assert not read.tags["script"] + read.tags["img"] + read.tags["link"] + read.tags["iframe"]
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    assert not re.search(r'(src|href|action)="(?!#)', text)
    assert not re.search(r"@import|url\((?!#)", text)
    assert HOSTILE in read.text
    assert html.escape(HOSTILE) not in read.text  # not escaped twice
    assert "default-src 'none'" in text


def test_without_metrics_and_with_one_rule(tmp_path: Path) -> None:
    read = page(results("agreement"), records=None, missing="There are no curves.")
    assert read.tags["svg"] == 2
    assert "There are no curves." in read.text
    read = page(results(seeds=1))
    assert read.tags["svg"] == 2
    assert "1 seed is too few" in read.text
    assert main(["report", str(tmp_path)]) == 2


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrasts() -> None:
    """WCAG: 4.5 to 1 for text on each of the page's grounds, 3 to 1 for what a plot is made of."""
    template = (Path(gametalearn.__file__).parent / "report.html.jinja").read_text()
    grounds = {
        c if len(c) == 7 else "#" + "".join(2 * x for x in c[1:])
        for c in re.findall(r"background: (#\w+)", template)
    }
    texts = set(re.findall(r"[ ;]color: (#\w+)", template))
    assert len(grounds) == 3
    assert len(texts) == 2
    assert all(contrast(text, ground) >= 4.5 for text in texts for ground in grounds)
    assert all(contrast(colour, "#ffffff") >= 3 for colour in COLOURS)


def test_the_share_of_negative_weights_is_drawn_where_there_are_any() -> None:
    def height(*values: float) -> float:
        runs = [[Record(i, np.array(values), None) for i in (1, 10, 20)]]
        return float(weights(results(), "uniform", runs).get_figheight())

    assert height(0.2, 0.8) < height(-0.2, 1.2)


# ---------------------------------------------------------------------------------------------
# cautions


def said(found: dict[str, Any], *more: Any) -> str:
    return "\n".join(cautions(found, *more))


def test_a_rule_that_never_did_otherwise_than_uniform_is_told() -> None:
    found = results("agreement", "dwa")
    logged = records(found)
    assert "weighted the tasks as uniform does" not in said(found, logged)
    text = said(found, {**logged, "dwa": logged["uniform"]})
    assert "dwa weighted the tasks as uniform does: this comparison says nothing about it." in text
    assert "dwa begins after two of its periods" in text


def test_settings_that_follow_from_others_are_not_marked_as_changed() -> None:
    given = {"iterations": 30, "share": "glyphs=3,omniglot=5", "inner_lr": 0.5}
    config = TrainConfig.of("glyphs+omniglot", **given)
    assert (config.validate_every, config.meta_batch) == (3, 8)
    changed = {line["cells"][0] for line in _settings(config.as_dict()) if line["changed"]}
    assert changed == {"dataset", "iterations", "share", "inner-lr"}
    other = dataclasses.replace(config, validate_every=5)
    changed = {line["cells"][0] for line in _settings(other.as_dict()) if line["changed"]}
    assert "validate-every" in changed


def test_cautions_come_from_the_data() -> None:
    plain = said(results("agreement", "norm-control"))
    assert "one split into training, validation and test classes" in plain
    assert "transductive" in plain
    for word in ("few", "Not converged", "norm-control among", "Wide", "left out", "looked"):
        assert word not in plain
    assert "3 seeds are few" in said(results("agreement", seeds=3))
    assert "2 seeds are too few" in said(results("agreement", seeds=2))
    assert "agreement changes the length" in said(results("agreement"))
    late = said(results("agreement", best=100))
    assert "at iteration 100, for uniform on 5 of 5, agreement on 5 of 5 seeds" in late
    found = results("agreement")
    text = said(found, records(found, skipped=3, diverged=True))
    assert "left out because they were not finite: uniform 15, agreement 15." in text
    assert "Validations that were not finite and were skipped: uniform 5" in text
    assert "agreement was named as primary" in said(results("agreement", primary=("agreement",)))
    assert "older version" in said({**found, "environment": {}})


def test_a_wide_interval_and_equal_differences() -> None:
    found = results("other")
    pair = found["paired"][0]
    pair.update(difference=0.001, ci95=[-0.01, 0.012], p_value=0.8, p_holm=0.8)
    assert "Wide intervals: other from -1.00 to +1.20 points." in said(found)
    pair.update(difference=0.01, ci95=[0.01, 0.01], p_value=None, p_holm=None)
    assert "other differs from uniform by the same amount on every seed" in said(found)


def test_a_look_before_the_last_seeds_is_told_with_what_it_costs() -> None:
    found = results("agreement")
    assert "Results of 3 seeds were written before there were 5." in said(found, None, [3])
    assert f"in {AFTER_A_LOOK}% of comparisons" in said(found, None, [3])
    values = np.random.default_rng(0).normal(size=(4000, 5))
    shown = [
        (over_seeds(v[:3]).p_value or 0) < 0.05 or (over_seeds(v).p_value or 0) < 0.05
        for v in values
    ]
    assert 100 * np.mean(shown) == pytest.approx(AFTER_A_LOOK, abs=1.0)
