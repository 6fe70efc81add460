"""Episodes of anything: embeddings, tables, tokens, float images, and items that are read when drawn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gametalearn import (
    MAML,
    ClassExamples,
    ClassImages,
    ClassItems,
    EpisodeSampler,
    InputError,
    TrainConfig,
    meta_gradients,
    train,
)
from gametalearn.build import build_source
from gametalearn.cli import main
from gametalearn.data import load_dataset
from gametalearn.examples import as_input
from tests.support.runs import assert_equal, assert_same_run

CLASSES, EACH = 6, 7
LABELS = torch.arange(CLASSES).repeat(EACH)  # classes are not contiguous
NUMBERS = torch.arange(CLASSES * EACH)


def tensors_of(batch: Any) -> list[Tensor]:
    return [tensor for _, tensor in batch._tensors()]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([torch.float16, torch.float32, torch.float64, torch.int64]),
    st.sampled_from([(), (1,), (2, 3), (1, 2, 2)]),
    st.integers(0, 2**40),
)
def test_episodes_of_a_pair_of_tensors_hold_its_very_rows(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int
) -> None:
    inputs = (NUMBERS.double() * 1.25 - 20).to(dtype).view(-1, *[1] * len(shape))
    inputs = inputs.expand(-1, *shape)
    sampler = EpisodeSampler((inputs, LABELS), ways=4, shots=2, queries=3, seed=seed)
    batch = sampler.sample(3)
    assert sampler.input_shape == shape
    assert batch.support_x.shape == (3, 8, *shape)
    assert batch.query_x.dtype == dtype
    assert batch.classes is not None
    for t in range(3):
        seen = []
        for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
            for one, label in zip(x[t], y[t], strict=True):
                (number,) = [n for n in NUMBERS.tolist() if torch.equal(inputs[n], one)] or [-1]
                assert number >= 0
                assert sampler.dataset.classes[int(batch.classes[t, label])] == str(
                    int(LABELS[number])
                )
                seen.append(number)
        assert len(set(seen)) == 20


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.array([0.1, 2.0]), torch.tensor([0.1, 2.0], dtype=torch.float64)),
        (torch.tensor([0.1], dtype=torch.bfloat16), torch.tensor([0.1], dtype=torch.bfloat16)),
        (np.array([3, 250], np.uint8), torch.tensor([3, 250])),
        (np.array([-3, 2], np.int16), torch.tensor([-3, 2])),
        ([7, 8, 9], torch.tensor([7, 8, 9])),
        (4, torch.tensor(4)),
        (np.full((2, 2), 51, np.uint8), torch.full((1, 2, 2), 0.2)),
        (torch.full((3, 2, 2), 51, dtype=torch.uint8), torch.full((3, 2, 2), 0.2)),
        (Image.new("RGB", (2, 3), (255, 0, 51)), torch.tensor([1, 0, 0.2])[:, None, None].expand(3, 3, 2)),
        (np.ones((2, 2), bool), torch.ones(1, 2, 2)),
        (np.arange(6.0)[::-2], torch.tensor([5.0, 3, 1], dtype=torch.float64)),
    ],
)  # fmt: skip
def test_inputs_keep_their_type_where_a_model_can_take_it(given: Any, expected: Tensor) -> None:
    found = as_input(given)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.array([True]), "got bool; convert"),
        (torch.zeros(2, dtype=torch.complex64), "got complex64"),
        (np.array(["a word"]), "inputs must be floats or integers"),
        (np.zeros((28, 28, 3)), r"\(28, 28, 3\) looks like an image with channels last"),
    ],
)
def test_what_is_no_input_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_input(given)
    stacked = given[None] if isinstance(given, Tensor) else np.array([given])
    with pytest.raises(InputError, match=f"ClassExamples 'tensors': .*{message}"):
        ClassExamples.from_tensors(stacked, [0])
    with pytest.raises(InputError, match=f"item 0 of list cannot be read: .*{message}"):
        EpisodeSampler([(given, 0)])


def test_float_images_are_not_rounded_to_8_bits() -> None:
    fine = torch.rand(len(LABELS), 3, 4, 4, generator=torch.manual_seed(0)) * 3 - 1
    for data in ((fine, LABELS), TensorDataset(fine, LABELS), (fine.numpy().copy(), LABELS)):
        batch = EpisodeSampler(data, 3, 1, 2).sample(2)  # a warning is an error here
        for image in batch.query_x.flatten(0, 1):
            assert (fine == image).flatten(1).all(1).any()


@pytest.mark.parametrize("dims", [3, 4])
def test_8_bits_stay_images_of_8_bits(dims: int) -> None:
    pixels = torch.randint(256, (len(LABELS), 1, 4, 4), dtype=torch.uint8)
    given = pixels if dims == 4 else pixels.squeeze(1)
    forms: list[Any] = [(given, LABELS), TensorDataset(given, LABELS)]
    for data in forms:
        sampler = EpisodeSampler(data, 3, 1, 2)
        assert isinstance(sampler.dataset, ClassImages)
        assert_equal(
            tensors_of(sampler.sample(2)),
            tensors_of(EpisodeSampler(ClassImages.from_tensors(pixels, LABELS), 3, 1, 2).sample(2)),
        )
    last = (
        pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    )  # as data sets keep their arrays
    assert EpisodeSampler((last, LABELS), 3, 1, 2).input_shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "42 examples but 2 labels"),
        (LABELS.float(), "labels must be one integer per example, got float32"),
        (LABELS[:, None], r"got int64 \(42, 1\)"),
        (["a"] * 42, "labels must be integers"),
    ],
)
def test_labels_that_are_none(labels: Any, message: str) -> None:
    for inputs in (torch.zeros(42, 3), torch.zeros(42, 3, 2, 2, dtype=torch.uint8)):
        with pytest.raises(InputError, match=message):
            EpisodeSampler((inputs, labels))


def test_labels_of_pairs() -> None:
    forms = [3, np.int64(3), np.array([3]), torch.tensor(3), torch.tensor([3])]
    data = ClassExamples.from_pairs([(torch.zeros(2), label) for label in forms])
    assert data.classes == ("3",)
    for wrong in (3.0, "3", torch.tensor([1, 2]), None):
        with pytest.raises(InputError, match="a label must be an integer, got"):
            ClassExamples.from_pairs([(torch.zeros(2), wrong)])
    with pytest.raises(InputError, match=r"got \(2,\) float32 and \(3,\) float32; .* pad seq"):
        EpisodeSampler([(torch.zeros(2), 0), (torch.zeros(3), 0)])
    with pytest.raises(InputError, match="holds no examples"):
        EpisodeSampler([])


class Items:
    """42 items; with ``noise``, of Python's, NumPy's and torch's global random numbers."""

    def __init__(self, noise: bool = False) -> None:
        self.noise, self.read = noise, list[int]()

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i >= len(LABELS):
            raise IndexError
        self.read.append(i)
        x = torch.tensor([float(i), 0, 0, 0])
        if self.noise:
            x[1:] = torch.tensor([float(torch.rand(())), np.random.rand(), random.random()])  # noqa: NPY002
        return x, int(LABELS[i])


