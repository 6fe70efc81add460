import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gametalearn import (
    MAML,
    ClassImages,
    EpisodeSampler,
    InputError,
    TaskBatch,
    evaluate,
    meta_gradients,
)
from gametalearn.data import Sinusoid
from gametalearn.episodes import Source
from gametalearn.gradients import adapt_and_score


def numbered(counts: list[int], groups: list[int] | None = None) -> ClassImages:
    """Image n of the data set holds the number n in its three bytes."""
    total = sum(counts)
    number = torch.arange(total)
    images = torch.stack([number % 256, number // 256 % 256, number // 65536], 1)
    count = torch.tensor(counts)
    group = torch.tensor(groups or [0] * len(counts))
    return ClassImages(
        name="numbered",
        split="train",
        images=images.to(torch.uint8).view(total, 3, 1, 1),
        first=count.cumsum(0) - count,
        count=count,
        classes=tuple(f"class{i}" for i in range(len(counts))),
        class_group=group,
        groups=tuple(f"group{i}" for i in range(int(group.max()) + 1)),
    )


def numbers(x: torch.Tensor) -> torch.Tensor:
    """The numbers of images that went through the sampler."""
    digits = (x * 255).round().long().flatten(2)
    return digits @ torch.tensor([1, 256, 65536])


@st.composite
def settings_of_a_sampler(draw: st.DrawFn) -> dict[str, Any]:
    ways, shots, queries = (draw(st.integers(low, 6)) for low in (2, 1, 1))
    counts = draw(
        st.lists(
            st.integers(shots + queries, shots + queries + 12), min_size=ways, max_size=ways + 8
        )
    )
    return {
        "dataset": numbered(counts),
        "ways": ways,
        "shots": shots,
        "queries": queries,
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
    }


@settings(max_examples=150, deadline=None)
@given(settings_of_a_sampler(), st.integers(1, 5))
def test_the_laws_of_an_episode(options: dict[str, Any], tasks: int) -> None:
    sampler = EpisodeSampler(**options, group=3)
    batch = sampler.sample(tasks)
    data, ways, shots, queries = (options[k] for k in ("dataset", "ways", "shots", "queries"))
    assert batch.support_x.shape == (tasks, ways * shots, 3, 1, 1)
    assert batch.query_x.shape == (tasks, ways * queries, 3, 1, 1)
    assert batch.support_x.dtype == torch.float32
    assert batch.support_y.dtype == batch.query_y.dtype == batch.group.dtype == torch.int64
    assert batch.group.tolist() == [3] * tasks
    support, query = numbers(batch.support_x), numbers(batch.query_x)
    boundaries = data.first[1:].contiguous()
    assert batch.classes is not None
    for t in range(tasks):
        chosen = batch.classes[t].tolist()
        assert len(set(chosen)) == ways  # without replacement
        shown = support[t].tolist() + query[t].tolist()
        assert len(set(shown)) == ways * (shots + queries)  # disjoint, no example twice
        # each label has as many examples as it should, all of its class
        for numbers_, labels, each in (
            (support[t], batch.support_y[t], shots),
            (query[t], batch.query_y[t], queries),
        ):
            assert torch.bincount(labels, minlength=ways).tolist() == [each] * ways
            owner = torch.bucketize(numbers_, boundaries, right=True)
            assert owner.tolist() == [chosen[y] for y in labels.tolist()]


@settings(max_examples=50, deadline=None)
@given(settings_of_a_sampler())
def test_seed_and_state_are_exact(options: dict[str, Any]) -> None:
    first, second = EpisodeSampler(**options), EpisodeSampler(**options)
    other = second.with_seed(options["seed"] ^ 1)
    second.sample(3)
    state = second.state_dict()
    assert_equal(first.sample(3), second.with_seed(options["seed"]).sample(3))
    later = second.sample(2)
    assert_equal(first.sample(2), later)
    other.load_state_dict(state)
    assert_equal(other.sample(2), later)


def assert_equal(a: TaskBatch, b: TaskBatch) -> None:
    for (name, x), (_, y) in zip(a._tensors(), b._tensors(), strict=True):
        assert torch.equal(x, y), name


def test_another_seed_gives_other_episodes() -> None:
    data = numbered([20] * 20)
    a, b = (EpisodeSampler(data, seed=s, queries=5).sample(1).support_x for s in (0, 1))
    assert not torch.equal(a, b)


def test_state_goes_through_a_checkpoint(tmp_path: Any) -> None:
    sampler = EpisodeSampler(numbered([20] * 20), queries=5)
    sampler.sample(7)
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    expected = sampler.sample(1)
    sampler.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_equal(sampler.sample(1), expected)


def chi_squared(counts: torch.Tensor) -> float:
    expected = counts.double().mean()
    return float(((counts - expected) ** 2 / expected).sum())


def test_every_class_example_and_label_is_equally_likely() -> None:
    # classes of unequal size: uniform over classes, and over examples within each
    counts = [7, 12, 9, 30, 8, 7]
    data = numbered(counts)
    batch = EpisodeSampler(data, ways=3, shots=2, queries=3, seed=0).sample(20000)
    assert batch.classes is not None
    # sampling without replacement spreads less than independent draws: chi2 stays below its
    # independent value, whose mean is the number of cells less one
    for label in range(3):
        seen = torch.bincount(batch.classes[:, label], minlength=6)
        assert chi_squared(seen) < 5 + 5 * math.sqrt(10)
    pairs = torch.bincount(batch.classes[:, 0] * 6 + batch.classes[:, 1], minlength=36)
    assert chi_squared(pairs[pairs > 0]) < 29 + 5 * math.sqrt(58)
    assert (pairs > 0).sum() == 30
    for x in (batch.support_x, batch.query_x):
        seen = torch.bincount(numbers(x).flatten(), minlength=sum(counts))
        for first, count in zip(data.first.tolist(), counts, strict=True):
            within = seen[first : first + count]
            assert chi_squared(within) < count - 1 + 5 * math.sqrt(2 * (count - 1))


def test_an_example_is_support_or_query_by_chance() -> None:
    batch = EpisodeSampler(numbered([2, 2]), ways=2, shots=1, queries=1).sample(4000)
    support = torch.bincount(numbers(batch.support_x).flatten(), minlength=4)
    assert (support - 2000).abs().max() < 5 * math.sqrt(4000 * 0.25)


def test_within_group() -> None:
    groups = [0] * 5 + [1] * 2 + [2] * 8 + [3] * 3
    data = numbered([6] * 18, groups)
    sampler = EpisodeSampler(data, ways=3, shots=1, queries=2, seed=4, within_group=True)
    batch = sampler.sample(6000)
    assert batch.classes is not None
    assert (data.class_group[batch.classes] == batch.group[:, None]).all()
    # group 1 has too few classes; the others are equally likely whatever their size
    seen = torch.bincount(batch.group, minlength=4)
    assert seen[1] == 0
    assert chi_squared(seen[[0, 2, 3]]) < 2 + 5 * 2
    for g in (0, 2, 3):
        classes = torch.bincount(batch.classes[batch.group == g].flatten(), minlength=18)
        members = classes[data.class_group == g]
        assert members.min() > 0
        assert chi_squared(members) < len(members) - 1 + 5 * math.sqrt(2 * len(members))
    again = EpisodeSampler(data, ways=3, shots=1, queries=2, seed=4, within_group=True)
    assert_equal(sampler.with_seed(4).sample(8), again.sample(8))


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_parts_make_up_the_global_batch(processes: int) -> None:
    make = EpisodeSampler(numbered([20] * 30), queries=4, seed=2).with_seed
    whole = make(2)
    ranks = [make(2) for _ in range(processes)]
    for _ in range(2):
        expected = whole.sample(7)
        bounds = [7 * r // processes for r in range(processes + 1)]
        parts = [
            sampler.sample(7, part=slice(bounds[r], bounds[r + 1]))
            for r, sampler in enumerate(ranks)
        ]
        assert_equal(TaskBatch.cat(parts), expected)


def test_a_part_reads_no_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    take = ClassImages.take

    def counting(self: ClassImages, index: torch.Tensor) -> torch.Tensor:
        read.append(index.numel())
        return take(self, index)

    monkeypatch.setattr(ClassImages, "take", counting)
    EpisodeSampler(numbered([20] * 30), 5, 1, 4).sample(8, part=slice(0, 2))
    assert sum(read) == 2 * 5 * 5


def test_a_shuffled_support_holds_the_same_pairs_in_another_order() -> None:
    data = numbered([8] * 9)
    plain, shuffled = (
        EpisodeSampler(data, 4, 3, 2, seed=1, shuffle_support=flag) for flag in (False, True)
    )
    a, b = plain.sample(5), shuffled.sample(5)
    assert torch.equal(a.query_x, b.query_x)
    assert torch.equal(a.query_y, b.query_y)
    orders = set()
    for task in range(5):
        pairs = [
            list(zip(numbers(x.support_x)[task].tolist(), x.support_y[task].tolist(), strict=True))
            for x in (a, b)
        ]
        assert sorted(pairs[0]) == sorted(pairs[1])
        orders.add(tuple(b.support_y[task].tolist()))
    assert len(orders) > 3
    again = shuffled.with_seed(1)
    assert_equal(
        TaskBatch.cat([again.with_seed(1).sample(5, slice(2)), again.sample(5, slice(2, 5))]), b
    )


def test_labels_do_not_follow_the_order_of_classes() -> None:
    batch = EpisodeSampler(numbered([5] * 6), ways=6, shots=1, queries=1).sample(500)
    assert batch.classes is not None
    increasing = (batch.classes.diff(dim=1) > 0).all(1)
    assert increasing.sum() <= 5  # 1 / 720 each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ways": 7},
            r"7 ways requested, but split 'train' of 'numbered' has 6 classes; lower `ways`",
        ),
        ({"ways": 1}, "ways must be at least 2, got 1"),
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"queries": 0}, "queries must be at least 1, got 0"),
        ({"shots": 1.5}, "shots must be an integer, got 1.5"),
        ({"ways": "5"}, "ways must be an integer, got '5'"),
        ({"queries": None}, "queries must be an integer, got None"),
        ({"seed": 1.5}, "a seed must be an integer, got 1.5"),
        ({"shots": 2, "queries": 4}, r"2 shots \+ 4 queries = 6 .* 'class3' .* has 5; lower"),
        ({"ways": 5, "within_group": True}, "largest group .* has 4 classes"),
    ],
)
def test_what_cannot_be_sampled_is_said(options: dict[str, Any], message: str) -> None:
    data = numbered([9, 8, 7, 5, 6, 9], groups=[0, 0, 0, 0, 1, 1])
    with pytest.raises(InputError, match=message) as error:
        EpisodeSampler(data, **({"ways": 3, "shots": 1, "queries": 2} | options))
    assert "\n" not in str(error.value)


