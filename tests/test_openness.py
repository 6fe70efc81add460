"""Parts of one's own: handed in, by name, by entry point; and what a run's files may not import."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gametalearn
from gametalearn import (
    MAML,
    Disagreement,
    GradientAgreement,
    InputError,
    MixedSource,
    Sinusoid,
    TaskBatch,
    TrainConfig,
    Weights,
    compare,
    evaluate,
    load_run,
    registry,
    train,
)
from gametalearn.cli import main
from gametalearn.jobs import _fingerprint
from gametalearn.provenance import same_run
from gametalearn.settings import read_toml

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = (
    "--dataset own_parts:Tables --model own_parts:Net --learner own_parts:SignDescent "
    "--loss own_parts:huber --score own_parts:within --inner-lr 0.05"
)
SMALL = "--iterations 4 --meta-batch 4 --validation-episodes 4 --validate-every 2 --quiet"


def loaded() -> Any:
    spec = importlib.util.spec_from_file_location("own_parts", EXAMPLES / "own_parts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


own = loaded()


def config(**given: Any) -> TrainConfig:
    small: dict[str, Any] = {"iterations": 6, "meta_batch": 4, "validation_episodes": 4}
    small |= {"validate_every": 3, "log_every": 1, "checkpoint_every": 1, "threads": 1}
    return TrainConfig.of("sinusoid", **{**small, **given})


def parts(**changed: Any) -> dict[str, Any]:
    """What a run is made of, fresh."""
    given = {
        "model": own.Net, "source": own.Tables(), "validation": own.Tables(1, "val"),
        "learner": own.SignDescent(0.05, 2), "rule": own.Clipped(), "loss": own.huber,
        "score": own.within,
    }  # fmt: skip
    return {**given, **changed}


EVALUATED = {"model": own.Net, "learner": own.SignDescent(0.05, 2), "loss": own.huber,
             "score": own.within}  # fmt: skip


class Interrupting(own.Tables):  # type: ignore[misc,name-defined]
    """As a person who presses Ctrl-C in the fourth iteration."""

    drawn = 0

    def sample(self, num_tasks: int) -> Any:
        self.drawn += 1
        if self.drawn == 4:
            raise KeyboardInterrupt
        return super().sample(num_tasks)


Interrupting.__qualname__ = "Tables"


def test_a_run_of_own_parts_is_interrupted_goes_on_and_is_tested(tmp_path: Path) -> None:
    whole = train(config(), tmp_path / "whole", progress=False, **parts())
    with pytest.raises(KeyboardInterrupt):
        train(config(), tmp_path / "half", progress=False, **parts(source=Interrupting()))
    again = train(config(), tmp_path / "half", progress=False, **parts())
    assert all(torch.equal(p, again.meta[name]) for name, p in whole.meta.items())
    text = (tmp_path / "half" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= line["within"] <= 1 for line in lines)
    stated = read_toml(tmp_path / "half" / "config.toml")
    assert stated["model"] == "handed-in:Net"
    assert stated["dataset"] == "handed-in:Tables"
    run = load_run(tmp_path / "half", **EVALUATED)
    found = evaluate(
        run.model, own.Tables(2, "test"), run.test_learner, 8, loss=run.loss, score=run.score
    )
    assert found.metric == "within"
    with pytest.raises(InputError, match=r"the source of this run was handed in \(Tables\)"):
        run.source  # noqa: B018


@pytest.mark.parametrize("absent", ["model", "learner", "loss", "score"])
def test_a_part_that_was_handed_in_is_asked_for(tmp_path: Path, absent: str) -> None:
    train(config(iterations=1), tmp_path / "a", progress=False, **parts())
    given = {k: v for k, v in EVALUATED.items() if k != absent}
    with pytest.raises(InputError, match=rf"{absent}=.*; pass {absent}= as it was"):
        load_run(tmp_path / "a", **given)
    with pytest.raises(InputError, match=rf"{absent}=.*pass {absent}=|no default score fits"):
        train(
            config(iterations=1), tmp_path / "a", progress=False,
            **{k: v for k, v in parts().items() if k != absent},
        )  # fmt: skip


def test_a_source_needs_a_validation_and_a_test(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pass validation= too"):
        train(config(), progress=False, **parts(validation=None))
    with pytest.raises(InputError, match="pass test= too"):
        compare(config(), ["uniform"], source=own.Tables, validation=own.Tables)


def test_compare_of_own_parts(tmp_path: Path) -> None:
    made = {s: lambda seed, s=s: own.Tables(seed, s) for s in ("train", "val", "test")}
    more: Any = {"model": lambda seed: own.Net(), "source": made["train"], "test": made["test"]}
    more |= {"validation": made["val"], "learner": own.SignDescent(0.05, 2), "progress": False}
    more |= {"loss": own.huber, "score": own.within}
    rules: Any = {"uniform": "uniform", "mine": own.Clipped}
    found = compare(config(), rules, 2, 5, tmp_path / "a", **more)
    assert "test within %" in found.table()
    again = compare(config(), rules, 2, 5, tmp_path / "a", **more)  # nothing is trained
    assert again.as_dict() == found.as_dict()
    for rule in rules:  # each as by itself, with the weights of its seed
        with torch.random.fork_rng():
            torch.manual_seed(1)
            net = own.Net()
        alone = train(
            config(seed=1), progress=False, model=net, source=own.Tables(1, "train"),
            validation=own.Tables(1, "val"), learner=own.SignDescent(0.05, 2), loss=own.huber,
            score=own.within, rule=own.Clipped() if rule == "mine" else None,
        )  # fmt: skip
        stored = load_run(tmp_path / "a" / rule / "seed1", "latest", **EVALUATED)
        assert all(torch.equal(p, stored.meta[n]) for n, p in alone.meta.items())
    with pytest.raises(InputError, match="jobs=2: the rules cannot be sent to other processes"):
        compare(config(), rules, 2, 5, tmp_path / "b", jobs=2, **more)


def test_an_optimiser_with_groups_and_a_schedule_goes_on(tmp_path: Path) -> None:
    def adamw(named: Any) -> Any:
        first, *rest = [p for _, p in named]
        groups = [{"params": [first], "lr": 0.1}, {"params": rest, "weight_decay": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    def trained(place: str, **given: Any) -> Any:
        return train(
            config(checkpoint_every=1), tmp_path / place, progress=False, optimizer=adamw,
            **parts(**given),
        )  # fmt: skip

    whole = trained("whole")
    assert [g["lr"] for g in whole.outer.optimizer.param_groups] == pytest.approx([0.0125, 0.00125])
    with pytest.raises(KeyboardInterrupt):
        trained("half", source=Interrupting())
    assert all(torch.equal(p, trained("half").meta[n]) for n, p in whole.meta.items())
    # by hand
    gml, net = gametalearn, own.Net()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = own.Net()
    optimizer, scheduler = adamw(list(net.named_parameters()))
    source, learner, rule = own.Tables(), own.SignDescent(0.05, 2), own.Clipped()
    for _ in range(6):
        found = gml.meta_gradients(net, source.sample(4), learner, loss=own.huber, score="mae")
        update = rule(found).effective @ found.rows
        sizes = [p.numel() for p in net.parameters()]
        for p, g in zip(net.parameters(), update.split(sizes), strict=True):
            p.grad = g.view_as(p)
        optimizer.step()
        scheduler.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, whole.meta[name])


# ---------------------------------------------------------------------------------------------
# by name


def test_the_command_line_takes_them_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLES)
    words = [*NAMES.split(), *SMALL.split()]
    out = str(tmp_path / "a")
    assert main(["train", *words, "--rule", "own_parts:Clipped", "--out", out]) == 0
    assert "best validation within" in capsys.readouterr().out
    # what stands in a run's files is not imported unasked
    for command in (["evaluate", out, "--episodes", "4"], ["train", "--resume", out]):
        assert main([*command, "--quiet"]) == 2
        assert "own_parts:Net, code that loading a run does not import" in capsys.readouterr().err
        assert main([*command, "--quiet", "--trust"]) == 0
    repeated = NAMES.split()[:-2]
    assert main(["evaluate", out, "--episodes", "4", "--quiet", *repeated]) == 0
    assert (
        main(["train", "--resume", out, "--quiet", *repeated, "--rule", "own_parts:Clipped"]) == 0
    )
    rules = ["--rules", "uniform,own_parts:Clipped", "--seeds", "1", "--episodes", "3"]
    assert main(["compare", *words, *rules, "--out", str(tmp_path / "b"), "--jobs", "2"]) == 0
    assert "own_parts:Clipped" in capsys.readouterr().out


def test_loading_a_run_imports_nothing_that_its_files_name(tmp_path: Path) -> None:
    """Not by evaluating it either: that needs no rule."""
    (tmp_path / "evil_part.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nRule = Net = None"
    )
    out = tmp_path / "a"
    train(config(iterations=1), out, progress=False)
    text = (out / "config.toml").read_text()
    for setting, before in (("rule", "uniform"), ("model", "mlp"), ("dataset", "sinusoid")):
        changed = text.replace(f'{setting} = "{before}"', f'{setting} = "evil_part:Rule"')
        assert changed != text
        (out / "config.toml").write_text(changed)
        words = ["evaluate", str(out), "--episodes", "2", "--quiet"]
        done = subprocess.run(
            [sys.executable, "-m", "gametalearn", *words], cwd=tmp_path, check=False,
            env={"PYTHONPATH": str(Path(gametalearn.__file__).parents[1]), "PATH": ""},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == (0 if setting == "rule" else 2), done.stderr
        assert not (tmp_path / "ran").exists()
        with pytest.raises(InputError, match="code that loading a run does not import"):
            registry.refuse_untrusted(read_toml(out / "config.toml"), registry.KINDS, {}, out)


class Gives(nn.Module):
    """A rule that gives what it was made with."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, gradients: Any) -> Any:
        return self.given