def test_items_are_read_when_they_are_drawn() -> None:
    items = Items()
    data = ClassItems.from_pairs(items, LABELS)
    assert items.read == []
    sampler = EpisodeSampler(data, 3, 1, 2, seed=5)
    batch = sampler.sample(4, part=slice(1, 3))
    assert len(items.read) == 2 * 9
    assert_equal(
        tensors_of(batch), tensors_of(EpisodeSampler(Items(), 3, 1, 2, seed=5).sample(4)[1:3])
    )
    assert sampler.input_shape == (4,)
    assert ClassItems.from_pairs(items).order.tolist() == data.order.tolist()
    test = data.subset([5, 1, 0], "test")
    assert test.take(test.first)[:, 0].tolist() == [5, 1, 0]
    empty = sampler.sample(2, slice(0, 0))
    assert (empty.support_x.shape, empty.query_x.shape) == ((0, 3, 4), (0, 6, 4))


def test_random_items_are_not_frozen_in_memory() -> None:
    with pytest.raises(InputError, match=r"differ from one reading to the next .*ClassItems"):
        EpisodeSampler(Items(noise=True), 3, 1, 2)
    EpisodeSampler(ClassItems.from_pairs(Items(noise=True)), 3, 1, 2)


def noisy(x: Tensor) -> Tensor:
    return x + torch.tensor([0, float(torch.rand(())), np.random.rand(), random.random()])  # noqa: NPY002


def augmented(kind: str, seed: int = 0, **given: Any) -> EpisodeSampler:
    """A number in the first feature, noise in the others: by a transform, or by the items."""
    plain = torch.nn.functional.pad(NUMBERS.float()[:, None], (0, 3))
    data: Any = (plain, LABELS) if kind == "transform" else ClassItems.from_pairs(Items(noise=True))
    transform = noisy if kind == "transform" else None
    return EpisodeSampler(data, 3, 2, 2, seed, transform=transform, **given)


KINDS = pytest.mark.parametrize("kind", ["transform", "items"])


