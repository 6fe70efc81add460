"""What of the inner loop changes from one meta-iteration to the next: MAML++'s annealings.

Pure functions of the iteration's number, so that a run that is resumed goes on as it would have.
"""

from __future__ import annotations

import dataclasses

from gametalearn.adaptation import MAML, Learner

__all__ = ["PHASES", "learner_at", "step_weights"]

PHASES = 10
"""Sets of weights that the multi-step loss goes through; the engine traces each set anew."""


def step_weights(steps: int, iteration: int, iterations: int) -> tuple[float, ...]:
    """MAML++'s weights of the query losses after each of K inner steps; empty for the last alone.

    Antoniou et al. 2019 (arXiv 1810.09502), section 4, as in their code: all 1/K at first; each but
    the last one's falls linearly, down to 0.03/K at the least, and the last one's gains what they
    lose; after ``iterations`` meta-iterations the last loss counts alone. Theirs change with every
    epoch (15 of them); ours in `PHASES` phases of equal length.

    Args:
        steps: inner steps K.
        iteration: counted from 0.
        iterations: how long the multi-step loss lasts; 0 is never.

    >>> step_weights(2, 0, 100), step_weights(2, 50, 100), step_weights(2, 100, 100)
    ((0.5, 0.5), (0.25, 0.75), ())
    """
    if steps < 2 or iteration >= iterations:
        return ()
    done = iteration * PHASES // iterations / PHASES
    early = max((1 - done) / steps, 0.03 / steps)
    return (early,) * (steps - 1) + (1 - early * (steps - 1),)


def learner_at(
    learner: Learner, iteration: int, *, first_order_until: int = 0, multi_step_loss: int = 0
) -> Learner:
    """The inner loop of one meta-iteration, counted from 0.

    Args:
        learner: without annealing.
        iteration: counted from 0.
        first_order_until: iterations that ignore second derivatives (MAML++'s derivative-order
            annealing, Antoniou et al. 2019, section 4).
        multi_step_loss: iterations over which `step_weights` anneal; with 0 the learner keeps its own.
    """
    if not isinstance(learner, MAML):
        return learner
    weights = learner.step_weights
    if multi_step_loss:
        weights = step_weights(learner.steps, iteration, multi_step_loss)
    first_order = learner.first_order or iteration < first_order_until
    if (weights, first_order) == (learner.step_weights, learner.first_order):
        return learner
    return dataclasses.replace(learner, step_weights=weights, first_order=first_order)
