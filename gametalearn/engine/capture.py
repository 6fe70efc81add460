"""Replace a module's convolutions, batch norms and poolings by the engine's own while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gametalearn.engine import layers

__all__ = ["Capture", "UntraceableError"]


class UntraceableError(Exception):
    """The module cannot be replayed; the message says why."""


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]


Norm = tuple[Tensor, Tensor, Tensor, float]
"""What is normalised, gamma, beta and eps."""


class Capture(TorchFunctionMode):
    """Within this context, plain 2-d layers of any module are computed by `gametalearn.engine.layers`.

    A ReLU (in place or not) that follows a batch norm is fused with it, a max-pool that follows
    with both. What was computed for the unfused layer then has no reader, and the traced program
    drops it.
    """

    def __init__(self) -> None:
        super().__init__()
        # By identity of the result, which is kept alive: how it came about.
        self.convolved: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}
        self.normed: dict[int, tuple[Tensor, Norm, bool]] = {}
        self.overwritten: dict[int, Tensor] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.overwritten:
            args = tuple(self.overwritten.get(id(a), a) for a in args)
        rule = _RULES.get(func)
        result = None if rule is None else rule(self, *args, **kwargs)
        return func(*args, **kwargs) if result is None else result

    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        if x.ndim != 4 or isinstance(padding, str):
            return None
        options = _pair(stride), _pair(padding), _pair(dilation), groups
        y = layers.conv2d(x, weight, bias, *options)
        self.convolved[id(y)] = y, (x, weight, options)
        return y

    def batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        if not training or x.numel() // x.shape[1] < 2:
            return None
        if x.ndim != 4:  # running statistics would be updated, and thrown away
            return F.batch_norm(x, None, None, weight, bias, True, momentum, eps)
        weight = x.new_ones(x.shape[1]) if weight is None else weight
        bias = x.new_zeros(x.shape[1]) if bias is None else bias
        z = layers.norm_relu(x, weight, bias, eps, False)
        self.normed[id(z)] = z, (x, weight, bias, eps), False
        return z

    def relu(self, x: Tensor, inplace: bool = False) -> Tensor | None:
        if id(x) not in self.normed:
            return None
        _, norm, _ = self.normed[id(x)]
        z = layers.norm_relu(*norm, True)
        self.normed[id(z)] = z, norm, True
        if inplace:  # whoever reads x from now on shall see z
            self.overwritten[id(x)] = z
        return z

    def relu_(self, x: Tensor) -> Tensor | None:
        return self.relu(x, True)

    def max_pool2d(
        self,
        x: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor | None:
        if x.ndim != 4 or _pair(dilation) != (1, 1) or ceil_mode or return_indices:
            return None
        kernel = _pair(kernel_size)
        pool = kernel, _pair(stride) if stride else kernel, _pair(padding)
        if id(x) not in self.normed:
            return layers.max_pool2d(x, *pool)
        _, (y, gamma, beta, eps), relu = self.normed[id(x)]
        # max(gamma y) = gamma max(y) needs gamma >= 0: a negative sign moves to the convolution,
        # or to y. The convolution's bias has no effect.
        sign = torch.where(gamma.detach() < 0, -1.0, 1.0).to(gamma.dtype)
        if id(y) in self.convolved:
            _, (inputs, weight, options) = self.convolved[id(y)]
            y = layers.conv2d(inputs, weight * sign.view(-1, 1, 1, 1), None, *options)
        else:
            y = y * sign.view(-1, 1, 1)
        return layers.norm_relu_pool(y, gamma * sign, beta, eps, pool, relu)

    def data(self, x: Tensor) -> Tensor:
        return x.detach()  # functorch knows no other way out of a derivative

    def refuse(self, *args: Any, **kwargs: Any) -> Tensor:
        raise UntraceableError("its forward hooks into the backward pass")

    def refuse_data(self, *args: Any, **kwargs: Any) -> Tensor:
        raise UntraceableError("its forward assigns to a tensor's data")


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.data.__get__: Capture.data,  # type: ignore[attr-defined]
    Tensor.data.__set__: Capture.refuse_data,  # type: ignore[attr-defined]
    Tensor.register_hook: Capture.refuse,
    F.conv2d: Capture.conv2d,
    F.batch_norm: Capture.batch_norm,
    F.relu: Capture.relu,
    torch.relu: Capture.relu,
    torch.relu_: Capture.relu_,
    Tensor.relu: Capture.relu,
    Tensor.relu_: Capture.relu_,
    F.max_pool2d: Capture.max_pool2d,
    torch.max_pool2d: Capture.max_pool2d,
}