@KINDS
def test_augmentation_differs_and_is_repeated_by_the_seed(kind: str) -> None:
    first, second = augmented(kind).sample(60), augmented(kind).sample(60)
    assert_equal(tensors_of(first), tensors_of(second))
    seen = torch.cat([first.support_x, first.query_x], 1).flatten(0, 1)
    for noise in seen[:, 1:].T:  # no example is disturbed twice in the same way
        assert len(noise.unique()) == 60 * 12
        assert 0.4 < noise.mean() < 0.6
    other = augmented(kind, seed=1).sample(60)
    assert not set(other.query_x[..., 1].flatten().tolist()) & set(seen[:, 1].tolist())
    assert_equal(tensors_of(augmented(kind, seed=1).with_seed(0).sample(60)), tensors_of(first))


@KINDS
def test_augmentation_goes_on_from_a_state(kind: str) -> None:
    sampler = augmented(kind)
    sampler.sample(3)
    state = sampler.state_dict()
    expected = [sampler.sample(3), sampler.sample(1)]
    again = augmented(kind, seed=9)
    again.load_state_dict(state)
    for batch in expected:
        assert_equal(tensors_of(again.sample(len(batch))), tensors_of(batch))


@KINDS
def test_the_share_of_a_process_is_augmented_as_the_whole(kind: str) -> None:
    whole = augmented(kind, shuffle_support=True)
    parts = augmented(kind, shuffle_support=True)
    for part in (slice(0, 2), slice(2, 2), slice(2, 5)):
        expected = whole.sample(5)[part]
        assert_equal(tensors_of(parts.sample(5, part)), tensors_of(expected))


@KINDS
def test_augmentation_leaves_episodes_and_global_random_numbers_alone(kind: str) -> None:
    sampler = augmented(kind)
    plain = EpisodeSampler(sampler.dataset if kind == "transform" else Items(), 3, 2, 2)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    for _ in range(3):
        one, other = sampler.sample(4), plain.sample(4)
        assert torch.equal(one.query_x[..., 0], other.query_x[..., 0])
        assert_equal([one.classes, one.support_y], [other.classes, other.support_y])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index]  # noqa: NPY002


def test_a_state_of_the_other_kind_is_refused() -> None:
    plain = EpisodeSampler(Items(), 3, 2, 2)
    for one, other in ((plain, augmented("items")), (augmented("transform"), plain)):
        with pytest.raises(InputError, match="has a transform or a ClassItems"):
            one.load_state_dict(other.state_dict())


def test_transforms_see_what_a_model_would_and_may_change_its_shape() -> None:
    seen: list[Tensor] = []

    def halved(x: Tensor) -> Tensor:
        seen.append(x)
        return x[:, ::2, ::2]

    pixels = torch.full((len(LABELS), 3, 4, 4), 51, dtype=torch.uint8)
    sampler = EpisodeSampler((pixels, LABELS), 3, 1, 2, transform=halved)
    assert sampler.input_shape == (3, 2, 2)
    seen.clear()
    assert sampler.sample(2).query_x.shape == (2, 6, 3, 2, 2)
    assert len(seen) == 2 * 9
    assert all(x.shape == (3, 4, 4) and torch.equal(x, torch.full_like(x, 0.2)) for x in seen)


def test_transforms_of_torchvision_are_repeated() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    pixels = torch.randint(256, (len(LABELS), 3, 8, 8), dtype=torch.uint8)
    transform = v2.Compose([v2.RandomResizedCrop(6), v2.RandomHorizontalFlip()])
    one, two = (
        EpisodeSampler((pixels, LABELS), 3, 1, 2, seed=4, transform=transform) for _ in range(2)
    )
    assert_equal(tensors_of(one.sample(3)), tensors_of(two.sample(3)))
    assert one.input_shape == (3, 6, 6)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda x: x[: 1 + int(x[0]) % 2], "all examples must have one shape"),
        (lambda x: x > 0, "the output of `transform` on tensors cannot be read: .* got bool"),
        (lambda x: None, "the output of `transform` on tensors cannot be read"),
    ],
)
def test_transforms_that_give_no_input(transform: Any, message: str) -> None:
    inputs = NUMBERS.float()[:, None].expand(-1, 4)
    with pytest.raises(InputError, match=message):
        EpisodeSampler((inputs, LABELS), 3, 2, 2, transform=transform).sample(3)


def small(**given: Any) -> TrainConfig:
    settings: dict[str, Any] = {"iterations": 6, "meta_batch": 2, "validation_episodes": 4}
    settings |= {"model": "mlp", "hidden": 4, "ways": 3, "validate_every": 3, "log_every": 1}
    settings |= {"checkpoint_every": 2, "threads": 1, "inner_lr": 0.01, "meta_batch": 2}
    return TrainConfig.of("glyphs", **{**settings, **given})


