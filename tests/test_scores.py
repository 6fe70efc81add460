"""Scores beside the loss: the default goes with it, or says that it does not."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn import MAML, SCORES, InputError, Score, TaskBatch, adapt, meta_gradients
from gametalearn.gradients import adapt_and_score
from gametalearn.losses import class_dimension, kind_of
from gametalearn.scores import as_score, default_for, default_score

METHODS: Any = ["loop", "replay"]
LEARNER = MAML(0.3, 2)


class Shaped(nn.Module):
    """Linear from ``(B, 8)`` to ``(B, *shape)``."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.linear = nn.Linear(8, int(np.prod(shape, dtype=int)))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x).view(len(x), *self.shape)
        return output


def episodes(target: Any, tasks: int = 3, seed: int = 0) -> TaskBatch:
    """Tasks of 6 examples; ``target(shape, generator)`` draws targets, ``shape`` the first two."""
    g = torch.Generator().manual_seed(seed)
    x, q = torch.randn(2, tasks, 6, 8, generator=g).unbind()
    y, z = target((tasks, 6), g), target((tasks, 6), g)
    return TaskBatch(x, y, q, z, torch.zeros(tasks, dtype=torch.int64))


def labels(classes: int, *positions: int) -> Any:
    return lambda shape, g: torch.randint(classes, (*shape, *positions), generator=g)


def bits(*positions: int) -> Any:
    return lambda shape, g: torch.randint(2, (*shape, *positions), generator=g).float()


def reals(*positions: int) -> Any:
    return lambda shape, g: torch.randn(*shape, *positions, generator=g)


def right(p: Any, t: Any, axis: int = 1, ignored: int | None = None) -> Any:
    """The oracle for accuracies, in numpy."""
    kept = t != ignored
    return (p.argmax(axis) == t)[kept].mean()


