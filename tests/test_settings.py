"""A setting is described once: flags, files, checks, help and the table come from its field."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gametalearn import InputError, TrainConfig, load_run, registry, train
from gametalearn.cli import main
from gametalearn.config import BESIDE, DEFAULTS, OUTER, RESUMABLE, TOGETHER, default_text
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
    assert "Iterations of warm-up; 0 is none. Only for maml. Default: 5." in shown
    for value, message in ((-1, "at least 0, got -1"), (100, "at most 99"), ("x", "an integer")):
        with pytest.raises(InputError, match=f"`warmup` must be {message}"):
            Longer(warmup=value)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="`warmup` applies to maml, not to `learner` anil"):
        Longer.of("glyphs", learner="anil", warmup=1)
    texts = {name: default_text(field) for name, field in settings_of(Longer).items()}
    assert "| `warmup` | 5 | Iterations of warm-up; 0 is none. Only for maml. |" in table(
        Longer, texts
    )


def test_a_setting_that_an_older_run_lacks_is_what_it_was_then() -> None:
    older = TrainConfig.of("glyphs").as_dict()
    assert Longer.from_dict(older, "config.toml").warmup == 0  # and not 5
    assert Longer.of("glyphs").warmup == 5
    with pytest.raises(InputError, match=r"written by another version; .* no setting 'warmup'"):
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
    page = (ROOT / "docs" / "settings.md").read_text()
    assert table(TrainConfig, texts) in page
    *most, last = (f"`{name}`" for name in RESUMABLE)
    assert f"When a run continues, {', '.join(most)} and {last} may" in " ".join(page.split())


def test_settings_of_the_data_sets_are_settings() -> None:
    for dataset, values in DEFAULTS.items():
        config = TrainConfig.of("omniglot+mini-imagenet" if dataset == BESIDE else dataset)
        assert {k: getattr(config, k) for k in values} == values
        assert dataclasses.replace(config) == config


def test_data_sets_of_which_one_has_photographs_have_defaults_of_their_own(tmp_path: Path) -> None:
    own = DEFAULTS[BESIDE]
    both = TrainConfig.of("omniglot+mini-imagenet")
    assert both.brought_to == (own["image_size"], own["channels"]) != TOGETHER
    assert both.rotations
    for dataset in (
        "mini-imagenet+omniglot",
        f"glyphs+{tmp_path}",
        f"mini-imagenet+folder:{tmp_path}",
    ):
        config = TrainConfig.of(dataset)
        assert {k: getattr(config, k) for k in own} == own
        assert config.rotations == ("omniglot" in dataset)
    for dataset in ("glyphs+omniglot", "json:loads+json:dumps", "mini-imagenet+json:loads"):
        config = TrainConfig.of(dataset)  # as the first of them
        assert config.brought_to == TOGETHER
        assert not config.learned_rates
    older = {**both.as_dict(), "image_size": 0, "channels": 0}
    assert TrainConfig.from_dict(older, "config.toml").brought_to == TOGETHER

    for learner in ("reptile", "anil", "protonet"):  # which have no rates to learn
        assert not TrainConfig.of("omniglot+mini-imagenet", learner=learner).learned_rates
        with pytest.raises(InputError, match="`learned_rates` applies to maml, fomaml"):
            TrainConfig.of("omniglot+mini-imagenet", learner=learner, learned_rates=True)
    assert TrainConfig.of("omniglot+mini-imagenet", learner="fomaml").learned_rates
    given = {"image_size": 28, "channels": 1, "rotations": False, "learned_rates": False}
    config = TrainConfig.of("omniglot+mini-imagenet", **given)
    assert {k: getattr(config, k) for k in given} == given


# ---------------------------------------------------------------------------------------------
# what a setting is for

UNUSED: list[tuple[str, str]] = [
    ("--model resnet12 --hidden 16", "--hidden applies to conv4, mlp, not to --model"),
    ("--model resnet12 --pool max", "--pool applies to conv4, not to --model resnet12"),
    ("--model mlp --norm group", "--norm applies to conv4, resnet12, not to --model mlp"),
    ("--multi-step-loss 100", "--multi-step-loss applies to --inner-steps above 1, not to"),
    ("--rotations", "--rotations applies to omniglot, not to --dataset glyphs"),
    (
        "--shared head",
        "--shared applies to gradnorm, not to --rule uniform; leave it out",
    ),
    ("--rule dwa --shared head", "--shared applies to gradnorm, not to --rule dwa"),
    ("--rule torchjd:UPGrad --within agreement", "not to --rule torchjd:UPGrad; leave it out"),
    ("--rule agreement --within agreement", "--within applies to gradnorm, uncertainty,"),
    ("--share proportional", "--share applies to several data sets, not to --dataset"),
    ("--disagree-kind permuted", "--disagree-kind applies to --disagree above 0, not to"),
    ("--dataset sinusoid --objectives group", "--objectives applies to glyphs, omniglot,"),
    ("--dataset sinusoid --image-size 32", "--image-size applies to glyphs, omniglot,"),
    ("--dataset sinusoid --channels 3", "--channels applies to glyphs, omniglot,"),
    ("--meta-optimizer my:lion --meta-schedule linear", "--meta-schedule applies to adam,"),
    ("--learner anil --learned-rates", "--learned-rates applies to maml, fomaml, not to"),
    ("--meta-schedule constant --meta-lr-final 0.1", "--meta-lr-final applies to"),
]


@pytest.mark.parametrize(("flags", "message"), UNUSED, ids=[flags for flags, _ in UNUSED])
def test_an_option_without_effect_is_refused(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags.split(), "--out", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_options_that_have_an_effect_pass() -> None:
    """Parts of one's own may read any setting; a value that is the default says nothing."""
    TrainConfig.of("glyphs", model="my:Net", hidden=16, norm="group", pool="max")
    TrainConfig.of("my:Tables", image_size=32, objectives="group", rotations=True)
    TrainConfig.of("omniglot+mini-imagenet", share="proportional", rotations=False, image_size=32)
    TrainConfig.of("mini-imagenet+omniglot", rotations=True)
    TrainConfig.of("folder:/birds", image_size=32, objectives="group")
    TrainConfig.of("glyphs", rule="my:Rule", within="agreement", shared="head")
    TrainConfig.of("glyphs", rule="gradnorm", within="agreement", shared="head")
    TrainConfig.of(
        "glyphs", inner_steps=2, multi_step_loss=9, disagree=0.5, disagree_kind="permuted"
    )
    for config in (TrainConfig.of("glyphs", model="resnet12"), TrainConfig.of("sinusoid")):
        assert TrainConfig.of(**config.as_dict()) == config  # as --config RUN/config.toml gives it


