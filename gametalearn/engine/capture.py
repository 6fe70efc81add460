"""Replace a module's convolutions, batch norms and poolings by the engine's own while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gametalearn.engine import layers
from gametalearn.engine.errors import UnreplayableError

__all__ = ["Capture", "ValueReads"]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]


def _viewable(x: Tensor, sizes: Any) -> bool:
    """Whether `torch.Tensor.view` can give ``x`` these sizes without a copy."""
    rest = math.prod(n for n in sizes if n != -1)
    wanted = [n if n != -1 else x.numel() // max(1, rest) for n in sizes][::-1]
    old = [(n, s) for n, s in zip(x.shape, x.stride(), strict=True) if n != 1][::-1]
    place = 0
    while old:  # blocks of old dimensions that lie in memory as one
        size, step = old.pop(0)
        while old and old[0][1] == size * step:
            size *= old.pop(0)[0]
        filled = 1
        while filled < size and place < len(wanted):
            filled, place = filled * wanted[place], place + 1
        if filled != size:
            return False
    return True


@dataclass(frozen=True)
class _Origin:
    """How a tensor came about, and the versions of everything that takes part in it.

    A version counter goes up with every write in place, through whichever view, so that equal
    versions mean: the tensor still is what the layer returned, and the layer would return the same.

    Attributes:
        result: the tensor itself, which is kept alive so that its ``id`` stays its own.
        operands: of a convolution ``(x, weight)``, of a norm ``(y, gamma, beta)``.
        options: of a convolution stride, padding, dilation and groups; of a norm eps.
        versions: of ``result`` and ``operands`` when it was recorded.
        relu: whether ``result`` is the norm's output after a ReLU.
    """

    result: Tensor
    operands: tuple[Tensor, ...]
    options: tuple[Any, ...]
    versions: tuple[int, ...]
    relu: bool = False

    @staticmethod
    def of(
        result: Tensor, operands: tuple[Tensor, ...], options: tuple[Any, ...], relu: bool = False
    ) -> _Origin:
        return _Origin(result, operands, options, _versions(result, *operands), relu)

    @property
    def holds(self) -> bool:
        """Whether nothing was written since."""
        return self.versions == _versions(self.result, *self.operands)


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    """The version counters of tensors, and of those within them.

    Under `torch.func.vmap` a tensor wraps the one that holds the numbers of all tasks. A write bumps
    the counter of that one alone.
    """
    return tuple(level._version for t in tensors for level in _levels(t))


def _levels(t: Tensor) -> Iterator[Tensor]:
    """A tensor, and those within it: one for each derivative and each `torch.func.vmap`."""
    yield t
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
        yield t


class Capture(TorchFunctionMode):
    """Within this context, plain 2-d layers of any module are computed by `gametalearn.engine.layers`.

    A ReLU that follows a batch norm is fused with it, a max-pool that follows with both, provided
    that nothing was written in between (see `_Origin`). What was computed for the unfused layer then
    has no reader, and the traced program drops it. A ReLU in place writes its result into its
    argument, so that views of it and whoever else holds it see what they would see without us.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolved: dict[int, _Origin] = {}
        self.normed: dict[int, _Origin] = {}
        self.copied: list[_Origin] = []
        self.gammas: list[Tensor] = []  # of the norms that were fused with a pooling

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        if raised[0] is None and not all(copy.holds for copy in self.copied):
            raise UnreplayableError("its forward writes into a view of a layer's result")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        result = None if rule is None else rule(self, *args, **kwargs)
        return func(*args, **kwargs) if result is None else result

    def origin(self, known: dict[int, _Origin], x: Tensor) -> _Origin | None:
        """What is known of ``x``, if that still holds."""
        found = known.get(id(x))
        return found if found is not None and found.holds else None

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
        self.convolved[id(y)] = _Origin.of(y, (x, weight), options)
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
        self.normed[id(z)] = _Origin.of(z, (x, weight, bias), (eps,))
        return z

    def relu(self, x: Tensor, inplace: bool = False) -> Tensor | None:
        norm = self.origin(self.normed, x)
        if norm is None:
            return None
        z = layers.norm_relu(*norm.operands, *norm.options, True)  # type: ignore[call-arg,arg-type]
        if inplace:
            z = x.copy_(z)
        self.normed[id(z)] = _Origin.of(z, norm.operands, norm.options, relu=True)
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
        norm = self.origin(self.normed, x)
        if norm is None:
            return layers.max_pool2d(x, *pool)
        y, gamma, beta = norm.operands
        *_, innermost = _levels(gamma)
        self.gammas.append(innermost)
        # max(gamma y) = gamma max(y) needs gamma >= 0: a negative sign moves to the convolution,
        # or to y. The convolution's bias has no effect.
        sign = torch.where(gamma.detach() < 0, -1.0, 1.0).to(gamma.dtype)
        convolution = self.origin(self.convolved, y)
        if convolution is not None:
            inputs, weight = convolution.operands
            y = layers.conv2d(inputs, weight * sign.view(-1, 1, 1, 1), None, *convolution.options)
        else:
            y = y * sign.view(-1, 1, 1)
        return layers.norm_relu_pool(y, gamma * sign, beta, *norm.options, pool, norm.relu)  # type: ignore[call-arg]

    def view(self, x: Tensor, *shape: Any) -> Tensor | None:
        """Our images lie in memory pixel after pixel, where a plain layer's lie channel after channel:
        what is a view of the latter may have to be a copy. Unless one of the two is written to, that
        is the same."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if x.ndim != 4 or isinstance(sizes, torch.dtype) or _viewable(x, sizes):
            return None
        y = x.contiguous().view(*shape)
        self.copied.append(_Origin.of(y, (x,), ()))
        return y

    def absolute(self, input: Tensor, **options: Any) -> Tensor | None:
        """As ``x sign(x)``: PyTorch's second derivative of `abs` is a zero that no trace on fakes takes."""
        if options or not input.is_floating_point():
            return None
        return input * ((input > 0).to(input.dtype) - (input < 0).to(input.dtype))

    def l1_loss(
        self, input: Tensor, target: Tensor, *args: Any, reduction: str = "mean", **options: Any
    ) -> Tensor | None:
        given = [value for value in (*args, *options.values()) if value is not None]
        cast = torch.is_autocast_enabled(input.device.type)  # which may compute the loss in float32
        if given or cast or input.shape != target.shape:
            return None
        size = self.absolute(input - target)
        if size is None or reduction not in ("mean", "sum", "none"):
            return None
        return size if reduction == "none" else getattr(size, reduction)()

    def data(self, x: Tensor) -> Tensor:
        return x.detach()  # functorch knows no other way out of a derivative

    def refuse(self, *args: Any, **kwargs: Any) -> Tensor:
        raise UnreplayableError("its forward hooks into the backward pass")

    def refuse_data(self, *args: Any, **kwargs: Any) -> Tensor:
        raise UnreplayableError("its forward assigns to a tensor's data")

    def refuse_value(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        raise UnreplayableError(_READS)


_READS = "its forward or loss reads a tensor's numbers into Python"


def _in_order(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, of an input that lies in memory channel after channel.

    Before PyTorch 2.14 no `torch.func.vmap` knows the derivatives of a group norm of channels-last images.
    """

    def rule(_: Capture, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(input.contiguous(), *args, **kwargs)

    return rule


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.data.__get__: Capture.data,  # type: ignore[attr-defined]
    Tensor.data.__set__: Capture.refuse_data,  # type: ignore[attr-defined]
    Tensor.register_hook: Capture.refuse,
    Tensor.view: Capture.view,
    F.conv2d: Capture.conv2d,
    F.batch_norm: Capture.batch_norm,
    F.relu: Capture.relu,
    torch.relu: Capture.relu,
    torch.relu_: Capture.relu_,
    Tensor.relu: Capture.relu,
    Tensor.relu_: Capture.relu_,
    F.max_pool2d: Capture.max_pool2d,
    torch.max_pool2d: Capture.max_pool2d,
    F.l1_loss: Capture.l1_loss,
    **dict.fromkeys(
        (torch.abs, torch.absolute, Tensor.abs, Tensor.absolute, Tensor.__abs__), Capture.absolute
    ),
    **{norm: _in_order(norm) for norm in (F.group_norm, torch.group_norm)},
    **dict.fromkeys(
        (Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__contains__),
        Capture.refuse_value,
    ),
}

_VALUE_READERS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
}


class ValueReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse a trace that reads a tensor's numbers, also of tensors that it knows as constants.

    `make_fx` refuses that for what depends on its arguments. For any other tensor, such as a global
    one, the number would stand in the program for ever.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _VALUE_READERS:
            raise UnreplayableError(_READS)
        return func(*args, **(kwargs or {}))
