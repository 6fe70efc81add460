from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gametalearn import (
    MAML,
    ClassImages,
    EpisodeSampler,
    InputError,
    MixedSource,
    TaskBatch,
    TrainConfig,
    evaluate,
)
from gametalearn.build import build_source
from gametalearn.data import Sinusoid
from gametalearn.disagreement import Disagreement, Kind
from gametalearn.episodes import Source
from gametalearn.training import train
from tests.support import runs

KINDS: list[Kind] = ["shuffled", "permuted", "contradictory", "mismatched"]


def images(seed: int = 3) -> EpisodeSampler:
    pixels = torch.arange(200).to(torch.uint8).view(200, 1, 1, 1)
    data = ClassImages.from_tensors(pixels, torch.arange(200) // 20)
    return EpisodeSampler(data, ways=4, shots=2, queries=5, seed=seed)


def assert_equal(a: TaskBatch, b: TaskBatch) -> None:
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(a._tensors(), b._tensors(), strict=True))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    share=st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.5, 1.0]),
    tasks=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_only_queries_of_spoiled_tasks_change(
    kind: Kind, share: float, tasks: int, seed: int
) -> None:
    plain, source = images(), Disagreement(images(), share, kind, seed)
    if kind == "mismatched" and tasks == 1:
        assert_equal(source.sample(1), plain.sample(1))  # it has no other
        assert source.spoiled.tolist() == [False]
        return
    for _ in range(3):
        clean, got = plain.sample(tasks), source.sample(tasks)
        spoiled = source.spoiled
        assert spoiled.shape == (tasks,)
        assert abs(int(spoiled.sum()) - share * tasks) < 1
        for i in range(tasks):
            one = [getattr(b, name)[i] for b in (clean, got) for name in
                   ("support_x", "support_y", "query_x", "query_y")]  # fmt: skip
            if not spoiled[i]:
                assert all(torch.equal(a, b) for a, b in zip(one[:4], one[4:], strict=True))
                continue
            if kind == "mismatched":
                others = [k for k in range(tasks) if torch.equal(got.query_x[i], clean.query_x[k])]
                assert i not in others
                assert any(torch.equal(got.query_y[i], clean.query_y[k]) for k in others)
                assert all(torch.equal(a, b) for a, b in zip(one[:2], one[4:6], strict=True))
                continue
            if kind == "contradictory" and not spoiled.all():
                j = next(
                    j
                    for j in range(tasks)
                    if not spoiled[j] and torch.equal(got.query_x[i], clean.query_x[j])
                )
                assert torch.equal(got.support_x[i], clean.support_x[j])
                assert torch.equal(got.support_y[i], clean.support_y[j])
            else:
                j = i
                assert all(torch.equal(a, b) for a, b in zip(one[:3], one[4:7], strict=True))
            if kind == "shuffled":
                assert torch.equal(got.query_y[i].sort()[0], clean.query_y[i].sort()[0])
            else:
                assert torch.equal(got.query_y[i], (clean.query_y[j] + 1) % 4)


@pytest.mark.parametrize(("share", "tasks"), [(0.1, 4), (0.2, 5), (0.4, 16), (0.1, 16)])
def test_the_mean_share_is_exact_and_every_place_alike(share: float, tasks: int) -> None:
    source = Disagreement(Sinusoid(), share, seed=1)
    counts = torch.zeros(tasks)
    for _ in range(1500):
        source.sample(tasks)
        counts += source.spoiled
    bound = 4.5 * (share * (1 - share) / 1500) ** 0.5
    assert (counts / 1500 - share).abs().max() < bound
    assert float(counts.mean() / 1500) == pytest.approx(share, abs=2 * bound / tasks**0.5)
    if share * tasks == 1:
        assert int(source.spoiled.sum()) == 1  # no rounding where there is none to do


def test_shuffled_labels_tell_nothing_of_the_images() -> None:
    source = Disagreement(images(), 1.0, "shuffled")
    clean, got = images().sample(400), source.sample(400)
    matches = (clean.query_y == got.query_y).float().mean()
    assert float(matches) == pytest.approx(1 / 4, abs=0.02)


def test_regression_is_mirrored() -> None:
    for kind in ("permuted", "contradictory"):
        source = Disagreement(Sinusoid(seed=5), 1.0, kind)
        clean, got = Sinusoid(seed=5).sample(3), source.sample(3)
        assert torch.equal(got.query_y, -clean.query_y)
        assert torch.equal(got.support_y, clean.support_y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [images, lambda: Sinusoid(seed=2)])