def own_cross_entropy(p: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(p, t)


def own_class_last(p: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(p.movedim(-1, 1), t)


def own_binary(p: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(p.squeeze(-1), t.float())


def own_squares(p: Tensor, t: Tensor) -> Tensor:
    return ((p - t) ** 2).mean()


FIT: list[Any] = [
    # model's shape, targets, loss, name, oracle
    ((3,), labels(3), None, "accuracy", right),
    ((3, 4, 5), labels(3, 4, 5), None, "accuracy", right),
    ((2,), reals(2), None, "mse", lambda p, t: ((p - t) ** 2).mean()),
    ((3,), labels(3), F.cross_entropy, "accuracy", right),
    ((3, 4, 5), labels(3, 4, 5), F.cross_entropy, "accuracy", right),
    ((5, 5), labels(5, 5), F.cross_entropy, "accuracy", right),
    (
        (3, 4),
        labels(3, 4),
        nn.CrossEntropyLoss(ignore_index=2),
        "accuracy",
        lambda p, t: right(p, t, 1, 2),
    ),
    (
        (3,),
        labels(3),
        functools.partial(F.cross_entropy, ignore_index=0, label_smoothing=0.1),
        "accuracy",
        lambda p, t: right(p, t, 1, 0),
    ),
    ((), bits(), F.binary_cross_entropy_with_logits, "binary-accuracy", None),
    ((1,), bits(1), nn.BCEWithLogitsLoss(), "binary-accuracy", None),
    ((4,), bits(4), F.binary_cross_entropy_with_logits, "multilabel-accuracy", None),
    ((1, 4, 5), bits(1, 4, 5), nn.BCEWithLogitsLoss(), "multilabel-accuracy", None),
    ((2,), reals(2), F.mse_loss, "mse", lambda p, t: ((p - t) ** 2).mean()),
    ((2,), reals(2), nn.MSELoss(reduction="sum"), "mse", lambda p, t: ((p - t) ** 2).mean()),
    ((2,), reals(2), F.l1_loss, "mae", lambda p, t: abs(p - t).mean()),
    ((2,), reals(2), nn.L1Loss(), "mae", lambda p, t: abs(p - t).mean()),
    ((3,), labels(3), own_cross_entropy, "accuracy", right),
    ((3, 4, 5), labels(3, 4, 5), own_cross_entropy, "accuracy", right),
    ((6, 3), labels(3, 6), own_class_last, "accuracy", lambda p, t: right(p, t, 2)),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "target", "loss", "name", "oracle"), FIT)
def test_the_default_score_goes_with_the_loss(
    shape: Any, target: Any, loss: Any, name: str, oracle: Any, method: Any
) -> None:
    torch.manual_seed(0)
    model, batch = Shaped(*shape), episodes(target)
    more: Any = {} if loss is None else {"loss": loss}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a partial is looped over
        found = meta_gradients(model, batch, LEARNER, method=method, **more)
        _, scores = adapt_and_score(model, batch, LEARNER, method=method, chunk=1, **more)
    oracle = oracle or (lambda p, t: ((p > 0) == (t == 1)).mean())
    wanted = []
    for task in range(3):
        own = adapt(model, batch.support_x[task], batch.support_y[task], LEARNER, **more)
        wanted.append(
            oracle(own(batch.query_x[task]).detach().numpy(), batch.query_y[task].numpy())
        )
    np.testing.assert_allclose(found.score, wanted, rtol=1e-5)
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)
    chosen = default_for(
        loss or default_loss_of(), own(batch.query_x[0]).detach(), batch.query_y[0]
    )
    assert chosen is not None
    assert chosen.name == name
    assert (chosen.higher_is_better, chosen.format) == (
        (True, "percent") if "accuracy" in name else (False, "number")
    )


def default_loss_of() -> Any:
    from gametalearn.adaptation import default_loss

    return default_loss


NO_FIT: list[Any] = [
    ((1,), labels(2), own_binary),  # one logit, and who knows what a function makes of it
    ((), bits(), own_binary),
    ((2,), reals(2), own_squares),
    ((5, 5), labels(5, 5), lambda p, t: F.cross_entropy(p.transpose(1, 2), t)),  # either could be
    ((2,), reals(2), F.smooth_l1_loss),
    ((2,), reals(2), nn.HuberLoss()),
    ((3,), lambda s, g: torch.rand(*s, 3, generator=g).softmax(-1), F.cross_entropy),
    ((2,), lambda s, g: torch.rand(*s, 2, generator=g), F.binary_cross_entropy_with_logits),
    ((3,), lambda s, g: torch.randint(5, 9, s, generator=g), lambda p, t: p.mean() + 0 * t.sum()),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "target", "loss"), NO_FIT)
def test_where_no_default_fits_scores_are_nan_with_one_warning(
    shape: Any, target: Any, loss: Any, method: Any
) -> None:
    torch.manual_seed(0)
    model, batch = Shaped(*shape), episodes(target)
    with pytest.warns(UserWarning, match=r"scores of Shaped are NaN.*pass score=.*SCORES"):
        found = meta_gradients(model, batch, LEARNER, loss=loss, method=method)
    assert torch.isfinite(found.loss).all()
    assert torch.isfinite(found.rows).all()
    assert torch.isnan(found.score).all()
    # once for a model and a loss, and every warning is an error here
    meta_gradients(model, batch, LEARNER, loss=loss, method=method)
    assert torch.isnan(adapt_and_score(model, batch, LEARNER, loss=loss, method=method)[1]).all()
    with pytest.warns(UserWarning, match="pass score="):
        adapt_and_score(Shaped(*shape), batch, LEARNER, loss=loss, method=method, chunk=1)


