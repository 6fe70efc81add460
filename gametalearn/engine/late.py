"""Find models whose backward pass reads parameters when it runs: the inner loop's are not in their place then.

A function that computes its block again, as reversible networks do, or a hook that reads a parameter would get the
model's own ones, and rows, losses and adapted weights would be wrong without a word. (Checkpointed blocks keep what
they computed, see `gametalearn.engine.swap.kept_activations`.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gametalearn.adaptation import Learner, Params, makes_heads
from gametalearn.engine.task import fixed_tensors, is_clean, note_clean, standing_in
from gametalearn.errors import InputError
from gametalearn.losses import Loss, apply_loss

__all__ = ["refuse_late"]

MOVED = 0.1
"""By how much parameters are moved for the look, relative to each entry (and absolutely where it is zero)."""
LATE = 1e-4
"""The difference of two gradients, relative to the largest entry, that is no rounding."""
CONTROL = 20.0
"""How much larger than that of the same gradient computed twice it has to be."""

Gradients = list[Tensor]


def refuse_late(
    model: nn.Module, learner: Learner, loss: Loss, meta: Params, x: Tensor, y: Tensor
) -> None:
    """Refuse a model or a loss whose backward pass reads parameters anew, once for both.

    The gradient of one graph at parameters that were moved a little is computed while these stand in for the model's
    own, twice, and when they no longer do. What cannot be compared, as hooks draw random numbers or keep a
    state or a function may run backward only once, is let pass.

    Args:
        model, learner, loss, meta: as in `gametalearn.meta_gradients`.
        x, y: a support set, ``(S, *x)`` and ``(S, *y)``.

    Raises:
        InputError: it does.
    """
    if is_clean(model, loss, "late") or _get_current_dispatch_mode_stack():
        return
    try:
        found = _gradients(model, learner, loss, meta, x, y)
    except MemoryError:
        raise
    except Exception:  # at other parameters, or on a second backward pass
        found = None
    if found is not None:
        first, again, after = found
        size = max((float(g.abs().max()) for g in first if len(g)), default=0.0)
        bound = max(LATE * size, CONTROL * _apart(first, again))
        if _apart(first, after) > bound:  # never where one is not a number
            raise InputError(
                f"the backward pass of {type(model).__name__} reads its parameters anew, in a gradient hook or in a "
                "function that computes its block again, when the inner loop's are no longer in their place; "
                "read them in the forward, where a hook can hold them, or leave the recomputation out"
            )
    note_clean(model, loss, "late")


def _gradients(
    model: nn.Module, learner: Learner, loss: Loss, meta: Params, x: Tensor, y: Tensor
) -> tuple[Gradients, Gradients, Gradients]:
    """The gradient at moved parameters: while they stand in, again, and afterwards."""
    devices = {p.device for p in meta.values() if p.device.type == "cuda"}
    with (
        torch.random.fork_rng(devices=list(devices)),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        names = {name for name, _ in model.named_parameters()}  # beside learned rates
        moved = _moved({n: p for n, p in meta.items() if n in names})
        wanted = [p for p in moved.values() if p.is_floating_point() or p.is_complex()]
        with standing_in(model, moved, fixed_tensors(model, moved)):
            output = model(x.clone())
            value = (
                output.square().mean()
                if makes_heads(learner)
                else apply_loss(loss, output, y.clone())
            )

            def gradients() -> Gradients:
                found = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True)
                return [_entries(g) for g in found if g is not None]

            first, again = gradients(), gradients()
        return first, again, gradients()


def _moved(params: Params) -> Params:
    """Copies of parameters, each entry moved by up to a tenth, or by that much where it is zero."""
    own = torch.Generator().manual_seed(0)
    found: Params = {}
    for name, p in params.items():
        share = torch.rand(p.shape, generator=own).to(p.device, p.dtype)
        plain = p.detach()
        other = torch.where(plain == 0, MOVED * share, plain * (1 + MOVED * (2 * share - 1)))
        found[name] = other.requires_grad_()
    return found


def _entries(gradient: Tensor) -> Tensor:
    dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
    flat = dense.detach().flatten()
    return torch.view_as_real(flat).double().flatten() if flat.is_complex() else flat.double()


def _apart(one: Gradients, other: Gradients) -> float:
    """The largest difference of two gradients, entry by entry; NaN where one is not finite."""
    return max(
        (float((a - b).abs().max()) for a, b in zip(one, other, strict=True) if len(a)), default=0.0
    )
