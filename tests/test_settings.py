"""A setting is described once: flags, files, checks, help and the table come from its field."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gametalearn import InputError, TrainConfig
from gametalearn.config import OUTER, default_text
from gametalearn.flags import add_settings
from gametalearn.settings import check, setting, settings_of, table, text_of

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Longer(TrainConfig):
    """With one setting more."""

    warmup: int = setting(
        5, "iterations of warm-up; 0 is none", OUTER, least=0, most=99, learners=("maml",), before=0
    )


def test_a_new_setting_touches_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="x")
    add_settings(parser, (OUTER,), config=Longer)
    assert parser.parse_args(["--warmup", "7"]).warmup == 7
    assert parser.parse_args([]).warmup is None
    shown = " ".join(parser.format_help().split())
    assert "Iterations of warm-up; 0 is none (maml). Default: 5." in shown
    for value, message in ((-1, "at least 0, got -1"), (100, "at most 99"), ("x", "an integer")):
        with pytest.raises(InputError, match=f"`warmup` must be {message}"):
            Longer(warmup=value)  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match="`warmup` is an option of maml; got it with `learner` anil"
    ):
        Longer.of("glyphs", learner="anil", warmup=1)
    texts = {name: default_text(field) for name, field in settings_of(Longer).items()}
    assert "| `warmup` | 5 | Iterations of warm-up; 0 is none (maml). |" in table(Longer, texts)


def test_a_setting_that_an_older_run_lacks_is_what_it_was_then() -> None:
    older = TrainConfig.of("glyphs").as_dict()
    assert Longer.from_dict(older, "config.toml").warmup == 0  # and not 5
    assert Longer.of("glyphs").warmup == 5
    with pytest.raises(InputError, match=r"config.toml: settings of another version \('warmup'"):
        TrainConfig.from_dict(Longer.of("glyphs").as_dict(), "config.toml")


def test_every_setting_is_fit_to_be_shown() -> None:
    for name, field in settings_of(TrainConfig).items():
        text = text_of(field)
        assert text[0].islower() or text.startswith(("CPU", "1")), name
        assert not text.endswith("."), name
        assert "{" not in text, name
        if name != "rule_options":
            check(field, field.default)
        meta: Any = field.metadata
        assert field.default in meta["choices"] or not meta["choices"], name


def test_the_table_of_settings_is_current() -> None:
    """Made of `gametalearn.settings.table`."""
    texts = {name: default_text(field) for name, field in settings_of(TrainConfig).items()}
    assert table(TrainConfig, texts) in (ROOT / "docs" / "settings.md").read_text()


def test_settings_of_the_data_sets_are_settings() -> None:
    from gametalearn.config import DEFAULTS

    for dataset, values in DEFAULTS.items():
        config = TrainConfig.of(dataset)
        assert {k: getattr(config, k) for k in values} == values
        assert dataclasses.replace(config) == config