def test_a_rule_may_give_one_tensor_in_any_precision() -> None:
    weights = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    both = Weights(weights.float(), weights.float())
    for given in (weights, weights.float(), Weights(weights, weights)):
        runs = [train(config(), rule=Gives(one), progress=False) for one in (given, both)]
        for one, other in zip(*(run.meta.values() for run in runs), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Gives(None),
            r"rule Gives: expected weights of shape \(4,\), got NoneType; return them as a",
        ),
        (Gives(torch.ones(3)), r"expected weights of shape \(4,\), got \(3,\)"),
        (Gives(Weights(torch.ones(2), torch.ones(5))), r"weights of shape \(4,\), got \(5,\)"),
        (GradientAgreement, r"`rule` must be a rule; got the class GradientAgreement; make one"),
        (3, "`rule` must be a rule; got a int"),
    ],
)
def test_what_is_no_rule_is_said_in_one_line(rule: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(config(), rule=rule, progress=False)


@pytest.mark.parametrize("rule", ["os:getcwd", "builtins:object"])
def test_a_name_that_makes_no_rule_is_said_in_one_line(rule: str) -> None:
    with pytest.raises(InputError, match=f"rule '{rule}' makes a .*; name a class or a function"):
        train(config(rule=rule), progress=False)


def test_an_option_may_make_a_rule_compare_inner_updates() -> None:
    options = {"agreement": {"signal": "update"}}
    with pytest.raises(
        InputError, match="rule 'agreement' compares inner updates, and with 0 inner"
    ):
        train(config(rule="agreement", rule_options=options, inner_steps=0), progress=False)


PLUGIN = """
import torch
from gametalearn import Weights

class First(torch.nn.Module):
    def __init__(self, share: float = 1.0):
        super().__init__()
        self.share = share

    def forward(self, gradients):
        weights = torch.zeros_like(gradients.loss)
        weights[0] = self.share
        return Weights(raw=weights, effective=weights)
"""


def installed(folder: Path, package: str, entries: str, code: str = PLUGIN) -> None:
    """A distribution as pip would leave it."""
    (folder / f"{package}.py").write_text(code)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    registry._entries.cache_clear()
    yield folder
    registry._entries.cache_clear()


def test_an_installed_package_registers_a_rule(
    plugins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(plugins, "plug_one", "[gametalearn.rules]\nfirst-task = plug_one:First\n")
    assert main(["train", "--help"]) == 0
    assert "first-task" in capsys.readouterr().out
    out = tmp_path / "run"
    words = ["--dataset", "sinusoid", *SMALL.split(), "--rule", "first-task"]
    more = ["--rule-options", "first-task.share=0.5"]
    assert main(["train", *words, *more, "--out", str(out)]) == 0
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["effective"] == [0.5, 0, 0, 0]
    assert main(["train", "--resume", str(out), "--quiet"]) == 0  # it needs no --trust
    assert main(["train", *words, "--rule-options", "first-task.share=x", "--out", "x"]) == 2
    assert "share must be a number, got 'x'" in capsys.readouterr().err


def test_plugins_that_collide_or_fail_are_named_and_break_nothing_else(
    plugins: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = "[gametalearn.rules]\nfirst-task = plug_{0}:First\nuniform = plug_{0}:First\n"
    for name in ("one", "two"):
        installed(plugins, f"plug_{name}", entries.format(name))
    installed(
        plugins,
        "plug_bad",
        "[gametalearn.rules]\nbad = plug_bad:First\n",
        "raise OSError('no disk')",
    )
    assert main(["train", "--help"]) == 0
    assert "bad" in capsys.readouterr().out
    with pytest.raises(
        InputError, match=r"'first-task' is registered by plug_\w+ .* and plug_\w+ "
    ):
        gametalearn.make_rule("first-task")
    with pytest.raises(InputError, match=r"plug_bad:First cannot be imported \(OSError: no disk\)"):
        gametalearn.make_rule("bad")
    with pytest.warns(UserWarning, match=r"'uniform' is built in; .*plug_\w+ .* and plug_\w+ "):
        assert isinstance(gametalearn.make_rule("uniform"), gametalearn.Uniform)
    assert isinstance(gametalearn.make_rule("agreement"), gametalearn.GradientAgreement)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("rule", "agreemnt", "unknown rule 'agreemnt'; did you mean 'agreement'"),
        ("model", "no_such_module:Net", "model 'no_such_module:Net': no module no_such_module"),
        ("dataset", "math:nothing", "math:nothing cannot be imported"),
        ("learner", "math:pi", "math:pi is a float; name a class or a function"),
    ],
)
def test_names_that_lead_nowhere(kind: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        registry.resolve(kind, name)


def test_a_part_is_called_with_what_it_names() -> None:
    offered = {"ways": 5, "input_shape": (1, 28, 28)}
    assert registry.call("model", "x", lambda ways: ways, offered) == 5
    assert registry.call("model", "x", lambda: "nothing", offered) == "nothing"
    assert registry.call("model", "x", lambda *, input_shape, depth=2: depth, offered) == 2
    with pytest.raises(InputError, match="needs an argument 'depth', which is not offered"):
        registry.call("model", "x", lambda ways, depth: ways, offered)
    with pytest.raises(
        InputError, match=r"takes images .* have the shape \(4,\); take `model` mlp"
    ):
        gametalearn.train(
            TrainConfig.of("glyphs", iterations=1), source=own.Tables(),
            validation=own.Tables(), progress=False,
        )  # fmt: skip


def test_a_source_need_not_know_of_parts() -> None:
    from gametalearn.episodes import draw, input_shape_of

    assert input_shape_of(own.Tables()) == (4,)
    whole = own.Tables().sample(5)
    assert torch.equal(draw(own.Tables(), 5, slice(1, 3)).query_y, whole.query_y[1:3])
    assert len(draw(own.Tables(), 5, slice(0, 0))) == 0
    assert isinstance(own.Net(), nn.Module)


@pytest.mark.parametrize("part", ["model", "source", "learner", "rule", "loss", "optimizer"])
def test_a_name_where_a_part_is_handed_in_is_refused(part: str) -> None:
    handed: Any = {part: "reptile"}
    with pytest.raises(InputError, match=rf"{part}='reptile' is a name, .*TrainConfig.of\(..., "):
        train(TrainConfig.of("sinusoid", iterations=1), progress=False, **handed)


class Tens(own.Tables):  # type: ignore[misc,name-defined]
    """10-way 5-shot episodes with 3 queries per class, of which nothing tells but the episodes."""

    def sample(self, num_tasks: int) -> Any:
        x = torch.randn(num_tasks, 80, 2)
        y = torch.arange(10).repeat(8).expand(num_tasks, 80)
        return TaskBatch(x[:, :50], y[:, :50], x[:, 50:], y[:, 50:])

    def with_seed(self, seed: int) -> Any:
        return Tens()


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (Tens(), (10, 5, 3)),
        (MixedSource([Tens(), Tens()]), (10, 5, 3)),
        (Disagreement(MixedSource([Tens(), Tens()]), 0.2), (10, 5, 3)),
        (Sinusoid(7, 4), (1, 7, 4)),
    ],
)
def test_what_was_handed_in_is_recorded_as_it_is(source: Any, wanted: tuple[int, ...]) -> None:
    ways, shots, queries = wanted
    inputs = 1 if ways == 1 else 2

    def model(seed: int) -> Any:
        return torch.nn.Linear(inputs, ways)

    given = TrainConfig.of(iterations=1, meta_batch=4, validation_episodes=4, inner_lr=0.01)
    found = compare(given, ["uniform"], 1, 4, model=model, source=lambda s: source.with_seed(s),
                    validation=lambda s: source.with_seed(9), test=lambda s: source.with_seed(8),
                    progress=False)  # fmt: skip
    told = found.as_dict()
    assert (told["ways"], told["shots"], told["queries"]) == (
        None if ways == 1 else ways,
        shots,
        queries,
    )
    what = "regression 7-shot" if ways == 1 else "10-way 5-shot"
    assert what in found.table().splitlines()[0]


