"""What the layers compute, on folded tensors: flat sequences of native kernels, in place inside.

Each function is registered as an operator, so that a trace keeps it as one step. Images are
``(B, C, H, W)`` in channels-last memory; per-channel tensors are ``(C,)``; N = B H W. No function
here is differentiable; `gametalearn.engine.layers` says which is whose derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "PLAIN",
    "conv",
    "conv_input",
    "conv_weight",
    "gather",
    "max_pool",
    "norm",
    "norm_grad",
    "norm_grad_grad",
    "norm_pool",
    "norm_pool_grad",
    "norm_pool_grad_grad",
    "scatter",
]

F = TypeVar("F", bound=Callable[..., object])
aten = torch.ops.aten
_library = torch.library.Library(  # type: ignore[no-untyped-call]
    "gametalearn", "DEF"
)
PLAIN: dict[object, Callable[..., object]] = {}
"""The function behind each operator: what a replay calls."""


def _operator(geometry: Callable[..., object]) -> Callable[[F], F]:
    """Register a function as an operator.

    Args:
        geometry: the same for meta tensors. A trace runs on tensors without memory and takes the
            layout of every result from here: images lie in channels-last memory.
    """

    def register(function: F) -> F:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=())
        _library.define(name + schema)  # type: ignore[no-untyped-call]
        _library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        _library.impl(name, geometry, "Meta")  # type: ignore[no-untyped-call]
        operator = getattr(torch.ops.gametalearn, name).default
        PLAIN[operator] = function
        return operator  # type: ignore[no-any-return]

    return register


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _image(like: Tensor, b: int, c: int, h: int, w: int) -> Tensor:
    """An image tensor whose values nobody reads."""
    return like.new_empty(b, h, w, c).permute(0, 3, 1, 2)


def _same(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Results laid out as these are."""
    return tuple(_image(t, *t.shape) if t.ndim == 4 else torch.empty_like(t) for t in tensors)


def _pooled(y: Tensor, kernel: Sequence[int], stride: Sequence[int], pad: Sequence[int]) -> Tensor:
    b, c, *sides = y.shape
    h, w = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(sides, kernel, stride, pad, strict=True))
    return _image(y, b, c, h, w)


def _convolved(
    x: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, w.shape[2:], strict=True)]
    _, _, h, width = _pooled(x, spans, stride, padding).shape
    return _image(x, x.shape[0], w.shape[0], h, width)


def _count(y: Tensor) -> int:
    return y.numel() // y.shape[1]


def _channel(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1)


def _affine(x: Tensor, slope: Tensor, constant: Tensor, overwrite: bool = False) -> Tensor:
    out = x if overwrite else None
    return torch.addcmul(_channel(constant), x, _channel(slope), out=out)


def _grouped(y: Tensor) -> tuple[Tensor, int]:
    """``(B, C, H, W)`` as ``(1, G C, N / G, 1)``, a view: neighbours in memory as channels; and G.

    The native reductions of batch norm add N numbers one by one in y's precision: for N = 500,000
    that is an error of 1e-4. An error of the mean moves every activation, and with it the kink of
    its ReLU. Summed by groups of a few hundred, which are then joined in float64, they are as exact
    as the convolutions.
    """
    b, c, h, w = y.shape
    groups = w if b * h <= 256 else h * w
    return y.permute(0, 2, 3, 1).reshape(1, -1, 1, groups * c).permute(0, 3, 1, 2), groups


