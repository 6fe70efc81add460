"""Convolution and normalisation, closed under double differentiation and batched over tasks.

PyTorch differentiates a convolution's backward by a chain of transposed convolutions, and a batch
normalisation's by twenty element-wise passes. Here each layer is a family of `autograd.Function`s
whose derivatives are members of the family again, each one call to a native kernel:

- Convolution: ``<g, conv(x, w)>`` is linear in each of x, w, g; its three partial derivatives are
  the forward convolution, the input gradient and the weight gradient, and so are theirs.
- Batch normalisation, with a ReLU and a max-pool behind it: the Jacobian is
  ``gamma r (I - 11'/N - xh xh'/N)``; its derivative is written out in `gametalearn.engine.kernels`.

Under `torch.func.vmap` the tasks are folded into the channels, ``(B, T C, H, W)`` in channels-last
memory: a convolution with per-task weights is then one grouped convolution, and per-task batch
statistics are ordinary per-channel ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gametalearn.engine import kernels

__all__ = ["conv2d", "max_pool2d", "norm_relu", "norm_relu_pool"]

Pair = tuple[int, int]
Pool = tuple[Pair, Pair, Pair]
"""Kernel, stride and padding."""


def _fold(x: Tensor, dim: int | None, tasks: int) -> Tensor:
    """``(B, C, H, W)`` with tasks at ``dim`` (or shared) to ``(B, T C, H, W)``, channels last."""
    if dim is None:
        x = x.unsqueeze(1).expand(-1, tasks, *x.shape[1:])
    elif dim != 1:  # an operator that changes nothing takes as long to trace as any other
        x = x.movedim(dim, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:]).contiguous(memory_format=torch.channels_last)


def _fold_first(w: Tensor, dim: int | None, tasks: int) -> Tensor:
    """``(O, *)`` with tasks at ``dim`` (or shared) to ``(T O, *)``, images in channels-last memory."""
    if dim is None:
        w = w.unsqueeze(0).expand(tasks, *w.shape)
    elif dim != 0:
        w = w.movedim(dim, 0)
    if w.ndim == 5 and dim is None:  # one copy, to channels-last memory at once
        return w.permute(0, 1, 3, 4, 2).flatten(0, 1).contiguous().permute(0, 3, 1, 2)
    w = w.reshape(-1, *w.shape[2:])
    return w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w


def _fold_all(tasks: int, dims: Any, *tensors: Tensor) -> list[Tensor]:
    """Fold images and per-channel tensors alike."""
    return [
        (_fold if t.ndim - (d is not None) == 4 else _fold_first)(t, d, tasks)
        for t, d in zip(tensors, dims, strict=False)
    ]


def _unfold_all(result: Any, tasks: int) -> tuple[Any, Any]:
    """The opposite for the results of an operator, and the dimensions of the tasks."""
    tensors = (result,) if isinstance(result, Tensor) else result
    unfolded = tuple(
        t.unflatten(1, (tasks, -1)) if t.ndim == 4 else t.view(tasks, -1) for t in tensors
    )
    dims = tuple(int(t.ndim == 4) for t in tensors)
    return (unfolded[0], dims[0]) if isinstance(result, Tensor) else (unfolded, dims)


def _laid(value: Any) -> Any:
    """Images in channels-last memory, as the kernels take them (folded ones lie so already)."""
    if isinstance(value, Tensor) and value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _materialised(
    cotangents: tuple[Tensor | None, ...], *like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    y, gamma = like
    v, ug, ub = cotangents
    return (
        torch.zeros_like(y) if v is None else v,
        torch.zeros_like(gamma) if ug is None else ug,
        torch.zeros_like(gamma) if ub is None else ub,
    )


class _Conv(Function):
    """``conv(x, w)``."""

    generate_vmap_rule = False

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, stride: Pair, padding: Pair, dil: Pair, groups: int
    ) -> Tensor:
        return kernels.conv(_laid(x), _laid(w), stride, padding, dil, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.options = inputs[2:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        gx = _ConvInput.apply(g, w, x.shape, *ctx.options) if ctx.needs_input_grad[0] else None
        gw = _ConvWeight.apply(x, g, w.shape, *ctx.options) if ctx.needs_input_grad[1] else None
        return gx, gw, None, None, None, None

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, w: Tensor, s: Pair, p: Pair, d: Pair, g: int) -> Any:
        n = info.batch_size
        y = _Conv.apply(_fold(x, dims[0], n), _fold_first(w, dims[1], n), s, p, d, g * n)
        return y.unflatten(1, (n, -1)), 1


class _ConvInput(Function):
    """The derivative of ``<g, conv(x, w)>`` in x."""

    @staticmethod
    def forward(g: Tensor, w: Tensor, shape: Any, s: Pair, p: Pair, d: Pair, groups: int) -> Tensor:
        return kernels.conv_input(_laid(g), _laid(w), shape, s, p, d, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        g, w = ctx.saved_tensors
        gg = _Conv.apply(v, w, *ctx.options) if ctx.needs_input_grad[0] else None
        gw = _ConvWeight.apply(v, g, w.shape, *ctx.options) if ctx.needs_input_grad[1] else None
        return gg, gw, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        dims: Any,
        g: Tensor,
        w: Tensor,
        shape: Any,
        s: Pair,
        p: Pair,
        d: Pair,
        groups: int,
    ) -> Any:
        n = info.batch_size
        folded = (shape[0], shape[1] * n, *shape[2:])
        g, w = _fold(g, dims[0], n), _fold_first(w, dims[1], n)
        x = _ConvInput.apply(g, w, folded, s, p, d, groups * n)
        return x.unflatten(1, (n, -1)), 1


class _ConvWeight(Function):
    """The derivative of ``<g, conv(x, w)>`` in w."""

    @staticmethod
    def forward(x: Tensor, g: Tensor, shape: Any, s: Pair, p: Pair, d: Pair, groups: int) -> Tensor:
        return kernels.conv_weight(_laid(x), _laid(g), shape, s, p, d, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        x, g = ctx.saved_tensors
        gx = _ConvInput.apply(g, u, x.shape, *ctx.options) if ctx.needs_input_grad[0] else None
        gg = _Conv.apply(x, u, *ctx.options) if ctx.needs_input_grad[1] else None
        return gx, gg, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        dims: Any,
        x: Tensor,
        g: Tensor,
        shape: Any,
        s: Pair,
        p: Pair,
        d: Pair,
        groups: int,
    ) -> Any:
        n = info.batch_size
        folded = (shape[0] * n, *shape[1:])
        x, g = _fold(x, dims[0], n), _fold(g, dims[1], n)
        w = _ConvWeight.apply(x, g, folded, s, p, d, groups * n)
        return w.unflatten(0, (n, -1)), 0


def conv2d(
    x: Tensor, w: Tensor, b: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """`torch.nn.functional.conv2d` of ``(B, C, H, W)``, with numeric pairs for its options."""
    y: Tensor = _Conv.apply(x, w, stride, padding, dilation, groups)
    return y if b is None else y + b.view(-1, 1, 1)


class _Norm(Function):
    """`kernels.norm`. Its mean and r, which the derivatives share, are constants to autograd."""

    @staticmethod
    def forward(
        y: Tensor, gamma: Tensor, beta: Tensor, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.norm(_laid(y), gamma, beta, eps, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, gamma, _, _, ctx.relu = inputs
        z, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        # The activation's mask is read off its output. Without one the output may be overwritten.
        ctx.save_for_backward(y, gamma, mean, r, z if ctx.relu else mean)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        return *_NormGrad.apply(g, *ctx.saved_tensors, ctx.relu), None, None

    @staticmethod
    def vmap(
        info: Any, dims: Any, y: Tensor, gamma: Tensor, beta: Tensor, eps: float, relu: bool
    ) -> Any:
        n = info.batch_size
        return _unfold_all(_Norm.apply(*_fold_all(n, dims, y, gamma, beta), eps, relu), n)


class _NormGrad(Function):
    """`kernels.norm_grad`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.norm_grad(*map(_laid, args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.relu = inputs[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:-1], *output[:2])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        y, gamma = ctx.saved_tensors[:2]
        v, ug, ub = _materialised(cotangents, y, gamma)
        out = _NormGradGrad.apply(v, ug, ub, *ctx.saved_tensors, ctx.relu)
        return *out, None, None, None, None

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Any) -> Any:
        n = info.batch_size
        return _unfold_all(_NormGrad.apply(*_fold_all(n, dims, *args[:-1]), args[-1]), n)