def test_a_learner_that_is_handed_in_is_tested_with_its_own_steps() -> None:
    """The settings' default goes with the data set's own learner; another number is another wish."""
    made: dict[str, Any] = {"progress": False, "learner": MAML(0.05, 5)}
    given: dict[str, Any] = {
        "iterations": 1,
        "meta_batch": 2,
        "validation_episodes": 2,
        "hidden": 4,
    }
    run = train(TrainConfig.of("glyphs", **given), **made)
    assert run.test_learner.steps == run.config.test_steps == 5
    run = train(TrainConfig.of("glyphs", **given, test_steps=7), **made)
    assert run.test_learner.steps == 7
    assert train(TrainConfig.of("glyphs", **given), progress=False).test_learner.steps == 3


class Labels(Tens):
    """Labels that are not 0 to ways - 1: of which classes an episode has, nothing tells how many there are."""

    period = 0.5  # an attribute of its own, which means nothing to the library

    def __init__(self, *labels: int) -> None:
        super().__init__()
        self.labels = labels

    def sample(self, num_tasks: int) -> Any:
        x, y = torch.randn(num_tasks, 6, 2), torch.tensor(self.labels).expand(num_tasks, 6)
        return TaskBatch(x, y, x, y)

    def with_seed(self, seed: int) -> Any:
        return Labels(*self.labels)