def test_what_settings_are_for_is_what_reads_them() -> None:
    """Against the arguments that the built-in parts name."""
    fields, needs = settings_of(TrainConfig), dict[str, Any]()
    for name, field in fields.items():
        needs[name] = field.metadata["needs"]
    rules = {rule: registry.resolve("rule", rule)[0] for rule in registry.BUILT_IN["rule"]}
    assert set(needs["within"]["rule"]) == {
        r for r, p in rules.items() if registry.takes(p, "within")
    }
    assert set(needs["shared"]["rule"]) == {
        r for r, p in rules.items() if registry.takes(p, "columns")
    }
    models = {name: registry.resolve("model", name)[0] for name in registry.BUILT_IN["model"]}
    for name in ("hidden", "pool", "norm"):
        takers = {m for m, part in models.items() if registry.takes(part, name)}
        own = {"mlp"} if name == "hidden" else set()  # `build.mlp` reads it from the settings
        assert set(needs[name]["model"]) == takers | own
    for name, need in needs.items():
        for other, values in need.items():
            assert other in fields, name
            for value in values if isinstance(values, tuple) else ():
                known = [*registry.BUILT_IN.get(other, ()), *fields[other].metadata["choices"]]
                assert value in [*known, "folder"], name


def test_a_comparison_takes_what_one_of_its_rules_is_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "compare",
        "--dataset",
        "sinusoid",
        "--within",
        "agreement",
        "--plan",
        "--seeds",
        "1",
        "--threads",
        "1",
    ]
    words += ["--out", str(tmp_path / "a"), "--rules"]
    assert main([*words, "uniform,dwa"]) == 0
    uniform, dwa = capsys.readouterr().out.splitlines()
    assert "--within" not in uniform
    assert "--within agreement" in dwa
    assert main([*words, "uniform,agreement"]) == 2
    assert "not to --rules uniform, agreement; leave it out" in capsys.readouterr().err


def test_an_older_run_that_took_an_option_without_effect_goes_on(tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "iterations": 2,
        "meta_batch": 2,
        "hidden": 4,
        "validation_episodes": 2,
    }
    config = TrainConfig.of("sinusoid", **small)
    older = dataclasses.replace(config, within="agreement", pool="max", rotations=True)
    train(older, tmp_path / "a", progress=False)
    assert load_run(tmp_path / "a").config == older
    assert train(older, tmp_path / "a", progress=False).iteration == 2
    assert main(["train", "--resume", str(tmp_path / "a"), "--quiet"]) == 0
    assert train(config, tmp_path / "a", progress=False).config == config  # they are the same run
    with pytest.raises(InputError, match=r"other settings \(shots 10, not 3\)"):
        train(dataclasses.replace(older, shots=3), tmp_path / "a", progress=False)


@pytest.mark.parametrize(
    "dataset", ["glyphs", "omniglot+mini-imagenet", "folder:/birds", "./birds"]
)
def test_what_images_need_is_said_at_once(dataset: str) -> None:
    """Not first that it must be at least 1, and then that it must be at least 2."""
    for ways in (-1, 0, 1):
        with pytest.raises(InputError, match=f"`ways` must be at least 2, got {ways}"):
            TrainConfig.of(dataset, ways=ways)
    for channels in (-1, 2, 4):
        with pytest.raises(InputError, match=f"must be 1, 3, or 0 .* own; got {channels}"):
            TrainConfig.of(dataset, channels=channels)


def test_other_data_may_have_one_way_and_any_channels() -> None:
    assert TrainConfig.of("sinusoid").ways == 1
    assert TrainConfig.of("mine:Tables", ways=1, channels=5).channels == 5
    with pytest.raises(InputError, match="`ways` must be at least 1, got 0"):
        TrainConfig.of("mine:Tables", ways=0)
    with pytest.raises(
        InputError,
        match="needs `model` mlp and `ways` 1, which are its defaults; got model mlp and ways 2",
    ):
        TrainConfig(dataset="sinusoid", model="mlp", ways=2)