class _NormGradGrad(Function):
    """`kernels.norm_grad_grad`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.norm_grad_grad(*map(_laid, args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("third derivatives of batch normalisation")

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Any) -> Any:
        n = info.batch_size
        return _unfold_all(_NormGradGrad.apply(*_fold_all(n, dims, *args[:-1]), args[-1]), n)


def norm_relu(y: Tensor, gamma: Tensor, beta: Tensor, eps: float, relu: bool) -> Tensor:
    """Batch normalisation of ``(B, C, H, W)`` by its own statistics, and ReLU if asked."""
    z: Tensor = _Norm.apply(y, gamma, beta, eps, relu)[0]
    return z


class _NormPool(Function):
    """`kernels.norm_pool`, for gamma >= 0."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return kernels.norm_pool(*map(_laid, args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        z, mean, r, peak, index = output
        ctx.relu = inputs[-1]
        ctx.mark_non_differentiable(mean, r, peak, index)
        ctx.save_for_backward(*inputs[:2], mean, r, z if ctx.relu else mean, peak, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        return *_NormPoolGrad.apply(g, *ctx.saved_tensors, ctx.relu), *[None] * 5

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Any) -> Any:
        n = info.batch_size
        return _unfold_all(_NormPool.apply(*_fold_all(n, dims, *args[:3]), *args[3:]), n)


