"""The least a meta-gradient could take: its convolutions and matrix products alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from gametalearn.adaptation import Learner, Params
from gametalearn.engine.kernels import PLAIN
from gametalearn.engine.making import program_for
from gametalearn.engine.plan import Plan
from gametalearn.engine.quantities import GRADIENTS
from gametalearn.engine.replay import chunks_of, program_inputs
from gametalearn.engine.task import Data, Loss, Recipe
from gametalearn.engine.workers import run_all
from gametalearn.scores import default_score

__all__ = ["floor_of"]

aten, own = torch.ops.aten, torch.ops.gametalearn
HEAVY = {
    *(PLAIN[f] for f in (own.conv.default, own.conv_input.default, own.conv_weight.default)),
    *(aten.convolution.default, aten.convolution_backward.default),
    *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default),
}


class _Tally(Interpreter):
    """Counts the heavy steps of a program by operator, geometry of tensors and other arguments."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.calls: Counter[Any] = Counter()

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and n.target in HEAVY:
            args = tuple(_geometry(a) for a in self.fetch_args_kwargs_from_env(n)[0])
            self.calls[n.target, args] += 1
        return super().run_node(n)


def _geometry(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), tuple(value.stride()), value.dtype, value.device
    return tuple(value) if isinstance(value, list | tuple) else value


def _tensor(value: Any) -> Any:
    if isinstance(value, tuple) and value and value[0] == "tensor":
        _, shape, stride, dtype, device = value
        size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        return torch.rand(size, dtype=dtype, device=device).sub_(0.5).as_strided(shape, stride)
    return value


def floor_of(
    model: nn.Module, learner: Learner, loss: Loss, meta: Params, data: Data, plan: Plan
) -> Callable[[], None]:
    """A function that computes as many convolutions and products as `replay_gradients` would.

    Of the same shapes and layouts, on made-up numbers, shared out to workers in the same way.
    """
    chunks = chunks_of(data, plan.chunk)
    entry = program_for(GRADIENTS, Recipe(model, learner, loss, default_score), meta, chunks[0])
    if entry.program is None:
        raise TypeError(f"{type(model).__name__} cannot be replayed: {entry.reason}")
    with torch.inference_mode():
        tally = _Tally(entry.program.module)
        tally.run(*program_inputs(model, meta), *chunks[0])
        calls = [
            (operator, [_tensor(a) for a in args], count)
            for (operator, args), count in tally.calls.items()
        ]

    def chunk() -> None:
        with torch.inference_mode():
            for operator, args, count in calls:
                for _ in range(count):
                    operator(*args)

    def run() -> None:
        run_all([chunk] * len(chunks), plan.workers)

    return run