@pytest.mark.parametrize(
    "labels", [(2, 2, 5, 5, 7, 7), (1, 1, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0), (0, 1, 1, 0, 1, 1)]
)
def test_ways_are_those_of_the_settings_where_an_episode_does_not_show_them(labels: Any) -> None:
    given = TrainConfig.of(ways=10, queries=4, iterations=1, meta_batch=2, validation_episodes=2)
    run = train(given, model=torch.nn.Linear(2, 10), source=Labels(*labels),
                validation=Labels(*labels), progress=False)  # fmt: skip
    assert (run.config.ways, run.config.shots, run.config.queries) == (10, 1, 4)


def test_older_runs_of_handed_in_parts_go_on() -> None:
    """They have the settings' ways, shots, queries and test steps, which now are those of the parts."""
    now = TrainConfig(
        dataset="handed-in:Own", learner="handed-in:Mine", ways=10, shots=5, test_steps=7
    )
    before = {**now.as_dict(), "ways": 5, "shots": 1, "test_steps": 3}
    assert same_run(before, now)
    assert not same_run({**before, "iterations": 7, "hidden": 8}, now)
    for part, name in (("dataset", "omniglot"), ("learner", "maml")):
        changed: dict[str, Any] = {part: name}
        built_in = dataclasses.replace(now, **changed)
        assert not same_run({**before, part: name}, built_in)