def test_a_score_of_ones_own_asks_for_no_warning() -> None:
    model, batch = Shaped(1), episodes(labels(2))

    def own(p: Tensor, t: Tensor) -> Tensor:
        return ((p.squeeze(-1) > 0) == t.bool()).float().mean()

    found = meta_gradients(model, batch, LEARNER, loss=own_binary, score=own)
    assert torch.isfinite(found.score).all()
    named = meta_gradients(model, batch, LEARNER, loss=own_binary, score="binary-accuracy")
    assert found.score.tolist() == named.score.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_a_replay_is_kept_for_its_score_alone(method: Any) -> None:
    model, batch = Shaped(2), episodes(reals(2))
    scores = {
        name: meta_gradients(model, batch, LEARNER, score=name, method=method).score
        for name in ("mse", "mae")
    }
    zero = meta_gradients(
        model, batch, LEARNER, score=Score("zero", lambda p, t: 0 * p.sum()), method=method
    )
    assert zero.score.tolist() == [0, 0, 0]
    for task in range(3):
        own = adapt(model, batch.support_x[task], batch.support_y[task], LEARNER)
        error = (own(batch.query_x[task]) - batch.query_y[task]).detach().numpy()
        assert float(scores["mse"][task]) == pytest.approx((error**2).mean(), rel=1e-5)
        assert float(scores["mae"][task]) == pytest.approx(abs(error).mean(), rel=1e-5)


@dataclass
class Output:
    logits: Tensor
    features: list[Tensor]


class Pair(NamedTuple):
    logits: Tensor
    more: Tensor


