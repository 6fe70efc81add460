"""The TorchJD bridge against the real library, in both directions."""

import io
from typing import Any

import pytest
import torch
import torchjd.aggregation
from torch import Tensor, nn
from torchjd.aggregation import (
    CRMOGMWeighting,
    GramianWeightedAggregator,
    MGDAWeighting,
    UPGradWeighting,
)
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad
from torchjd.linalg import QuadprogProjector

from gametalearn import InputError, TaskGradients, agreement_weights
from gametalearn.bridges import GradientCollector
from gametalearn.bridges.torchjd import AgreementWeighting, TorchJDRule, torchjd_rules
from gametalearn.build import build_rule
from gametalearn.config import TrainConfig
from gametalearn.weighting import make_rule

# cvxpy says so of NashMTL's program, once.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are solving a parameterized problem that is not DPP:UserWarning"
)

TASKS = 5


def gradients_of(rows: Tensor) -> TaskGradients:
    zeros = rows.new_zeros(len(rows))
    return TaskGradients(rows, torch.zeros_like(rows), zeros, zeros, torch.zeros(len(rows)).long())


def make_rows(tasks: int = TASKS, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of which some oppose others, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, 12, generator=generator, dtype=torch.float64)
    rows[-1] -= 2 * rows[0]
    return (rows * torch.arange(1.0, tasks + 1, dtype=torch.float64).unsqueeze(1)).to(dtype)


# our agreement in TorchJD


def make_losses(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
    x = torch.randn(TASKS, 4, dtype=dtype)
    y = torch.randn(TASKS, dtype=dtype)
    return model, x, y


def wanted_gradient(model: nn.Module, losses: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    params = list(model.parameters())
    tasks = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    rows = torch.stack([torch.cat([g.flatten() for g in task]) for task in tasks])
    weights = agreement_weights(rows, normalize=normalize)
    return weights, weights @ rows


def flat_grad(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("optimize", [False, True])
def test_autojac_gives_the_agreement_update(normalize, optimize):
    model, x, y = make_losses()
    losses = (model(x).squeeze(1) - y) ** 2
    weights, gradient = wanted_gradient(model, losses, normalize)
    aggregator = GramianWeightedAggregator(AgreementWeighting(normalize))
    backward(losses)
    got = jac_to_grad(model.parameters(), aggregator, optimize_gramian_computation=optimize)
    torch.testing.assert_close(got, weights)
    torch.testing.assert_close(flat_grad(model), gradient)


@pytest.mark.parametrize("normalize", [False, True])
def test_autogram_gives_the_agreement_update(normalize):
    model, x, y = make_losses()
    engine = Engine(model, batch_dim=0)
    losses = (model(x).squeeze(1) - y) ** 2
    weights, gradient = wanted_gradient(model, losses, normalize)
    got = AgreementWeighting(normalize)(engine.compute_gramian(losses))
    torch.testing.assert_close(got, weights)
    losses.backward(got)
    torch.testing.assert_close(flat_grad(model), gradient)


def test_composes_with_other_weightings():
    smooth = GramianWeightedAggregator(CRMOGMWeighting(AgreementWeighting(), alpha=0.5))
    one, two = make_rows(seed=0), make_rows(seed=1)
    torch.testing.assert_close(smooth(one), agreement_weights(one) @ one)
    mixed = (agreement_weights(one) + agreement_weights(two)) / 2
    torch.testing.assert_close(smooth(two), mixed @ two)


def test_agreement_weighting_edges():
    weighting = AgreementWeighting()
    assert repr(weighting) == "AgreementWeighting(normalize=False)"
    opposing = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert weighting(opposing).tolist() == [0.5, 0.5]
    assert weighting(opposing.half()).dtype == torch.float16
    with pytest.raises(InputError, match="Gramian row of task 1"):
        weighting(torch.tensor([[1.0, 0.0], [0.0, float("nan")]]))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float16, 1e3), (torch.float32, 1e20), (torch.float64, 1e160)]
)
def test_squares_that_overflow_are_told_from_bad_losses(dtype, scale):
    rows = (make_rows(dtype=torch.float64) * scale).to(dtype)
    gramian = rows @ rows.T
    assert torch.isfinite(rows).all()
    assert torch.isinf(gramian.diagonal()).any()
    with pytest.raises(InputError, match=rf"square exceeds {dtype} .*; scale the losses down, or"):
        AgreementWeighting()(gramian)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float16, 1e-5), (torch.float32, 1e-23), (torch.float64, 1e-162)]
)
def test_squares_that_lose_their_digits_are_an_error(dtype, scale, normalize):
    rows = (make_rows() * scale).to(dtype)
    weighting = AgreementWeighting(normalize)
    with pytest.raises(
        InputError, match=rf"of task \d: its squared .* too small for {dtype}; scale"
    ):
        weighting(rows @ rows.T)
    whole = rows.double() / scale
    wanted = agreement_weights(whole, normalize=normalize)
    torch.testing.assert_close(weighting(whole @ whole.T), wanted)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float16, 1e-3), (torch.float32, 1e-20), (torch.float64, 1e-155)]
)
def test_squares_that_keep_some_digits_are_taken(dtype, scale):
    rows = (make_rows() * scale).to(dtype)
    wanted = agreement_weights(rows.double())
    got = AgreementWeighting()(rows @ rows.T).double()
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.02)