class Kept(EpisodeSampler):
    """Keeps the inputs of its meta-batches, of two tasks each; may be interrupted in the fourth."""

    def __init__(self, *given: Any, interrupted: bool = False, **options: Any) -> None:
        super().__init__(*given, **options)
        self.interrupted, self.drawn = interrupted, list[Tensor]()

    def sample(self, num_tasks: int, part: slice = slice(None)) -> Any:
        batch = super().sample(num_tasks, part)
        if num_tasks == 2:
            if self.interrupted and len(self.drawn) == 3:
                raise KeyboardInterrupt
            self.drawn.append(torch.cat([batch.support_x, batch.query_x], 1))
        return batch


@KINDS
def test_a_resumed_run_sees_the_augmentation_of_one_that_went_through(
    kind: str, tmp_path: Path
) -> None:
    def parts(interrupted: bool = False) -> dict[str, Any]:
        plain = augmented(kind)
        source = Kept(
            plain.dataset, 3, 2, 2, seed=3, transform=plain.transform, interrupted=interrupted
        )
        return {"source": source, "validation": EpisodeSampler(Items(), 3, 2, 2)}

    whole, half, rest = parts(), parts(interrupted=True), parts()
    train(small(), tmp_path / "whole", progress=False, **whole)
    with pytest.raises(KeyboardInterrupt):
        train(small(), tmp_path / "half", progress=False, **half)
    train(small(), tmp_path / "half", progress=False, **rest)
    assert_same_run(tmp_path / "whole", tmp_path / "half")
    assert_equal(whole["source"].drawn[2:], rest["source"].drawn)  # from the checkpoint after two
    noise = torch.stack(whole["source"].drawn)[..., 1].flatten()
    assert len(noise.unique()) == len(noise) == 6 * 2 * 12  # another one in every episode


@pytest.mark.filterwarnings("ignore:training and validation draw the same examples")
def test_floats_of_another_precision_are_trained_on(tmp_path: Path) -> None:
    losses = []
    for dtype in (torch.float16, torch.float32, torch.float64):
        table = (torch.randn(42, 4, generator=torch.manual_seed(1)).half().to(dtype), LABELS)
        source = EpisodeSampler(table, 3, 2, 2)
        run = train(small(), source=source, validation=source.with_seed(1), progress=False)
        assert all(p.dtype == torch.float32 for p in run.model.parameters())
        losses.append(torch.cat([p.flatten() for p in run.model.parameters()]))
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[1], losses[2])


def test_meta_gradients_of_tokens_are_exact() -> None:
    tokens = torch.randint(11, (42, 5), generator=torch.manual_seed(0))

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.table(x).mean(1).tanh())
            return found

    torch.manual_seed(0)
    model = Bag().double()
    batch = EpisodeSampler((tokens, LABELS), 3, 2, 2).sample(4)
    replay, loop = (
        meta_gradients(model, batch, MAML(0.1, 2), method=m).rows for m in ("replay", "loop")
    )
    torch.testing.assert_close(replay, loop, rtol=1e-9, atol=1e-12)
    assert loop.abs().min(0).values.count_nonzero() > 0


MODULE = """
import torch
from torch.utils.data import TensorDataset

def table():
    x = torch.linspace(-3, 3, 90 * 4).view(90, 4)
    return TensorDataset(x, torch.arange(90) // 6)

def pictures(image_size=8):
    x = torch.linspace(-3, 3, 90 * image_size**2).view(90, 1, image_size, image_size)
    return TensorDataset(x, torch.arange(90) // 6)
"""


def test_features_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_features.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--dataset", "own_features:table", "--ways", "3", "--shots", "1", "--queries", "2"]
    more = "--model mlp --hidden 4 --iterations 2 --meta-batch 2 --validation-episodes 2 --quiet"
    assert main(["train", *words, *more.split(), "--out", "run"]) == 0
    assert main(["evaluate", "run", "--episodes", "4", "--trust", "--quiet"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["episodes", *words]) == 2
    assert "draws images (channels, height, width); these inputs have the shape (4,)" in (
        capsys.readouterr().err
    )
    assert main(["train", *words, *more.split(), "--image-size", "8", "--out", "no"]) == 2
    assert "inputs of shape (4,) that are not 8-bit images" in capsys.readouterr().err
    with pytest.raises(InputError, match="provides episodes, not 8-bit images"):
        load_dataset("own_features:table", "train")
    config = TrainConfig.of("own_features:pictures", ways=3, queries=2, image_size=6)
    assert build_source(config, "val").sample(1).support_x.shape == (1, 3, 1, 6, 6)