def _statistics(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``r = (var + eps)^-1/2`` per channel, in float64."""
    grouped, groups = _grouped(y)
    stats = aten.batch_norm_update_stats(grouped, None, None, 0.0)
    means, variances = (t.view(groups, -1).double() for t in stats)
    mean = means.mean(0)
    variances += (means - mean).square_()
    return mean, variances.mean(0).add_(eps).rsqrt_()


def _normalise(
    x: Tensor, mean: Tensor, r: Tensor, gamma: Tensor, beta: Tensor, relu: bool
) -> Tensor:
    """``act(gamma (x - mean) r + beta)``; mean and r in float64.

    In one pass, as ``slope x + constant``. A feature's mean can be many times its deviation: were
    the two rounded before they cancel, more kinks of the ReLU would be crossed.
    """
    slope = (gamma * r).to(x)
    z = _affine(x, slope, (beta - slope * mean).to(x))
    return z.relu_() if relu else z


def _sums(a: Tensor, y: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """``sum a xh`` and ``sum a`` per channel, ``xh = (y - mean) r``."""
    reduce, mask = aten.native_batch_norm_backward, [False, True, True]
    if _count(y) < 4096:  # no kink hangs on these sums: an error of 1e-6 is no more than others
        _, moment, total = reduce(a, y, None, None, None, mean, r, True, 0.0, mask)
        return moment, total
    (a, groups), (y, _) = _grouped(a), _grouped(y)
    mean, r = mean.repeat(groups), r.repeat(groups)
    _, moment, total = reduce(a, y, None, None, None, mean, r, True, 0.0, mask)
    return moment.view(groups, -1).sum(0), total.view(groups, -1).sum(0)


def _flat(x: Tensor) -> Tensor:
    """``(B, H W, C)``, a view in channels-last memory."""
    return x.permute(0, 2, 3, 1).view(x.shape[0], -1, x.shape[1])


def _masked(g: Tensor, z: Tensor, relu: bool) -> Tensor:
    return aten.threshold_backward(g, z, 0) if relu else g


def _nonzero(gamma: Tensor) -> Tensor:
    """``gamma`` kept away from zero, so that a derivative in it can be had by division."""
    return torch.where(gamma.abs() < 1e-15, 1e-15, gamma)


@_operator(_convolved)
def conv(
    x: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution of ``x (B, C, H, W)`` by ``w (O, C / groups, h, w)``."""
    return _last(aten.convolution(x, w, None, stride, padding, dilation, False, (0, 0), groups))


@_operator(lambda g, w, shape, *options: _image(g, *shape))
def conv_input(
    g: Tensor,
    w: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The derivative of ``<g, conv(x, w)>`` in x, of the given shape."""
    options = (stride, padding, dilation, False, (0, 0), groups)
    return _last(
        aten.convolution_backward(g, _image(g, *shape), w, None, *options, [True, False, False])[0]
    )


@_operator(lambda x, g, shape, *options: _image(g, *shape))
def conv_weight(
    x: Tensor,
    g: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The derivative of ``<g, conv(x, w)>`` in w, of the given shape."""
    options = (stride, padding, dilation, False, (0, 0), groups)
    return _last(
        aten.convolution_backward(g, x, _image(g, *shape), None, *options, [False, True, False])[1]
    )


@_operator(lambda y, gamma, *rest: _same(y, gamma, gamma))
def norm(
    y: Tensor, gamma: Tensor, beta: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``z = act(gamma xh + beta)`` by batch statistics; also mean and ``r = (var + eps)^-1/2``."""
    mean, r = _statistics(y, eps)
    return _normalise(y, mean, r, gamma, beta, relu), mean.to(y), r.to(y)


@_operator(lambda g, y, gamma, *rest: _same(y, gamma, gamma))
def norm_grad(
    g: Tensor,
    y: Tensor,
    gamma: Tensor,
    mean: Tensor,
    r: Tensor,
    z: Tensor,
    relu: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``gamma r P a``, ``sum a xh`` and ``sum a``: a = g masked, P = I - 11'/N - xh xh'/N.

    ``overwrite``, set by a replay where nobody reads y after this, puts the first result there.
    """
    a = _masked(g, z, relu)
    moment, total = _sums(a, y, mean, r)
    n, scale = 1.0 / _count(y), _nonzero(gamma) * r
    slope = -n * scale * r * moment
    gy = _affine(y, slope, -n * scale * total - slope * mean, overwrite)
    return gy.addcmul_(a, _channel(scale)), moment, total


@_operator(lambda v, ug, ub, y, gamma, *rest: _same(y, y, gamma))
def norm_grad_grad(
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
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of ``<v, gy> + <ug, ggamma> + <ub, gbeta>`` in g, y and gamma.

    With D_a = ggamma, D_b = sum v xh, E = <v, gy>, gb = gamma r P v:
    g: mask (gb + ug xh + ub); y: -(r/N) (E xh + D_b gy + D_a gb) + (ug/gamma) gy; gamma: E/gamma.
    """
    gamma = _nonzero(gamma)
    n, scale = 1.0 / _count(y), gamma * r
    db, sv = _sums(v, y, mean, r)
    product = v * gy
    e = product.sum((0, 2, 3))
    # gb = scale (v - n sv - n xh db)
    slope = (ug - n * scale * db) * r
    constant = ub - n * scale * sv - slope * mean
    gg = torch.addcmul(_channel(constant), y, _channel(slope), out=product)
    gg.addcmul_(v, _channel(scale))
    if relu:
        gg = aten.threshold_backward.grad_input(gg, z, 0, grad_input=gg)
    cv = -n * r * ggamma * scale
    slope = -n * (r * e + cv * db) * r
    dy = _affine(y, slope, -n * cv * sv - slope * mean)
    dy.addcmul_(v, _channel(cv))
    dy.addcmul_(gy, _channel(ug / gamma - n * r * db))
    return gg, dy, e / gamma


def _like_norm_pool(
    y: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    relu: bool,
) -> tuple[Tensor, ...]:
    z = _pooled(y, kernel, stride, padding)
    return *_same(z, gamma, gamma, z), _image(z.long(), *z.shape)


@_operator(_like_norm_pool)
def norm_pool(
    y: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``z = act(gamma xp + beta)``, xp = max-pool of xh, for gamma >= 0: the pool comes first.

    Returns:
        z, mean and r, the pooled y (peak), and its indices.
    """
    mean, r = _statistics(y, eps)
    peak, index = aten.max_pool2d_with_indices(y, kernel, stride, padding)
    return _normalise(peak, mean, r, gamma, beta, relu), mean.to(y), r.to(y), peak, index


@_operator(lambda g, y, gamma, *rest: _same(y, gamma, gamma))
def norm_pool_grad(
    g: Tensor,
    y: Tensor,
    gamma: Tensor,
    mean: Tensor,
    r: Tensor,
    z: Tensor,
    peak: Tensor,
    index: Tensor,
    relu: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``gamma r P S a``, ``sum a xp`` and ``sum a``; S puts pooled values at their indices.

    ``overwrite`` as in `norm_grad`.
    """
    a = _masked(g, z, relu)
    moment, total = _sums(a, peak, mean, r)
    scale = gamma * r
    slope = scale * r * moment * (-1.0 / _count(y))
    constant = scale * total * (-1.0 / _count(y)) - slope * mean
    gy = _affine(y, slope, constant, overwrite)
    _flat(gy).scatter_add_(1, _flat(index), _flat(a * _channel(scale)))
    return gy, moment, total


@_operator(lambda v, ug, ub, g, y, gamma, *rest: _same(g, y, gamma))
def norm_pool_grad_grad(
    v: Tensor,
    ug: Tensor,
    ub: Tensor,
    g: Tensor,
    y: Tensor,
    gamma: Tensor,
    mean: Tensor,
    r: Tensor,
    z: Tensor,
    peak: Tensor,
    index: Tensor,
    da: Tensor,
    sa: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `norm_grad_grad`, with S a for a; D_a = da and sum a = sa are known."""
    n = 1.0 / _count(y)
    db, sv = _sums(v, y, mean, r)
    vp = _unflat(_flat(v).gather(1, _flat(index)), peak)
    a = _masked(g, z, relu)
    dgamma = r * ((a * vp).sum((0, 2, 3)) - n * (sa * sv + da * db))
    scale = gamma * r
    # gamma r (vp - sv/N - xp D_b/N) + ug xp + ub
    slope = (ug - n * scale * db) * r
    gg = _affine(peak, slope, ub - n * scale * sv - slope * mean).addcmul_(vp, _channel(scale))
    if relu:
        gg = aten.threshold_backward.grad_input(gg, z, 0, grad_input=gg)
    cv = -n * scale * r * da
    cs = -n * scale * r * db + ug * r
    slope = -n * (scale * dgamma + cs * da + cv * db) * r
    dy = _affine(y, slope, -n * (cs * sa + cv * sv) - slope * mean)
    dy.addcmul_(v, _channel(cv))
    _flat(dy).scatter_add_(1, _flat(index), _flat(a * _channel(cs)))
    return gg, dy, dgamma


def _unflat(x: Tensor, like: Tensor) -> Tensor:
    return x.view(x.shape[0], *like.shape[2:], x.shape[2]).permute(0, 3, 1, 2)


def _like_max_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    y = _pooled(x, kernel, stride, padding)
    return y, _image(y.long(), *y.shape)


@_operator(_like_max_pool)
def max_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The maxima and their flat positions ``(B, C, H', W')``."""
    y, index = aten.max_pool2d_with_indices(x, kernel, stride, padding)
    return _last(y), _last(index)


@_operator(lambda x, index: _image(x, *index.shape))
def gather(x: Tensor, index: Tensor) -> Tensor:
    """``x (B, C, H, W)`` at the flat positions ``index (B, C, H', W')``."""
    return _unflat(_flat(x).gather(1, _flat(index)), index)


@_operator(lambda x, index, height, width: _image(x, x.shape[0], x.shape[1], height, width))
def scatter(x: Tensor, index: Tensor, height: int, width: int) -> Tensor:
    """The transpose of `gather`: zeros, and x added at its positions."""
    out = x.new_zeros(x.shape[0], height * width, x.shape[1])
    out.scatter_add_(1, _flat(index), _flat(x))
    return out.view(x.shape[0], height, width, x.shape[1]).permute(0, 3, 1, 2)
