import numpy as np
import pytest
import torch
from torch import nn

from gametalearn import ANIL, evaluate, train
from gametalearn.config import TrainConfig
from gametalearn.disagreement import Disagreement
from gametalearn.episodes import EpisodeSampler
from gametalearn.errors import InputError
from gametalearn.images import ClassImages
from gametalearn.mixture import MixedSource
from gametalearn.shares import divided, numbers_in


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Flatten(), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.features(x))


def sampler(ways=3, value=0, classes=6, seed=0, shots=1, queries=2, name="tensors"):
    images = torch.full((classes * 6, 1, 4, 4), value, dtype=torch.uint8)
    data = ClassImages.from_tensors(images, torch.arange(classes * 6) // 6, name)
    return EpisodeSampler(data, ways=ways, shots=shots, queries=queries, seed=seed)


def test_group_is_the_source_and_fixed_shares_are_equal():
    mixed = MixedSource([sampler(value=0), sampler(value=255)])
    batch = mixed.sample(5)
    assert batch.group.tolist() == [0, 0, 0, 1, 1]
    assert batch.support_x[:3].max() == 0
    assert batch.support_x[3:].min() == 1


def test_proportional_shares_follow_their_weights():
    mixed = MixedSource([sampler(), sampler()], share=[1, 3])
    groups = torch.cat([mixed.sample(8).group for _ in range(100)])
    assert groups.float().mean() == pytest.approx(0.75, abs=0.05)


def test_state_is_restored_exactly():
    mixed = MixedSource([sampler(), sampler(seed=1)], share=[1, 1])
    mixed.sample(3)
    state = mixed.state_dict()
    wanted = [mixed.sample(4) for _ in range(3)]
    other = mixed.with_seed(9)
    other.load_state_dict(state)
    for batch in wanted:
        again = other.sample(4)
        assert torch.equal(again.group, batch.group)
        assert str(again.classes) == str(batch.classes)


def test_objectives_of_different_ways_are_refused():
    with pytest.raises(
        InputError, match=r"the same shape .* 0 \(one\) 3-way, .*; 1 \(two\) 4-way, "
    ):
        MixedSource([sampler(ways=3, name="one"), sampler(ways=4, name="two")])
    # equal shapes, but other labels: 2 x 3 and 3 x 2
    with pytest.raises(InputError, match=r"0 \(tensors\) 2-way, .*; 1 \(tensors\) 3-way"):
        MixedSource([sampler(ways=2, shots=3, queries=3), sampler(ways=3, shots=2, queries=2)])


@pytest.mark.parametrize("share", ["fixed", [1, 2, 1]])
def test_the_parts_of_a_batch_are_the_batch_and_advance_the_state_alike(share):
    def mixed():
        return MixedSource([sampler(value=10 * i, seed=i) for i in range(3)], share, seed=4)

    bounds, sources = [0, 0, 1, 4, 7], [mixed() for _ in range(4)]
    whole, source = mixed().sample(7), mixed()
    parts = [s.sample(7, slice(a, b)) for s, a, b in zip(sources, bounds, bounds[1:], strict=False)]
    assert [len(part) for part in parts] == [0, 1, 3, 3]
    for name in ("support_x", "support_y", "query_x", "query_y", "group", "classes"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    source.sample(7)
    assert all(str(s.state_dict()) == str(source.state_dict()) for s in sources)


def test_numbers_divide_each_meta_batch_and_others_in_proportion():
    mixed = MixedSource([sampler(), sampler(), sampler()], counts=[5, 2, 1])
    assert [mixed.sample(8).group.bincount(minlength=3).tolist() for _ in range(3)] == [
        [5, 2, 1]
    ] * 3
    assert mixed.with_seed(3).sample(16).group.bincount().tolist() == [10, 4, 2]
    for counts in ([1, 2], [1, 0, 3]):
        with pytest.raises(InputError, match="counts needs 3 numbers above 0"):
            MixedSource([sampler()] * 3, counts=counts)
    with pytest.raises(InputError, match="give one"):
        MixedSource([sampler()] * 2, [1, 1], counts=[1, 1])


@pytest.mark.parametrize("sources", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("tasks_at_once", [1, 16, 50])
def test_a_test_divides_all_of_its_episodes_equally(sources, tasks_at_once):
    """They are drawn some at a time, and the remainders of these must not add up for the first sources."""
    mixed = MixedSource([sampler(value=10 * i, seed=i) for i in range(sources)])
    found = evaluate(Plain(), mixed, ANIL(0.1, 1), 50, 3, tasks_at_once=tasks_at_once)
    counts = np.bincount(found.group, minlength=sources)
    assert counts.tolist() == divided(50, [1] * sources)


def test_a_test_keeps_numbers_that_were_set():
    mixed = MixedSource([sampler(seed=i) for i in range(3)], counts=[6, 2, 4])
    found = evaluate(Plain(), mixed, ANIL(0.1, 1), 60, 3)
    assert np.bincount(found.group).tolist() == [30, 10, 20]


def test_a_source_that_no_meta_batch_would_have_a_task_of_is_refused(tmp_path):
    config = TrainConfig(dataset="mixed", ways=3, queries=2, iterations=1, meta_batch=2)
    for counts in (None, [8, 1, 1]):
        mixed = MixedSource([sampler(seed=i) for i in range(3)], counts=counts)
        for source in (mixed, Disagreement(mixed, 0.5)):
            with pytest.raises(
                InputError, match=r"`meta_batch` 2 has no task of tensors [12], which"
            ):
                train(config, tmp_path / "a", model=Plain(), source=source, validation=mixed)
    drawn = MixedSource([sampler(seed=i) for i in range(3)], share=[8, 1, 1])
    train(
        config, model=Plain(), source=drawn, validation=drawn, progress=False
    )  # at times it has one
    assert not (tmp_path / "a").exists()


def test_division_is_whole_near_the_exact_one_and_keeps_equal_shares():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        k, tasks = (int(torch.randint(1, most, (), generator=generator)) for most in (6, 40))
        weights = torch.randint(1, 30, (k,), generator=generator)
        found = torch.tensor(divided(tasks, weights.tolist()))
        assert found.sum() == tasks
        assert ((found - tasks * weights / weights.sum()).abs() < 1).all()
        assert divided(tasks, [1] * k) == [tasks // k + (i < tasks % k) for i in range(k)]


NAMES = ["omniglot", "folder:/a=b/birds"]


def test_numbers_by_name():
    assert numbers_in("fixed", NAMES) is numbers_in("proportional", NAMES) is None
    assert numbers_in("folder:/a=b/birds=4, omniglot=12", NAMES) == [12, 4]
    for text, problem in (
        ("equal", "'equal' has no number"),
        ("omniglot=12", "folder:/a=b/birds has no task"),
        ("omniglot=12,glyphs=4", "'glyphs' is none of them"),
        ("omniglot=12,omniglot=4", "omniglot appears twice"),
        ("omniglot=-1,folder:/a=b/birds=4", "'-1' is not a whole number"),
        ("omniglot=0,folder:/a=b/birds=4", "omniglot has no task"),
    ):
        with pytest.raises(InputError, match=f"`share` must be fixed, .*{problem}"):
            numbers_in(text, NAMES)


def test_numbers_are_a_setting_of_training_alone():
    config = TrainConfig.of("omniglot+mini-imagenet", share="omniglot=12,mini-imagenet=4")
    assert (config.meta_batch, config.share_numbers) == (16, [12, 4])
    assert (
        TrainConfig.of("omniglot+mini-imagenet", share="omniglot=9,mini-imagenet=1").meta_batch
        == 10
    )
    for given, message in (
        ({"meta_batch": 8}, "adds up to 16 tasks, but `meta_batch` is 8; make them equal"),
        ({"share": "half"}, "`share` must be fixed"),
    ):
        with pytest.raises(InputError, match=message):
            TrainConfig.of("omniglot+mini-imagenet", **{"share": config.share, **given})