class _NormPoolGrad(Function):
    """`kernels.norm_pool_grad`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.norm_pool_grad(*map(_laid, args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.relu = inputs[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], *output[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        _, y, gamma = ctx.saved_tensors[:3]
        v, ug, ub = _materialised(cotangents, y, gamma)
        out = _NormPoolGradGrad.apply(v, ug, ub, *ctx.saved_tensors, ctx.relu)
        return *out, *[None] * 6

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Any) -> Any:
        n = info.batch_size
        return _unfold_all(_NormPoolGrad.apply(*_fold_all(n, dims, *args[:-1]), args[-1]), n)


class _NormPoolGradGrad(Function):
    """`kernels.norm_pool_grad_grad`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.norm_pool_grad_grad(*map(_laid, args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("third derivatives of batch normalisation")

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Any) -> Any:
        n = info.batch_size
        return _unfold_all(_NormPoolGradGrad.apply(*_fold_all(n, dims, *args[:-1]), args[-1]), n)


def norm_relu_pool(
    y: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: Pool, relu: bool
) -> Tensor:
    """`norm_relu`, then a max-pool, where every gamma is positive or zero."""
    z: Tensor = _NormPool.apply(y, gamma, beta, eps, *pool, relu)[0]
    return z


class _MaxPool(Function):
    """The maxima and their indices, flat in H W."""

    @staticmethod
    def forward(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> tuple[Tensor, Tensor]:
        return kernels.max_pool(_laid(x), kernel, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.size = inputs[0].shape[2:]

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        return _Scatter.apply(g, *ctx.saved_tensors, *ctx.size), None, None, None

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, *pool: Pair) -> Any:
        n = info.batch_size
        return _unfold_all(_MaxPool.apply(_fold(x, dims[0], n), *pool), n)


class _Scatter(Function):
    """`kernels.scatter`, the derivative of a max-pool."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, height: int, width: int) -> Tensor:
        return kernels.scatter(_laid(x), _laid(index), height, width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Gather.apply(g, *ctx.saved_tensors), None, None, None

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, index: Tensor, height: int, width: int) -> Any:
        n = info.batch_size
        return _unfold_all(_Scatter.apply(*_fold_all(n, dims, x, index), height, width), n)


class _Gather(Function):
    """`kernels.gather`, the derivative of `_Scatter`."""

    @staticmethod
    def forward(x: Tensor, index: Tensor) -> Tensor:
        return kernels.gather(_laid(x), _laid(index))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.size = inputs[0].shape[2:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Scatter.apply(g, *ctx.saved_tensors, *ctx.size), None

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Tensor) -> Any:
        n = info.batch_size
        return _unfold_all(_Gather.apply(*_fold_all(n, dims, *args)), n)


def max_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """`torch.nn.functional.max_pool2d` of ``(B, C, H, W)``, with numeric pairs for its options."""
    y: Tensor = _MaxPool.apply(x, kernel, stride, padding)[0]
    return y
