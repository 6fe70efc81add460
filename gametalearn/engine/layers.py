"""Convolution and normalisation, closed under double differentiation and batched over tasks.

PyTorch differentiates a convolution's backward by a chain of transposed convolutions, and a batch
normalisation's by twenty element-wise passes. Here each layer is a family of `autograd.Function`s
whose derivatives are members of the family again, each one call to a native kernel:

- Convolution: ``<g, conv(x, w)>`` is linear in each of x, w, g; its three partial derivatives are
  the forward convolution, the input gradient and the weight gradient, and so are theirs.
- Normalisation (+ ReLU): the Jacobian is ``gamma r (I - 11'/N - xh xh'/N)``, its derivative is
  written out below.

Under `torch.func.vmap` the tasks are folded into the channels, ``(B, T C, H, W)`` in channels-last
memory: a convolution with per-task weights is then one grouped convolution, and per-task batch
statistics are ordinary per-channel ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["conv2d", "norm_relu"]

aten = torch.ops.aten
Pair = tuple[int, int]


def _fold(x: Tensor, dim: int | None, tasks: int) -> Tensor:
    """``(B, C, H, W)`` with tasks at ``dim`` (or shared) to ``(B, T C, H, W)``, channels last."""
    x = x.unsqueeze(1).expand(-1, tasks, *x.shape[1:]) if dim is None else x.movedim(dim, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:]).contiguous(memory_format=torch.channels_last)


def _fold_first(w: Tensor, dim: int | None, tasks: int) -> Tensor:
    """``(O, *)`` with tasks at ``dim`` (or shared) to ``(T O, *)``."""
    w = w.unsqueeze(0).expand(tasks, *w.shape) if dim is None else w.movedim(dim, 0)
    w = w.reshape(-1, *w.shape[2:])
    return w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w


class _Conv(Function):
    """``conv(x, w)``."""

    generate_vmap_rule = False

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, stride: Pair, padding: Pair, dil: Pair, groups: int
    ) -> Tensor:
        return aten.convolution(x, w, None, stride, padding, dil, False, (0, 0), groups)  # type: ignore[no-any-return]

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
        x = g.new_empty(1).expand(shape)  # only its shape is used
        mask = [True, False, False]
        return aten.convolution_backward(  # type: ignore[no-any-return]
            g, x, w, None, s, p, d, False, (0, 0), groups, mask
        )[0]

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
        w = g.new_empty(1).expand(shape)
        mask = [False, True, False]
        return aten.convolution_backward(  # type: ignore[no-any-return]
            g, x, w, None, s, p, d, False, (0, 0), groups, mask
        )[1]

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


def _channel(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1)


def _nonzero(weight: Tensor) -> Tensor:
    """``weight`` kept away from zero, so that a derivative in it can be had by division."""
    return torch.where(weight.abs() < 1e-15, torch.full_like(weight, 1e-15), weight)


class _Norm(Function):
    """``z = act(gamma xh + beta)``, ``xh = (y - mean) r``, ``r = (var + eps)^-1/2``; batch statistics.

    Also returns mean and r, which its derivatives share; they are not differentiable by themselves.
    """

    @staticmethod
    def forward(
        y: Tensor, gamma: Tensor, beta: Tensor, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, mean, r = aten.native_batch_norm(y, _nonzero(gamma), beta, None, None, True, 0.0, eps)
        return (z.relu() if relu else z), mean, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        z, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        # The activation's mask is read off its output. Without one the output may be overwritten.
        ctx.save_for_backward(inputs[0], inputs[1], mean, r, z if inputs[4] else mean)
        ctx.eps, ctx.relu = inputs[3:]

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        y, gamma, mean, r, z = ctx.saved_tensors
        gy, ggamma, gbeta = _NormGrad.apply(g, y, gamma, mean, r, z, ctx.eps, ctx.relu)
        return gy, ggamma, gbeta, None, None

    @staticmethod
    def vmap(
        info: Any, dims: Any, y: Tensor, gamma: Tensor, beta: Tensor, eps: float, relu: bool
    ) -> Any:
        n = info.batch_size
        folded = _fold(y, dims[0], n), _fold_first(gamma, dims[1], n), _fold_first(beta, dims[2], n)
        z, mean, r = _Norm.apply(*folded, eps, relu)
        return (z.unflatten(1, (n, -1)), mean.view(n, -1), r.view(n, -1)), (1, 0, 0)


class _NormGrad(Function):
    """The derivatives of ``<g, z>`` in y, gamma and beta.

    With a = g masked by the activation, and P = I - 11'/N - xh xh'/N: ``gy = gamma r P a``, ``ggamma = sum a xh``,
    ``gbeta = sum a``.
    """

    @staticmethod
    def forward(
        g: Tensor,
        y: Tensor,
        gamma: Tensor,
        mean: Tensor,
        r: Tensor,
        z: Tensor,
        eps: float,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        a = aten.threshold_backward(g, z, 0) if relu else g
        gy, ggamma, gbeta = aten.native_batch_norm_backward(
            a, y, _nonzero(gamma), None, None, mean, r, True, eps, [True, True, True]
        )
        return gy, ggamma, gbeta

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, y, gamma, mean, r, z, ctx.eps, ctx.relu = inputs
        gy, ggamma, _ = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, gamma, mean, r, z, gy, ggamma)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, ug: Tensor | None, ub: Tensor | None) -> Any:
        y, gamma, mean, r, z, gy, ggamma = ctx.saved_tensors
        zero = torch.zeros_like(gamma)
        v = torch.zeros_like(gy) if v is None else v
        ug, ub = zero if ug is None else ug, zero if ub is None else ub
        out = _NormGradGrad.apply(v, ug, ub, y, gamma, mean, r, z, gy, ggamma, ctx.eps, ctx.relu)
        return *out, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        dims: Any,
        g: Tensor,
        y: Tensor,
        gamma: Tensor,
        mean: Tensor,
        r: Tensor,
        z: Tensor,
        eps: float,
        relu: bool,
    ) -> Any:
        n = info.batch_size
        g, y = _fold(g, dims[0], n), _fold(y, dims[1], n)
        z = _fold(z, dims[5], n) if relu else z
        gamma, mean, r = (
            _fold_first(t, d, n) for t, d in zip((gamma, mean, r), dims[2:5], strict=True)
        )
        gy, ggamma, gbeta = _NormGrad.apply(g, y, gamma, mean, r, z, eps, relu)
        return (gy.unflatten(1, (n, -1)), ggamma.view(n, -1), gbeta.view(n, -1)), (1, 0, 0)


class _NormGradGrad(Function):
    """The derivatives of ``<v, gy> + <ug, ggamma> + <ub, gbeta>`` in g, y and gamma.

    With b = v, D_a = ggamma, D_b = sum b xh, E = <v, gy>, gb = gamma r P b:
    g: mask (gb + ug xh + ub); y: -(r/N) (E xh + D_b gy + D_a gb) + (ug/gamma) gy; gamma: E/gamma.
    """

    @staticmethod
    def forward(
        v: Tensor,
        ug: Tensor,
        ub: Tensor,
        y: Tensor,
        gamma: Tensor,
        mean: Tensor,
        r: Tensor,
        z: Tensor,
        gy: Tensor,
        ggamma: Tensor,
        eps: float,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gamma = _nonzero(gamma)
        gb, db, _ = aten.native_batch_norm_backward(
            v, y, gamma, None, None, mean, r, True, eps, [True, True, True]
        )
        e = (v * gy).sum((0, 2, 3))
        rn = r * (-1.0 / (y.numel() // y.shape[1]))
        slope = ug * r
        gg = torch.addcmul(_channel(ub - slope * mean), y, _channel(slope)) + gb
        if relu:
            gg = aten.threshold_backward(gg, z, 0)
        slope = rn * e * r
        dy = torch.addcmul(_channel(-slope * mean), y, _channel(slope))
        dy = torch.addcmul(dy, gy, _channel(rn * db + ug / gamma))
        dy = torch.addcmul(dy, gb, _channel(rn * ggamma))
        return gg, dy, e / gamma

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("third derivatives of batch normalisation")

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Any) -> Any:
        n = info.batch_size
        v, ug, ub, y, gamma, mean, r, z, gy, ggamma = (
            (_fold if t.ndim - (d is not None) == 4 else _fold_first)(t, d, n)
            for t, d in zip(args[:10], dims[:10], strict=True)
        )
        gg, dy, dgamma = _NormGradGrad.apply(
            v, ug, ub, y, gamma, mean, r, z, gy, ggamma, *args[10:]
        )
        return (gg.unflatten(1, (n, -1)), dy.unflatten(1, (n, -1)), dgamma.view(n, -1)), (1, 1, 0)


def norm_relu(y: Tensor, gamma: Tensor, beta: Tensor, eps: float, relu: bool) -> Tensor:
    """Batch normalisation of ``(B, C, H, W)`` by its own statistics, and ReLU if asked."""
    z: Tensor = _Norm.apply(y, gamma, beta, eps, relu)[0]
    return z