def test_no_tasks_are_refused() -> None:
    with pytest.raises(InputError, match="num_tasks"):
        EpisodeSampler(numbered([9] * 5), queries=2).sample(0)


def test_the_sources_are_sources() -> None:
    assert isinstance(EpisodeSampler(numbered([9] * 5), queries=2), Source)
    assert isinstance(Sinusoid(), Source)


def test_task_batch_checks_its_shapes() -> None:
    x, y = torch.zeros(2, 3, 1), torch.zeros(2, 3)
    group = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InputError, match="differ in examples"):
        TaskBatch(x, y[:, :2], x, y, group)
    with pytest.raises(InputError, match="first dimension"):
        TaskBatch(x, y, x, y, group[:1])
    with pytest.raises(InputError, match="first dimension"):
        TaskBatch(x, y, x, y, torch.tensor(0))


def test_task_batch_slices_joins_and_casts() -> None:
    batch = EpisodeSampler(numbered([9] * 5), queries=2).sample(5)
    assert len(batch) == 5
    assert_equal(TaskBatch.cat([batch[:2], batch[2:]]), batch)
    double = batch.to(dtype=torch.float64)
    assert double.query_x.dtype == torch.float64
    assert double.query_y.dtype == torch.int64
    assert Sinusoid().sample(1).to(dtype=torch.float64).query_y.dtype == torch.float64