def test_squares_of_zero_are_told():
    rows = make_rows(dtype=torch.float32) * 1e-25
    assert rows.all()
    weighting = AgreementWeighting()
    with pytest.warns(UserWarning, match=r"are uniform; if the .* too small for torch\.float32"):
        assert weighting(rows @ rows.T).tolist() == pytest.approx([1 / TASKS] * TASKS)
    weighting(torch.diag(torch.tensor([0.0, 1.0])))  # one of them is no reason


def test_one_short_gradient_matters_if_each_counts_by_its_direction():
    rows = make_rows(dtype=torch.float32)
    rows[1] *= 1e-22
    gramian = rows @ rows.T
    weights = AgreementWeighting()(gramian).double()
    torch.testing.assert_close(weights, agreement_weights(rows.double()), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="of task 1: its squared gradient"):
        AgreementWeighting(normalize=True)(gramian)


@pytest.mark.parametrize(
    "name", ["AlignedMTL", "CAGrad", "DualProj", "FairGrad", "IMTLG", "MGDA", "NashMTL", "UPGrad"]
)
def test_what_fails_on_long_gradients_says_why(name):
    rows = make_rows(dtype=torch.float32) * 1e20
    with pytest.raises(
        InputError, match=rf"torchjd:{name}': .* exceeds torch.float32: scale the l"
    ):
        TorchJDRule(name)(gradients_of(rows))
    weights = TorchJDRule(name)(gradients_of(rows.double())).effective
    assert torch.isfinite(weights).all()


# TorchJD's rules here

OPTIONS: dict[str, dict[str, Any]] = {
    "Constant": {"weights": torch.arange(TASKS, dtype=torch.float64)},
    "Krum": {"n_byzantine": 1},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "CAGrad": {"c": 0.5},
    "FairGrad": {"alpha": 1.0},
    "NashMTL": {"n_tasks": TASKS},
}
RANDOM = {"Random", "PCGrad", "GradVac"}


def aggregator_of(name: str) -> nn.Module:
    """TorchJD's own, as the oracle."""
    made: nn.Module = getattr(torchjd.aggregation, name)(
        **OPTIONS.get(name, {}), **DEFAULTS.get(name, {})
    )
    return made


def test_names():
    names = torchjd_rules()
    assert set(names) == {
        "AlignedMTL", "CAGrad", "Constant", "DualProj", "ExcessMTL", "FairGrad", "GradVac", "IMTLG",
        "Krum", "MGDA", "Mean", "NashMTL", "PCD", "PCGrad", "Random", "Sum", "UPGrad",
    }  # fmt: skip
    assert list(names) == sorted(names)


