"""learn2learn: any rule over its MAML, MetaSGD and ANIL, and its task sets as a source here.

Nothing here imports learn2learn: its objects are handed in. In a learn2learn loop of your own,
`gametalearn.bridges.GradientCollector` adds a rule in three lines; `meta_step` is that loop.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gametalearn.bridges.plain import WeightsFunction, as_rule, flatten, weigh, write_gradient
from gametalearn.episodes import TaskBatch, require_batch
from gametalearn.errors import InputError, require_whole
from gametalearn.gradients import TaskGradients, explained, finite_scores
from gametalearn.losses import Loss, apply_loss, default_loss
from gametalearn.randomness import generator
from gametalearn.scores import ScoreLike, default_score, measured, score_function
from gametalearn.weighting.weights import Rule, Weights

__all__ = ["TasksetSource", "meta_step"]


def meta_step(
    maml: nn.Module,
    batch: TaskBatch,
    rule: Rule | WeightsFunction | None = None,
    *,
    steps: int = 1,
    features: nn.Module | None = None,
    loss: Loss = default_loss,
    score: ScoreLike = default_score,
) -> tuple[Weights, TaskGradients]:
    """One meta-batch through a learn2learn learner: the weighted meta-gradient goes into ``.grad``.

    For each task: ``learner = maml.clone()``, ``steps`` times ``learner.adapt(loss)`` on the
    support set, the loss of the queries, and its gradient. ``.grad`` becomes sum_i w_i g_i (what
    stood there is replaced), scaled like the mean over tasks; then call ``optimizer.step()``.

    Args:
        maml: ``l2l.algorithms.MAML``, ``MetaSGD``, ``GBML``, or a module with their ``clone`` and
            ``adapt``. Order, learning rate, unused and frozen parameters are settled there.
        batch: T episodes, on the module's device.
        rule: any `Rule`, or a function from rows ``(T, P)`` to weights ``(T,)``; default: gradient
            agreement. Rules over losses, accuracies or objectives get them from ``batch``.
        steps: inner steps, 0 or more.
        features: for ANIL, the body: ``maml`` is the head alone, adapted on ``features(x)``, and
            both get gradients. Support and queries pass it apart from one another, as in
            `gametalearn.ANIL`; learn2learn's example passes them together, which makes a difference
            where the body normalises by batch.
        loss, score: as in `meta_gradients`; accuracy or squared error by default.

    Returns:
        The `Weights` and what they were computed from. P counts the parameters that require
        gradients in the order ``features``, ``maml.parameters()`` (for MetaSGD the model's, then
        the rates), which is that of `meta_gradients` where the model's own order is so.

    Raises:
        InputError: a module without ``clone`` and ``adapt`` or parameters; ``steps`` that is no
            number of steps; weights that are not finite; a gradient that is not
            finite, named by its task, if the rule looks at it.

    >>> import learn2learn as l2l
    >>> maml = l2l.algorithms.MAML(nn.Linear(1, 1), lr=0.1)
    >>> optimizer = torch.optim.SGD(maml.parameters(), lr=0.1)
    >>> x = torch.randn(3, 2, 1)  # three tasks of two examples
    >>> batch = TaskBatch(x, 2 * x, x, 2 * x, group=torch.zeros(3, dtype=torch.int64))
    >>> weights, gradients = meta_step(maml, batch)
    >>> optimizer.step()
    >>> weights.effective.shape, gradients.rows.shape
    (torch.Size([3]), torch.Size([3, 2]))
    """
    clone = getattr(maml, "clone", None)
    if not callable(clone) or not callable(getattr(maml, "adapt", None)):
        raise InputError(
            "meta_step: expected learn2learn's MAML, MetaSGD or another module with clone() and "
            f"adapt(), got a {type(maml).__name__}; wrap it: l2l.algorithms.MAML(model, lr=...)"
        )
    require_batch(batch, "meta_step: `batch` is")
    require_whole("meta_step: steps", steps, 0)
    rule = as_rule(rule, "meta_step")
    body = nn.Identity() if features is None else features
    parameters = [
        p for p in dict.fromkeys([*body.parameters(), *maml.parameters()]) if p.requires_grad
    ]
    if not parameters:
        raise InputError("meta_step: no parameter requires gradients")
    function = score_function(score)
    rows, updates, losses, scores = [], [], [], []
    present = [False] * len(parameters)
    for task in range(len(batch)):
        learner: Any = clone()
        x, y = batch.support_x[task], batch.support_y[task]
        query_x, query_y = batch.query_x[task], batch.query_y[task]
        with explained(maml if features is None else features, x):
            for _ in range(steps):
                support_loss = apply_loss(loss, learner(body(x)), y)
                try:
                    learner.adapt(support_loss)
                except UnboundLocalError as error:  # learn2learn prints the reason, and goes on
                    raise InputError(
                        "meta_step: learn2learn could not differentiate the loss (its message stands above); make "
                        "the learner with allow_nograd=True if parameters are frozen, with allow_unused=True if the "
                        "forward leaves some out"
                    ) from error
            arguments = (query_x, x) if getattr(maml, "uses_support", False) else (query_x,)
            prediction = learner(*map(body, arguments))
            query_loss = apply_loss(loss, prediction, query_y)
            gradient = torch.autograd.grad(query_loss, parameters, allow_unused=True)
        present = [p or g is not None for p, g in zip(present, gradient, strict=True)]
        rows.append(flatten(parameters, gradient, "gradient"))
        updates.append(flatten(parameters, _updates(maml, learner, parameters), "update"))
        losses.append(query_loss.detach())
        scores.append(measured(function, loss, prediction, query_y))
    value, points = torch.stack(losses), torch.stack(scores)
    gradients = TaskGradients(
        rows=torch.stack(rows),
        updates=torch.stack(updates),
        loss=value,
        score=finite_scores(maml, loss, function, value, points),
        group=batch.group,
    )
    weights = weigh(rule, gradients)
    write_gradient(parameters, present, weights, gradients.rows)
    return weights, gradients


def _updates(
    maml: nn.Module, learner: nn.Module, parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """theta - theta_i of what the inner loop adapts; None for what it does not have or change."""
    adapted = dict(learner.named_parameters(remove_duplicate=False))
    change: dict[Tensor, Tensor] = {
        p: p - adapted[n] for n, p in maml.named_parameters() if n in adapted
    }
    return [change.get(p) for p in parameters]


class TasksetSource:
    """Episodes from ``l2l.data.Taskset``: a `Source` for `evaluate`, `MixedSource` and your loop.

    A task's examples are sorted by label, and in each class the first ``shots`` become the support
    set, the others the queries, as in ``l2l.data.partition_task``: however the task set orders its
    examples, no class loses its support examples to another.

    learn2learn draws from Python's and torch's global random state. Here both are set from one
    generator for the time of a draw and put back, so equal seeds give equal episodes (unless a
    transform draws from yet another state, such as numpy's). A task set of a fixed number of tasks
    draws task i when it is first asked for; here its make-up depends on i alone, and episodes are
    drawn from the tasks with replacement.

    Args:
        taskset: ``l2l.data.Taskset`` whose transforms end in labels 0 to ways - 1 (NWays, KShots,
            LoadData, RemapLabels).
        ways: classes per task.
        shots: support examples per class; all others of the task are queries.
        seed: any int64; the start of the stream of episodes.
        group: the objective that all tasks belong to.

    `evaluate` warns where it is asked for more episodes than a task set has tasks.

    Inputs reach the model as the task set gives them, floats as they are, uint8 in [0, 1].

    >>> import learn2learn as l2l
    >>> data = torch.utils.data.TensorDataset(torch.randn(60, 2), torch.arange(60) // 10)
    >>> dataset = l2l.data.MetaDataset(data)
    >>> transforms = [
    ...     l2l.data.transforms.NWays(dataset, n=5),
    ...     l2l.data.transforms.KShots(dataset, k=4),
    ...     l2l.data.transforms.LoadData(dataset),
    ...     l2l.data.transforms.RemapLabels(dataset),
    ... ]
    >>> source = TasksetSource(l2l.data.Taskset(dataset, transforms), ways=5, shots=1)
    >>> batch = source.sample(2)
    >>> batch.support_x.shape, batch.query_x.shape
    (torch.Size([2, 5, 2]), torch.Size([2, 15, 2]))

    Raises:
        InputError: no task set. From `sample`: labels other than 0 to ways - 1, classes of
            different sizes or with no example left for queries, an example twice in one task.
    """

    def __init__(
        self, taskset: Any, ways: int, shots: int, *, seed: int = 0, group: int = 0
    ) -> None:
        for method in ("sample_task_description", "get_task"):
            if not hasattr(taskset, method):
                raise InputError(
                    "TasksetSource: expected an l2l.data.Taskset, got a "
                    f"{type(taskset).__name__}; wrap the data set in one"
                )
        for name, value, least in (("ways", ways, 2), ("shots", shots, 1)):
            require_whole(f"TasksetSource: {name}", value, least)
        self.distinct = None if taskset.num_tasks == -1 else len(taskset)
        self.taskset, self.ways, self.shots, self.group = taskset, ways, shots, group
        self._generator = generator(seed)

    def sample(self, num_tasks: int, part: slice = slice(None)) -> TaskBatch:
        """Draw ``num_tasks`` episodes, return those in ``part``; the batch's ``classes`` is None."""
        require_whole("TasksetSource: num_tasks", num_tasks, 1)
        tasks = [self._split(*self._draw()) for _ in range(num_tasks)]
        sizes = sorted({len(query_y) for _, _, _, query_y in tasks})
        if len(sizes) > 1:
            raise InputError(
                f"TasksetSource: tasks of one batch have different numbers of queries: {sizes}; use "
                "l2l.data.transforms.KShots"
            )
        support_x, support_y, query_x, query_y = map(torch.stack, zip(*tasks, strict=True))
        group = torch.full((num_tasks,), self.group)
        return TaskBatch(support_x, support_y, query_x, query_y, group)[part]

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of one task."""
        number, episode = (
            int(torch.randint(high, (), generator=self._generator))
            for high in (len(self.taskset), 2**63 - 1)
        )
        if self.taskset.num_tasks == -1:
            with _seeded(episode):
                return self._load(self.taskset.sample_task_description())
        descriptions = self.taskset.sampled_descriptions
        if number not in descriptions:
            with _seeded(number):
                descriptions[number] = self.taskset.sample_task_description()
        with _seeded(episode):
            return self._load(descriptions[number])

    def _load(self, description: Any) -> tuple[Tensor, Tensor]:
        if description is not None:
            indices = [data.index for data in description]
            if len(set(indices)) < len(indices):
                raise InputError(
                    "TasksetSource: a task contains an example twice, so that support and queries may "
                    "share it; use KShots(..., replacement=False)"
                )
        x, y = self.taskset.get_task(description)
        return torch.as_tensor(x), torch.as_tensor(y)

    def _split(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if y.is_floating_point() or y.ndim != 1:
            raise InputError(
                f"TasksetSource: labels must be (N,) integers, got {tuple(y.shape)} {y.dtype}"
            )
        classes, counts = torch.unique(y, return_counts=True)
        if classes.tolist() != list(range(self.ways)):
            raise InputError(
                f"TasksetSource: {self.ways} ways requested, but a task has the labels "
                f"{classes.tolist()[:8]}; add l2l.data.transforms.RemapLabels, or change ways"
            )
        if len(set(counts.tolist())) > 1 or int(counts[0]) <= self.shots:
            raise InputError(
                f"TasksetSource: every class needs the same number of examples, more than {self.shots}, "
                f"but a task has {counts.tolist()[:8]} per class; use KShots(k = shots + queries)"
            )
        if x.dtype == torch.uint8:
            x = x.to(torch.float32) / 255
        each = int(counts[0])
        order = y.argsort(stable=True).view(self.ways, each)
        support, query = order[:, : self.shots].flatten(), order[:, self.shots :].flatten()
        y = y.to(torch.int64)
        return x[support], y[support], x[query], y[query]

    def with_seed(self, seed: int) -> TasksetSource:
        """An independent source over the same task set that starts from ``seed``."""
        return TasksetSource(self.taskset, self.ways, self.shots, seed=seed, group=self.group)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state; restoring it continues the stream of episodes exactly."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._generator.set_state(state["generator"])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's and torch's global random state from ``seed``, and as they were again afterwards."""
    before = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(before)