class Wrapped(nn.Module):
    """A model that gives more than logits, in a container of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.own = kind, Shaped(3)

    def forward(self, x: Tensor) -> Any:
        logits = self.own(x)
        if self.kind == "dict":
            return {"logits": logits, "inner": {"x": x}}
        if self.kind == "tuple":
            return logits, x
        return Pair(logits, x) if self.kind == "named" else Output(logits, [logits + 1])


def logits_of(p: Any) -> Tensor:
    found: Tensor = p["logits"] if isinstance(p, dict) else p[0] if type(p) is tuple else p.logits
    return found


def loss_of(p: Any, t: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(p), t)


def accuracy_of(p: Any, t: Tensor) -> Tensor:
    assert not logits_of(p).requires_grad
    return (logits_of(p).argmax(1) == t).float().mean()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["dict", "tuple", "named", "dataclass"])
def test_a_prediction_may_be_a_container(kind: str, method: Any) -> None:
    torch.manual_seed(0)
    model, batch = Wrapped(kind), episodes(labels(3))
    plain = meta_gradients(model.own, batch, LEARNER, method=method)
    with pytest.warns(UserWarning, match=r"scores of Wrapped are NaN.*pass score="):
        found = meta_gradients(model, batch, LEARNER, loss=loss_of, method=method)
    assert torch.isnan(found.score).all()
    torch.testing.assert_close(found.rows, plain.rows)
    found = meta_gradients(model, batch, LEARNER, loss=loss_of, score=accuracy_of, method=method)
    assert found.score.tolist() == plain.score.tolist()
    with pytest.raises(InputError, match=r"prediction is a \w+, and .*default_loss takes a tensor"):
        meta_gradients(model, batch, LEARNER, method=method)
    with pytest.raises(InputError, match=r"'accuracy' takes a tensor.*prediction is a \w+"):
        meta_gradients(model, batch, LEARNER, loss=loss_of, score="accuracy", method=method)


@pytest.mark.parametrize("method", METHODS)
def test_scores_that_leave_torch_are_computed_for_each_batch(method: Any) -> None:
    """A number that a trace would take down must not stand in a program."""

    def by_numpy(p: Tensor, t: Tensor) -> Tensor:
        return torch.tensor(float((p.numpy().argmax(1) == t.numpy()).mean()))

    model = Shaped(3)
    for tasks in (1, 3):
        for seed in range(3):
            batch = episodes(labels(3), tasks, seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it is looped over
                found = adapt_and_score(
                    model, batch, LEARNER, score=by_numpy, method=method, chunk=1
                )[1]
            wanted = adapt_and_score(model, batch, LEARNER, method="loop")[1]
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_a_score_is_nan_where_the_loss_is_not_finite(method: Any) -> None:
    """A network of NaN predicts the first class, which is right for one query in three."""
    model, batch = Shaped(3), episodes(labels(3))
    batch.query_x[1] = float("inf")
    batch.support_x[2] = float("nan")
    found = meta_gradients(model, batch, LEARNER, method=method)
    _, scores = adapt_and_score(model, batch, LEARNER, method=method, chunk=1)
    for values in (found.score, scores):
        assert torch.isfinite(values).tolist() == [True, False, False]
    always = Score("always", lambda p, t: torch.ones(()))
    found = meta_gradients(model, batch, LEARNER, score=always, method=method)
    assert found.score[0] == 1
    assert torch.isnan(found.score[1:]).all()


@pytest.mark.filterwarnings("ignore:.*computed task by task")  # a partial is looped over
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "loss",
    [
        None, F.mse_loss, nn.MSELoss(), F.l1_loss, nn.L1Loss(), F.smooth_l1_loss,
        nn.SmoothL1Loss(), F.huber_loss, nn.HuberLoss(), functools.partial(F.mse_loss, reduction="sum"),
    ],
)  # fmt: skip
def test_a_prediction_is_not_broadcast_against_its_target(loss: Any, method: Any) -> None:
    more: Any = {} if loss is None else {"loss": loss}
    for model, target in ((Shaped(1), reals()), (Shaped(), reals(1)), (Shaped(3, 1), reals(3))):
        with pytest.raises(
            InputError, match=r"shape \(6,.*\(6,.* compare every example with every"
        ):
            meta_gradients(model, episodes(target), LEARNER, method=method, **more)


@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(ignore_index=7), own_cross_entropy])
@pytest.mark.parametrize("bad", [3, 6, -1])
def test_a_label_without_an_output_is_named(bad: int, loss: Any) -> None:
    more: Any = {} if loss is None else {"loss": loss}
    batch = episodes(labels(3))
    for y in (batch.support_y, batch.query_y):
        before = int(y[1, 2])
        y[1, 2] = bad
        with pytest.raises(InputError, match=rf"label {bad}, but the model has 3 outputs.* 0 to 2"):
            meta_gradients(Shaped(3), batch, LEARNER, method="loop", **more)
        with pytest.raises(InputError, match=f"label {bad}, but the model has 3 outputs"):
            adapt_and_score(Shaped(3), batch, LEARNER, method="loop", **more)
        y[1, 2] = before
    meta_gradients(Shaped(3), batch, LEARNER, method="loop", **more)
    ignored = episodes(labels(3))
    ignored.query_y[:, 0] = 7
    if isinstance(loss, nn.CrossEntropyLoss):
        meta_gradients(Shaped(3), ignored, LEARNER, method="loop", **more)


def test_other_errors_of_a_loss_stay_what_they_are() -> None:
    def broken(p: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        meta_gradients(Shaped(3), episodes(labels(3)), LEARNER, loss=broken, method="loop")


def test_accuracies_of_labels_that_are_none() -> None:
    p, t = torch.eye(3).repeat(2, 1), torch.arange(3).repeat(2)
    t[0] = 1
    assert SCORES["accuracy"].function(p, t).item() == pytest.approx(5 / 6)
    t[0] = -100
    assert SCORES["accuracy"].function(p, t).item() == 1
    t[0] = 3
    assert torch.isnan(SCORES["accuracy"].function(p, t))
    assert torch.isnan(SCORES["accuracy"].function(p, torch.full((6,), -100)))
    bits = torch.tensor([0, 1, 1])
    for target in (bits, bits.float(), bits.bool()):
        logits = torch.tensor([-1.0, 2.0, -3.0])
        for p, t in ((logits, target), (logits[:, None], target), (logits, target[:, None])):
            assert SCORES["binary-accuracy"].function(p, t).item() == pytest.approx(2 / 3)
    assert torch.isnan(SCORES["binary-accuracy"].function(logits, torch.tensor([0, 1, 2])))
    assert torch.isnan(SCORES["multilabel-accuracy"].function(logits, torch.tensor([-1.0, 1, 1])))
    assert SCORES["mse"].function(torch.tensor([1.0, 2]), torch.tensor([0, 4])).item() == 2.5
    assert SCORES["mae"].function(torch.tensor([1.0, 2]), torch.tensor([0, 4])).item() == 1.5


@pytest.mark.parametrize(
    ("name", "shape", "target"),
    [
        ("accuracy", (3,), reals()),
        ("accuracy", (4, 3), labels(3, 4)),
        ("binary-accuracy", (2,), labels(2)),
        ("multilabel-accuracy", (4,), bits()),
        ("mse", (1,), reals()),
        ("mae", (1,), reals()),
    ],
)
def test_a_named_score_refuses_what_it_cannot_measure(name: str, shape: Any, target: Any) -> None:
    batch = episodes(target)
    with pytest.raises(InputError, match=rf"score '{name}' needs .*got the prediction \(6,"):
        meta_gradients(Shaped(*shape), batch, LEARNER, loss=lambda p, t: p.mean(), score=name)


def test_what_score_takes() -> None:
    assert as_score(default_score) is None
    assert as_score("mae") is SCORES["mae"]
    assert as_score(own_squares) == Score("own_squares", own_squares)
    assert not as_score(F.mse_loss).higher_is_better  # type: ignore[union-attr]
    assert not as_score(nn.SmoothL1Loss()).higher_is_better  # type: ignore[union-attr]
    assert as_score(functools.partial(own_squares)).name == "own_squares"  # type: ignore[union-attr]
    with pytest.raises(InputError, match="unknown score 'acuracy'; did you mean 'accuracy'"):
        meta_gradients(Shaped(3), episodes(labels(3)), LEARNER, score="acuracy")
    with pytest.raises(InputError, match=r"a function of \(prediction, target\); got a float"):
        as_score(0.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="name must be printable text, got ''"):
        Score("", own_squares)
    with pytest.raises(InputError, match=r"function must be callable .*got a str"):
        Score("f1", "f1")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="format must be one of percent, number; got '%'"):
        Score("f1", own_squares, format="%")  # type: ignore[arg-type]
    wrongs: list[Any] = [lambda p, t: p.argmax(1) == t, lambda p, t: 0.5]
    for wrong in wrongs:
        with pytest.raises(InputError, match="must give a scalar tensor"):
            meta_gradients(Shaped(3), episodes(labels(3)), LEARNER, score=wrong, method="loop")


def test_which_loss_is_which() -> None:
    class Own(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target.exp())

    class Plain(nn.MSELoss):
        pass

    assert kind_of(Own()) is None
    assert kind_of(Plain()) == "squared"
    assert kind_of(nn.MSELoss) is None  # the class is no loss
    assert kind_of(functools.partial(F.mse_loss, torch.zeros(()))) is None
    assert kind_of(own_squares) is None


@pytest.mark.parametrize(
    ("prediction", "target", "wanted"),
    [
        ((6, 3), (6,), 1),
        ((6, 3, 4), (6, 4), 1),
        ((6, 4, 3), (6, 4), 2),
        ((6, 4, 4), (6, 4), None),
        ((6, 4, 5, 3), (6, 4, 5), 3),
        ((6, 4), (6, 4), None),
        ((6, 3, 1), (6,), None),
        ((5, 3), (6,), None),
    ],
)
def test_where_the_classes_stand(prediction: Any, target: Any, wanted: Any) -> None:
    assert class_dimension(torch.zeros(prediction), torch.zeros(target)) == wanted


def test_a_half_precision_accuracy_is_not_rounded() -> None:
    p = torch.zeros(75, 2, dtype=torch.bfloat16)
    t = torch.zeros(75, dtype=torch.int64)
    t[:26] = 1
    assert default_score(p, t).item() == pytest.approx(49 / 75, rel=1e-6)