@pytest.mark.parametrize("name", torchjd_rules())
def test_combines_like_the_aggregator(name):
    rows = make_rows()
    rule = TorchJDRule(name, **OPTIONS.get(name, {}))
    if name in RANDOM:
        torch.manual_seed(int(torch.randint(2**63 - 1, (), generator=rule._generator)))
        rule = TorchJDRule(name, **OPTIONS.get(name, {}))
    wanted = aggregator_of(name)(rows)
    weights = rule(gradients_of(rows))
    assert weights.effective.shape == (TASKS,)
    assert weights.effective.dtype == rows.dtype
    assert torch.equal(weights.raw, weights.effective)
    torch.testing.assert_close(weights.effective @ rows, wanted, rtol=1e-6, atol=1e-9)


def test_scale_conventions():
    """As documented: those scaled like the mean give parallel rows weights of sum 1."""
    rows = make_rows(tasks=1).repeat(TASKS, 1)
    total = {}
    for name in torchjd_rules():
        options = {} if name == "Constant" else OPTIONS.get(name, {})
        options = {"weights": torch.ones(TASKS).double()} if name == "Constant" else options
        options = {"c": 0.0} if name == "CAGrad" else options
        total[name] = float(TorchJDRule(name, **options)(gradients_of(rows)).effective.sum())
    for name in total.keys() - {"Sum", "PCGrad", "GradVac", "Constant", "FairGrad", "NashMTL"}:
        assert total[name] == pytest.approx(1, abs=1e-3), name
    for name in ("Sum", "PCGrad", "GradVac"):
        assert total[name] == pytest.approx(TASKS, abs=1e-3), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["UPGrad", "AlignedMTL", "IMTLG"])