def test_a_batch_is_made_of_tensors() -> None:
    x, y = torch.zeros(2, 3, 1), torch.zeros(2, 3)
    group: Any = torch.zeros(2, dtype=torch.int64)
    for bad, said in (
        ({"support_x": {"ids": x}}, "support_x must be a tensor, got a dict"),
        ({"query_y": [0, 1]}, "query_y must be a tensor, got a list"),
        ({"group": 0}, "group must be a tensor, got a int"),
        ({"classes": (1, 2)}, "classes must be a tensor, got a tuple"),
    ):
        fields: Any = {"support_x": x, "support_y": y, "query_x": x, "query_y": y, "group": group}
        with pytest.raises(InputError, match=said):
            TaskBatch(**{**fields, **bad})


def test_tasks_of_a_batch() -> None:
    batch = EpisodeSampler(numbered([9] * 5), queries=2).sample(4)
    for number in (0, 3, -1, torch.tensor(2), np.int64(2)):
        one = batch[number]
        assert len(one) == 1
        assert torch.equal(one.support_x[0], batch.support_x[int(number)])
    assert_equal(TaskBatch.cat(list(batch)), batch)
    assert len(list(batch)) == 4
    for some in ([2, 0], torch.tensor([2, 0]), np.array([2, 0]), range(2, -1, -2)):
        assert torch.equal(batch[some].query_x, batch.query_x[[2, 0]])
    assert len(batch[torch.tensor([True, False, True, False])]) == 2
    with pytest.raises(IndexError, match="task 4 of a batch of 4"):
        batch[4]
    for bad in ("support_x", (0, 1), None, 1.0):
        with pytest.raises(InputError, match="by a number, a slice, a list or a tensor"):
            batch[bad]  # type: ignore[index]


