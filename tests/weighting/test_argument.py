"""Each claim of docs/gradient-agreement.md, on numbers; the sections there have the same names."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from gametalearn import MLP, Reptile, Sinusoid, make_rule, meta_gradients
from tests.support.records import record

T, P = 5, 12


def drawn(seed, tasks=T, size=P):
    """Gradients of unequal lengths and some common direction."""
    random = np.random.default_rng(seed)
    return (random.normal(size=(tasks, size)) + 0.5) * random.uniform(0.3, 3, size=(tasks, 1))


def weights_of(name, gradients, updates=None):
    """What a rule of the library makes of gradients ``(T, P)``, and perhaps of inner updates."""
    rows = torch.as_tensor(gradients)
    updates = None if updates is None else torch.as_tensor(updates)
    return make_rule(name)(record(rows, updates=updates)).effective.numpy()


def agreement(gradients, updates=None):
    return weights_of("agreement" if updates is None else "agreement-update", gradients, updates)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def best(gain, bound, start):
    """The weights that scipy finds for the largest ``gain(w)`` with ``bound(w) <= 1``."""
    constraint = {"type": "ineq", "fun": lambda w: 1 - bound(w)}
    options = {"ftol": 1e-10, "maxiter": 2000}  # finer steps are lost in rounding
    found = minimize(
        lambda w: -gain(w), start, method="SLSQP", constraints=[constraint], options=options
    )
    assert found.success
    return found.x


# ---------------------------------------------------------------------------------------------
# What the rule maximises


@pytest.mark.parametrize("seed", range(3))
def test_under_a_bound_on_the_squared_weights_agreement_is_best(seed):
    g = drawn(seed)
    s = g @ g.sum(0)
    found = best(lambda w: w @ s / s.max(), lambda w: w @ w, np.full(T, 0.1))
    assert cosine(found, agreement(g)) == pytest.approx(1, abs=1e-7)


def test_under_a_bound_on_the_absolute_weights_one_task_is_best():
    g = drawn(0)
    s = g @ g.sum(0)
    # w = a - b with a, b >= 0 and sum a + b <= 1
    found = linprog(np.r_[-s, s], A_ub=np.ones((1, 2 * T)), b_ub=[1])
    w = found.x[:T] - found.x[T:]
    assert np.count_nonzero(np.abs(w) > 1e-9) == 1
    assert np.argmax(np.abs(w)) == np.argmax(np.abs(s))
    assert agreement(g) @ s < w @ s  # both have sum |w| = 1


# ---------------------------------------------------------------------------------------------
# Under a bound on the step


@pytest.mark.parametrize("seed", range(3))
def test_under_a_bound_on_the_step_uniform_weights_are_best(seed):
    g = drawn(seed)
    total = g.sum(0)
    scale = np.linalg.norm(total)
    found = best(
        lambda w: w @ g @ total / scale, lambda w: (w @ g) @ (w @ g), np.linspace(0.01, 0.05, T)
    )
    assert found == pytest.approx(np.full(T, 1 / scale), rel=1e-4)
    step = agreement(g) @ g  # of the same length it gains cos(step, total) of that
    assert step @ total / np.linalg.norm(step) == pytest.approx(cosine(step, total) * scale)
    assert cosine(step, total) < 0.999


def test_with_a_preconditioner_uniform_weights_are_best_in_its_own_norm():
    """The step D^-1 sum w_i g_i, with its length measured by D, as natural gradients do."""
    g, random = drawn(1), np.random.default_rng(7)
    root = random.normal(size=(P, P)) + 3 * np.eye(P)
    inverse = np.linalg.inv(root @ root.T)
    total = g.sum(0)
    scale = math.sqrt(total @ inverse @ total)
    found = best(
        lambda w: w @ g @ inverse @ total / scale,
        lambda w: w @ g @ inverse @ g.T @ w,
        np.linspace(0.01, 0.05, T),
    )
    assert found == pytest.approx(np.full(T, 1 / scale), rel=1e-3)


def test_for_fresh_tasks_the_mean_is_the_unbiased_one():
    """Anisotropic noise: over many meta-batches uniform points along m, agreement beside it."""
    m, spread = np.array([1.0, 1.0, 1.0, 0.0]), np.array([3.0, 1.0, 0.3, 1.0])
    random, tasks, count = np.random.default_rng(0), 4, 200_000
    g = m + spread * random.normal(size=(count, tasks, 4))
    s = np.einsum("bip,bp->bi", g, g.sum(1))
    found = np.einsum("bi,bip->p", s, g) / count / tasks
    expected = (tasks * m @ m + (spread**2).sum()) * m + (tasks + 1) * spread**2 * m
    assert found == pytest.approx(expected, rel=0.01, abs=0.4)
    assert cosine(g.mean((0, 1)), m) > 0.9999
    assert cosine(expected, m) == pytest.approx(0.894, abs=0.001)
    # with noise alike in all directions the expected direction is that of m
    assert cosine((tasks * m @ m + 4) * m + (tasks + 1) * m, m) == pytest.approx(1)


# ---------------------------------------------------------------------------------------------
# One power iteration


@pytest.mark.parametrize("seed", range(5))
def test_agreement_is_one_power_iteration_from_the_mean(seed):
    g = drawn(seed)
    moment, mean = g.T @ g, g.mean(0)  # sum_i g_i g_i^T, uncentred
    step = agreement(g) @ g
    assert cosine(step, moment @ mean) == pytest.approx(1, abs=1e-12)
    assert cosine(agreement(g), (g @ g.T).sum(1)) == pytest.approx(1, abs=1e-12)
    centred = np.cov(g.T, bias=True) * len(g)
    assert cosine(step, centred @ mean) < 0.999
    first = np.linalg.eigh(moment)[1][:, -1]
    assert abs(cosine(step, first)) > abs(cosine(mean, first))
    assert step @ moment @ step / (step @ step) > mean @ moment @ mean / (mean @ mean)
    assert step @ mean > 0  # whatever the signs of the weights
    for _ in range(500):
        step = moment @ step / np.linalg.norm(moment @ step)
    assert abs(cosine(step, first)) == pytest.approx(1, abs=1e-6)


def test_of_orthogonal_gradients_the_iteration_changes_lengths_alone():
    lengths = np.array([1.0, 2.0, 3.0])
    g = np.diag(lengths)
    assert agreement(g) == pytest.approx(lengths**2 / (lengths**2).sum())
    assert agreement(np.eye(3)) == pytest.approx([1 / 3] * 3)  # and of equal ones nothing


# ---------------------------------------------------------------------------------------------
# The paper's signal: inner updates


def test_for_reptile_the_two_signals_are_one():
    torch.manual_seed(0)
    found = meta_gradients(MLP(1, 1, (8,)), Sinusoid().sample(4), Reptile(0.02, 3))
    assert torch.equal(found.rows, found.updates)
    one = agreement(found.rows.numpy())
    assert np.array_equal(one, agreement(found.rows.numpy(), found.updates.numpy()))


@pytest.mark.parametrize("seed", range(3))
def test_weights_of_updates_maximise_neither_gain(seed):
    g, v = drawn(seed), drawn(seed + 100)
    w = agreement(g, v)
    size = np.linalg.norm(w)
    for total in (g.sum(0), v.sum(0)):  # the gain in the rows, and in the updates
        best_weights = g @ total
        best_weights *= size / np.linalg.norm(best_weights)
        assert w @ g @ total < 0.99 * (best_weights @ g @ total)


def test_it_may_go_uphill():
    g, v = np.array([[1.0, 0.0], [-3.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 0.1]])
    step, total = agreement(g, v) @ g, g.sum(0)
    assert step @ total < 0
    assert agreement(g) @ g @ total > 0


def test_its_expected_direction():
    """(T |n|^2 + tr Cov(v)) m + (T + 1) Cov(g, v) n: along m where v's noise is not g's."""
    random, tasks, count, size = np.random.default_rng(1), 3, 300_000, 3
    m, n = np.array([1.0, 1.0, 0.0]), np.array([0.5, -0.5, 1.0])
    for shared in (0.0, 1.0):
        own = random.normal(size=(count, tasks, size)) * np.array([1.5, 0.5, 1.0])
        g = m + own
        v = n + shared * own + random.normal(size=own.shape)
        s = np.einsum("bip,bp->bi", v, v.sum(1))
        found = np.einsum("bi,bip->p", s, g) / count / tasks
        cross = shared * np.array([1.5, 0.5, 1.0]) ** 2
        variance = 1 + shared * np.array([1.5, 0.5, 1.0]) ** 2
        expected = (tasks * n @ n + variance.sum()) * m + (tasks + 1) * cross * n
        assert found == pytest.approx(expected, rel=0.02, abs=0.1)
        assert (cosine(expected, m) > 0.999) == (shared == 0)


# ---------------------------------------------------------------------------------------------
# The product with itself


def equal_cosines(tasks, rho, lengths=None):
    """Gradients whose every two have the cosine rho."""
    gram = np.full((tasks, tasks), rho)
    np.fill_diagonal(gram, 1.0)
    lengths = np.ones(tasks) if lengths is None else np.asarray(lengths)
    return lengths[:, None] * np.linalg.cholesky(gram)


@pytest.mark.parametrize(
    ("tasks", "rho", "share"), [(4, 0.014, 0.96), (16, 0.033, 0.67), (16, 0.014, 0.83)]
)
def test_the_product_with_itself_is_most_of_a_score(tasks, rho, share):
    g = equal_cosines(tasks, rho)
    s = g @ g.sum(0)
    found = (g * g).sum(1) / s
    assert found == pytest.approx(np.full(tasks, 1 / (1 + (tasks - 1) * rho)))
    assert found == pytest.approx(np.full(tasks, share), abs=0.005)


@pytest.mark.parametrize(("tasks", "rho"), [(4, 0.014), (16, 0.033), (16, 0.5)])
def test_a_weight_grows_with_the_length_to_the_power_of_one_plus_that_share(tasks, rho):
    def score(length):
        g = equal_cosines(tasks, rho, [length] + [1.0] * (tasks - 1))
        w = agreement(g)
        return math.log(w[0] / w[1]), math.log(w[0] * np.abs(g @ g.sum(0)).sum())

    step = 1e-5
    share = 1 / (1 + (tasks - 1) * rho)
    exponent = (score(1 + step)[1] - score(1 - step)[1]) / (2 * step)
    assert exponent == pytest.approx(1 + share, abs=1e-4)
    # of weights beside each other a little less: a longer one lifts the others' scores too
    beside = (score(1 + step)[0] - score(1 - step)[0]) / (2 * step)
    assert beside == pytest.approx(1 + share - rho * share, abs=1e-4)


# ---------------------------------------------------------------------------------------------
# Long, noisy and opposed gradients


def test_a_long_gradient_counts_by_the_cube_of_its_length():
    lengths = np.array([4.0, 1.0, 1.0, 1.0])
    g = np.diag(lengths)
    part = agreement(g) * lengths  # the length of each task's part of the update
    assert part / part[1] == pytest.approx(lengths**3)
    mean = weights_of("uniform", g) * lengths
    assert mean / mean[1] == pytest.approx(lengths)
    unit = weights_of("normalized-mean", g) * lengths
    assert unit / unit[1] == pytest.approx(np.ones(4))


def test_a_noisy_gradient_gets_more_weight_where_it_should_get_less():
    random, size, count = np.random.default_rng(2), 200, 300
    m = np.ones(size) / math.sqrt(size)
    sigma = np.array([0.05, 0.05, 0.05, 0.2])
    found: dict[str, list[float]] = {
        name: [] for name in ("agreement", "uniform", "normalized-mean", "inverse variance")
    }
    weights = []
    for _ in range(count):
        g = m + sigma[:, None] * random.normal(size=(4, size))
        for name in list(found)[:3]:
            w = weights_of(name, g)
            found[name].append(cosine(w @ g, m))
            if name == "agreement":
                weights.append(w)
        found["inverse variance"].append(cosine(sigma**-2.0 @ g, m))
    mean = np.mean(weights, 0)
    # E s_i = T |m|^2 + P sigma_i^2
    expected = 4 + size * sigma**2
    assert mean == pytest.approx(expected / expected.sum(), rel=0.03)
    ranked = sorted(found, key=lambda name: np.mean(found[name]))
    assert ranked == ["agreement", "uniform", "normalized-mean", "inverse variance"]
    assert np.mean(found["uniform"]) - np.mean(found["agreement"]) > 0.05


@pytest.mark.parametrize("tasks", [3, 4, 16])
def test_an_opposed_task_is_turned_round_only_below_a_cosine(tasks):
    """Of equal lengths: below a mean cosine to the others of -1 / (T - 1)."""
    for off, negative in ((0.9, False), (1.1, True)):
        rho = -off / (tasks - 1)
        gram = np.full((tasks, tasks), 0.9)  # the others agree closely
        gram[0, 1:] = gram[1:, 0] = rho
        np.fill_diagonal(gram, 1.0)
        w = agreement(np.linalg.cholesky(gram))
        assert (w[0] < 0) == negative
        assert (w[1:] > 0).all()


def test_of_two_tasks_only_the_shorter_can_be_turned_round():
    for angle in np.linspace(0.1, math.pi - 0.1, 20):
        g = np.array([[2.0, 0.0], [math.cos(angle), math.sin(angle)]])
        w = agreement(g)
        assert w[0] > 0
        assert (w[1] < 0) == (math.cos(angle) < -1 / 2)


def test_one_long_opposed_task_outvotes_the_others():
    line = np.array([[1.0], [1.0], [1.0], [-4.0]])
    g = line @ np.array([[0.6, 0.8]])
    assert agreement(g) == pytest.approx(np.array([-1, -1, -1, 4]) / 7)
    updates = {
        name: float((weights_of(name, g) @ line)[0])
        for name in ("uniform", "agreement", "agreement-cosine", "normalized-mean")
    }
    assert updates["uniform"] == pytest.approx(-1 / 4)
    assert updates["agreement"] == pytest.approx(-19 / 7)
    assert updates["normalized-mean"] > 0
    assert updates["agreement-cosine"] > 0
    assert float((weights_of("geometric-median", g) @ line)[0]) == pytest.approx(1)