class Sometimes(Tens):
    """Three groups without names, of which a meta-batch has two."""

    def sample(self, num_tasks: int) -> Any:
        batch = super().sample(num_tasks)
        self.turn = getattr(self, "turn", -1) + 1
        return dataclasses.replace(
            batch, group=torch.tensor([1, 0, 2][self.turn % 3 :][:1] * num_tasks)
        )


def test_groups_without_names_are_called_by_their_numbers(tmp_path: Path) -> None:
    given = TrainConfig.of(iterations=6, meta_batch=2, validation_episodes=2, log_every=1)
    train(given, tmp_path / "a", model=torch.nn.Linear(2, 10), source=Sometimes(), validation=Tens(),
          progress=False)  # fmt: skip
    lines = [
        json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [list(line["objectives"]) for line in lines] == [[f"group {k}"] for k in (1, 0, 2)] * 2


def test_a_fingerprint_of_a_mixture_is_of_all_its_sources() -> None:
    config = TrainConfig.of("sinusoid")
    first, one, other = Sinusoid(7, 4), Sinusoid(7, 4), Sinusoid(7, 4)
    other.with_seed = lambda seed: Sinusoid(7, 4, seed + 1)  # type: ignore[method-assign]
    found = [_fingerprint(MixedSource([first, second]), config) for second in (one, other)]
    assert found[0] != found[1]
    assert found[0] == _fingerprint(MixedSource([first, one]), config)