class Tuples:
    """A source that gives what `TaskBatch` is made of, and no `TaskBatch`."""

    def sample(self, num_tasks: int) -> Any:
        batch = EpisodeSampler(numbered([9] * 5), queries=2).sample(num_tasks)
        return tuple(tensor for _, tensor in batch._tensors())

    def with_seed(self, seed: int) -> Any:
        return self


def test_a_tuple_is_no_batch() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 5))
    tensors: Any = Tuples().sample(2)
    for take in (meta_gradients, adapt_and_score):
        with pytest.raises(InputError, match="`batch` is a tuple, not a TaskBatch; make one: Task"):
            take(model, tensors, MAML(0.1, 1))
    with pytest.raises(InputError, match=r"Tuples.sample gave a tuple, not a TaskBatch"):
        evaluate(model, Tuples(), MAML(0.1, 1), episodes=2)  # type: ignore[arg-type]


def test_a_batch_without_groups_has_one_objective() -> None:
    x, y = torch.zeros(2, 3, 1), torch.zeros(2, 3)
    batch = TaskBatch(x, y, x, y)
    assert batch.group.tolist() == [0, 0]
    assert batch.group.dtype == torch.int64
    assert batch[1:].group.tolist() == [0]
    assert TaskBatch(x.to("meta"), y, x, y).group.device.type == "meta"
    with pytest.raises(InputError, match="support_x must be a tensor, got a list"):
        TaskBatch([0], y, x, y)  # type: ignore[arg-type]


def test_only_batches_of_equal_tasks_are_joined() -> None:
    few, more = Sinusoid(shots=3).sample(2), Sinusoid(shots=4).sample(2)
    with pytest.raises(
        InputError, match=r"cat: 'support_x' of a task is \(3, 1\) .* and \(4, 1\) in batch 1"
    ):
        TaskBatch.cat([few, more])
    told = dataclasses.replace(few, classes=torch.zeros(2, 3, dtype=torch.int64))
    assert TaskBatch.cat([told, told]).classes is not None
    for some in ([told, few], [few, told]):
        assert TaskBatch.cat(some).classes is None