def test_keeps_the_dtype(name, dtype):
    rows = make_rows(dtype=dtype)
    weights = TorchJDRule(name)(gradients_of(rows)).effective
    assert weights.dtype == dtype
    wanted = TorchJDRule(name)(gradients_of(rows.double())).effective
    torch.testing.assert_close(weights.double(), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", torchjd_rules())
def test_resumes_exactly(name):
    """The state survives a checkpoint in the middle, through weights_only loading."""
    options = OPTIONS.get(name, {})
    batches = [gradients_of(make_rows(seed=seed)) for seed in range(6)]
    through = TorchJDRule(name, seed=3, **options)
    wanted = [through(batch).effective for batch in batches]
    first = TorchJDRule(name, seed=3, **options)
    for batch in batches[:3]:
        first(batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = TorchJDRule(name, seed=99, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    for batch, weights in zip(batches[3:], wanted[3:], strict=True):
        torch.testing.assert_close(second(batch).effective, weights, rtol=0, atol=0)


@pytest.mark.parametrize("name", torchjd_rules())
@pytest.mark.parametrize("begun", [False, True])
def test_eval_keeps_all_state(name, begun):
    options = OPTIONS.get(name, {})
    rule, twin = TorchJDRule(name, **options), TorchJDRule(name, **options)
    if begun:
        rule(gradients_of(make_rows()))
        twin(gradients_of(make_rows()))
    rule.eval()
    for seed in (1, 2):
        rule(gradients_of(make_rows(seed=seed)))
    rule.train()
    last = gradients_of(make_rows(seed=3))
    assert torch.equal(rule(last).effective, twin(last).effective)


@pytest.mark.parametrize("name", ["PCD", "GradVac", "ExcessMTL", "NashMTL"])
def test_what_is_stateful_needs_its_state(name):
    """So that the test above says something."""
    batches = [gradients_of(make_rows(seed=seed)) for seed in range(2)]
    through, fresh = TorchJDRule(name), TorchJDRule(name)
    through(batches[0])
    fresh._generator.set_state(through._generator.get_state())
    late, early = through(batches[1]).effective, fresh(batches[1]).effective
    assert not torch.allclose(late, early, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_random_ones_are_seeded_and_leave_the_global_state(name):
    rows = gradients_of(make_rows())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    rule = TorchJDRule(name, seed=0)
    first, second = rule(rows).effective, rule(rows).effective
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = TorchJDRule(name, seed=0)
    assert torch.equal(again(rows).effective, first)
    assert torch.equal(again(rows).effective, second)
    assert not torch.equal(first, second)
    assert not torch.equal(TorchJDRule(name, seed=1)(rows).effective, first)


def test_the_runs_seed_seeds_the_rule():
    rows = gradients_of(make_rows())
    rules = [
        build_rule(TrainConfig.of("sinusoid", rule="torchjd:Random", seed=seed), 1)
        for seed in (0, 0, 1)
    ]
    first, again, other = (rule(rows).effective for rule in rules)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("upgrad", "UPGrad"),
        ("UPGradWeighting", "UPGrad"),
        ("IMTL-G", "IMTLG"),
        ("aligned-mtl", "AlignedMTL"),
        ("Aligned_MTL_weighting", "AlignedMTL"),
        ("mgda", "MGDA"),
        ("cagrad", "CAGrad"),
    ],
)
def test_name_resolution(written, meant):
    assert TorchJDRule(written).name == meant
    rule = make_rule(f"torchjd:{written}")
    assert isinstance(rule, TorchJDRule)
    assert rule.name == meant


def test_options_and_aggregators_of_ones_own():
    rows = make_rows()
    few = TorchJDRule("MGDA", max_iters=1)(gradients_of(rows)).effective
    wanted = torchjd.aggregation.MGDA(max_iters=1)(rows)
    torch.testing.assert_close(few @ rows, wanted)
    own = GramianWeightedAggregator(CRMOGMWeighting(UPGradWeighting()))
    rule = TorchJDRule(own)
    assert rule.name == "GramianWeightedAggregator"
    rule(gradients_of(rows))
    state = rule.state_dict()
    resumed = TorchJDRule(GramianWeightedAggregator(CRMOGMWeighting(UPGradWeighting())))
    resumed.load_state_dict(state)
    other = gradients_of(make_rows(seed=1))
    torch.testing.assert_close(resumed(other).effective, rule(other).effective)
    constant = TorchJDRule("Constant", weights=[0.0, 0.25, 0.5, 0.25, 1.0])
    assert constant(gradients_of(make_rows(dtype=torch.float32))).effective.tolist() == [
        0.0,
        0.25,
        0.5,
        0.25,
        1.0,
    ]
    assert "MGDA(epsilon=0.001, max_iters=1)" in repr(TorchJDRule("MGDA", max_iters=1))


def test_nash_mtl_counts_the_tasks():
    rule = TorchJDRule("NashMTL")
    for tasks in (4, 3):
        rows = make_rows(tasks=tasks)
        wanted = torchjd.aggregation.NashMTL(n_tasks=tasks)(rows)
        torch.testing.assert_close(rule(gradients_of(rows)).effective @ rows, wanted)


def test_bad_input(monkeypatch):
    with pytest.raises(
        InputError,
        match=r"no rule 'UPGard'; did you mean 'UPGrad'\? known: AlignedMTL, CAGrad, .*UPGrad",
    ):
        TorchJDRule("UPGard")
    with pytest.raises(InputError, match="no rule 'ConFIG'"):  # it does not weight rows
        TorchJDRule("ConFIG")
    with pytest.raises(InputError, match=r"torchjd:MGDA': no option 'eps'; it takes epsilon, max"):
        TorchJDRule("MGDA", eps=1)
    with pytest.raises(InputError, match=r"torchjd:Mean': no option 'c'; it takes none"):
        TorchJDRule("Mean", c=1)
    with pytest.raises(
        InputError,
        match=r"torchjd:Krum' needs n_byz.*torchjd:Krum.n_byzantine=..., .* TorchJDRule\(",
    ):
        TorchJDRule("Krum")
    with pytest.raises(InputError, match="torchjd:MGDA': max_iters must be an integer"):
        TorchJDRule("MGDA", max_iters=1.5)
    with pytest.raises(InputError, match=r"torchjd:Constant': lists must hold numbers"):
        TorchJDRule("Constant", weights=["a"])
    with pytest.raises(InputError, match="torchjd:MGDA': epsilon must be positive"):
        TorchJDRule("MGDA", epsilon=-1)
    with pytest.raises(InputError, match="an aggregator of TorchJD that weights rows"):
        TorchJDRule(MGDAWeighting())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="and no options, got a Mean"):
        TorchJDRule(torchjd.aggregation.Mean(), c=1)
    with pytest.raises(InputError, match=r"torchjd:Krum': .* at least 4 rows"):
        TorchJDRule("Krum", n_byzantine=1)(gradients_of(make_rows(tasks=3)))
    rows = make_rows()
    rows[2, 0] = float("inf")
    with pytest.raises(InputError, match="gradient of task 2 is not finite"):
        TorchJDRule("UPGrad")(gradients_of(rows))
    with pytest.raises(InputError, match="the state belongs to another rule"):
        TorchJDRule("PCD").load_state_dict(TorchJDRule("Mean").state_dict())
    nan = OPTIONS["Constant"]["weights"] * float("nan")
    with pytest.raises(
        InputError, match="torchjd:Constant': TorchJD gave weights that are not fin"
    ):
        TorchJDRule("Constant", weights=nan)(gradients_of(make_rows()))


@pytest.mark.parametrize(
    ("name", "extra"),
    [("UPGrad", "quadprog_projector"), ("CAGrad", "cagrad"), ("NashMTL", "nash_mtl")],
)
def test_missing_solvers_are_named(name, extra, monkeypatch):
    monkeypatch.setattr("torchjd._mixins.find_spec", lambda module: None)
    with pytest.raises(InputError, match=rf"torchjd:{name}': .*pip install \"torchjd\[{extra}\]\""):
        TorchJDRule(name)


def test_short_gradients_are_zero_to_some():
    """As documented: below a squared length of 1e-4 in all, and how to lower that."""
    rows = make_rows()
    short = gradients_of(rows * (1e-3 / rows.norm()))
    assert torch.allclose(TorchJDRule("UPGrad")(short).effective, torch.tensor(1 / TASKS).double())
    assert TorchJDRule("CAGrad")(short).effective.tolist() == [0] * TASKS
    lower = TorchJDRule("CAGrad", norm_eps=1e-10)(short).effective
    wanted = TorchJDRule("CAGrad", norm_eps=1e-10)(gradients_of(rows)).effective
    torch.testing.assert_close(lower, wanted, rtol=1e-4, atol=1e-4)
    projector = QuadprogProjector(norm_eps=1e-12)
    lower = TorchJDRule("UPGrad", projector=projector)(short).effective
    wanted = TorchJDRule("UPGrad", projector=projector)(gradients_of(rows)).effective
    torch.testing.assert_close(lower, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(lower, torch.tensor(1 / TASKS).double())


def test_nobody_is_blamed_where_one_bad_loss_spoils_every_row() -> None:
    """TorchJD's one pass makes NaN of all rows, whichever loss was NaN; rows by themselves tell."""
    model, x, y = make_losses()
    aggregator = GramianWeightedAggregator(AgreementWeighting())
    losses = [(model(x[i]) - y[i]).square().sum() for i in range(TASKS)]
    losses[1] = losses[1] * float("nan")
    backward(losses)
    with pytest.raises(InputError, match="the task at fault cannot be named") as error:
        jac_to_grad(model.parameters(), aggregator)
    assert "task 0" not in str(error.value)
    rows = make_rows()
    for bad in (float("nan"), float("inf")):
        rows[1, 3] = bad
        with pytest.raises(InputError, match="of task 1 is not finite"):
            aggregator(rows)
        with pytest.raises(InputError, match="of task 1 is not finite"):
            TorchJDRule("UPGrad")(gradients_of(rows))


@pytest.mark.parametrize("name", ["UPGrad", "Mean", "UPGradWeighting"])
def test_torchjds_own_are_no_rules(name: str) -> None:
    own = getattr(torchjd.aggregation, name)()
    with pytest.raises(InputError, match=rf"a {name} for TorchJD, .*make_rule"):
        GradientCollector([torch.nn.Parameter(torch.zeros(2))], own)