def test_seed_state_and_parts_are_exact(kind: Kind, base: Any) -> None:
    make = Disagreement(base(), 0.4, kind).with_seed
    a, b = make(7), make(7)
    assert_equal(a.sample(5), b.sample(5))
    state = a.state_dict()
    following, spoiled = a.sample(5), a.spoiled
    other = make(8)
    other.load_state_dict(state)
    assert_equal(other.sample(5), following)
    assert torch.equal(other.spoiled, spoiled)
    parts = [make(7) for _ in range(2)]
    first = [
        source.sample(5, part) for source, part in zip(parts, (slice(2), slice(2, 5)), strict=True)
    ]
    assert_equal(TaskBatch.cat(first), make(7).sample(5))
    assert torch.equal(parts[0].spoiled, parts[1].spoiled)
    assert isinstance(a, Source)


def test_bad_settings_are_named() -> None:
    with pytest.raises(InputError, match=r"share must be in \[0, 1\], got 1.5"):
        Disagreement(Sinusoid(), 1.5)
    with pytest.raises(InputError, match=r"kind must be one of shuffled, .*; got 'shufled'"):
        Disagreement(Sinusoid(), 0.5, "shufled")  # type: ignore[arg-type]


def test_mismatched_tasks_where_one_is_drawn_by_itself() -> None:
    """As a look at the first task does, or the rest of an evaluation."""
    model = torch.nn.Linear(1, 1)
    source = Disagreement(Sinusoid(), 0.5, "mismatched")
    assert evaluate(model, source, MAML(0.01), episodes=17).values.shape == (17,)
    train(
        tiny(iterations=2, disagree=0.5, disagree_kind="mismatched"),
        loss=torch.nn.MSELoss(),
        progress=False,
    )
    MixedSource([source, Disagreement(Sinusoid(), 0.5, "mismatched", seed=1)]).sample(4)
    with pytest.raises(
        InputError, match=r"mismatched: .* with `meta_batch` 1 there is no other; take 2"
    ):
        tiny(meta_batch=1, disagree=0.5, disagree_kind="mismatched")


def test_what_the_source_says_of_itself_is_passed_on() -> None:
    source = Sinusoid()
    assert Disagreement(source, 0.5).distinct is None
    source.distinct = 3  # type: ignore[attr-defined]
    assert Disagreement(source, 0.5).distinct == 3


def tiny(**given: Any) -> TrainConfig:
    return runs.tiny(**{"meta_batch": 5, "hidden": 6, "validate_every": 6, **given})


def test_only_training_tasks_are_spoiled() -> None:
    config = tiny(disagree=0.4, disagree_kind="permuted")
    assert isinstance(build_source(config, "train"), Disagreement)
    for split in ("val", "test"):
        assert isinstance(build_source(config, split), Sinusoid)
    assert isinstance(build_source(tiny(), "train"), Sinusoid)


def test_metrics_say_which_tasks_were_spoiled(tmp_path: Any, monkeypatch: Any) -> None:
    import json

    from gametalearn.gradients import meta_gradients

    def records(name: str, **given: Any) -> list[dict[str, Any]]:
        train(tiny(rule="agreement", **given), tmp_path / name, progress=False)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    assert "spoiled" not in records("clean")[0]
    found = records("spoiled", disagree=0.4)
    assert [sum(r["spoiled"]) for r in found] == [2] * 6
    assert all(len(r["spoiled"]) == len(r["effective"]) == 5 for r in found)
    source = build_source(tiny(disagree=0.4), "train")
    assert isinstance(source, Disagreement)
    for record in found:
        source.sample(5)
        assert record["spoiled"] == source.spoiled.tolist()

    def failing(*args: Any, **options: Any) -> Any:
        gradients = meta_gradients(*args, **options)
        gradients.rows[1, 0] = float("nan")
        return gradients

    monkeypatch.setattr("gametalearn.training.meta_gradients", failing)
    skipped = records("skipped", disagree=0.4, nonfinite="skip")
    for whole, less in zip(found, skipped, strict=True):
        assert less["spoiled"] == [whole["spoiled"][i] for i in (0, 2, 3, 4)]
