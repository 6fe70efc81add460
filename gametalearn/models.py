"""The field's small models, with batch statistics that suit few-shot episodes.

``norm`` chooses how features are normalised (running statistics are wrong in this setting):

- ``"batch"``: by the statistics of the batch at hand, the whole query set included: transductive,
  what MAML's published numbers use.
- ``"support"``: by the statistics of the support set under the adapted weights, for the queries
  too: inductive.
- ``"group"``: GroupNorm, each example by itself: inductive.
- ``"none"``: no normalisation.
- ``"frozen"``: by fixed statistics in buffers, inductive: for the ``state_dict`` of a model that
  `gametalearn.adapt` has fitted. There is nothing in them before it is loaded.

A model whose ``uses_support`` is true is called ``model(query_x, support_x)`` for queries and
``model(support_x)`` in the inner loop; any other module, yours included, is called ``model(x)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn.errors import InputError
from gametalearn.frozen import freeze

__all__ = ["MLP", "Conv4", "Norm", "ResNet12", "TaskNorm"]

Norm = Literal["batch", "support", "group", "none", "frozen"]
NORMS: tuple[Norm, ...] = get_args(Norm)
_WITHOUT_BIAS = ("batch", "support", "frozen")
"""Before these norms a convolution's bias has no effect."""


class TaskNorm(nn.Module):
    """BatchNorm without running statistics: those of the batch, or of its first examples.

    Args:
        channels: features C of a ``(B, C, H, W)`` input.
        eps: added to the variance, as in `torch.nn.BatchNorm2d`.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor, support: int | None = None) -> Tensor:
        """Normalise ``x`` by its statistics, or by those of its first ``support`` examples."""
        if support is None:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        var, mean = torch.var_mean(x[:support], dim=(0, 2, 3), correction=0, keepdim=True)
        scale = self.weight.view(-1, 1, 1) * torch.rsqrt(var + self.eps)
        return (x - mean) * scale + self.bias.view(-1, 1, 1)


def _norm(norm: Norm, channels: int) -> nn.Module:
    if norm not in NORMS:
        raise InputError(f"norm must be one of {', '.join(NORMS)}; got '{norm}'")
    if norm == "group":
        # up to 8 groups of at least 4 channels: the last features may be a single pixel
        groups = next(
            g for g in (8, 4, 2, 1) if channels % g == 0 and channels // g >= min(4, channels)
        )
        return nn.GroupNorm(groups, channels)
    if norm == "frozen":
        layer = nn.BatchNorm2d(channels)
        freeze(layer)
        return layer
    return nn.Identity() if norm == "none" else TaskNorm(channels)


class _Backbone(nn.Module):
    """What the image models share: support statistics, input normalisation, features and a head."""

    def __init__(
        self, norm: Norm, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.norm: Norm = norm
        self.mean: Tensor | None
        self.std: Tensor | None
        for name, value in (("mean", mean), ("std", std)):
            tensor = None if value is None else torch.tensor(value).view(-1, 1, 1)
            self.register_buffer(name, tensor, persistent=norm == "frozen")

    @property
    def uses_support(self) -> bool:
        """Whether queries are normalised by the support set's statistics (``norm="support"``)."""
        return self.norm == "support"

    def forward(self, x: Tensor, support_x: Tensor | None = None) -> Tensor:
        """Logits ``(B, ways)``, or features, of images ``(B, C, H, W)``; ``support_x`` sets the statistics."""
        support = None
        if support_x is not None:
            x, support = torch.cat([support_x, x]), len(support_x)
        if self.mean is not None:
            x = x - self.mean
        if self.std is not None:
            x = x / self.std
        logits: Tensor = self.head(self.features(x, support))
        return logits if support is None else logits[support:]

    def statistics_are_fixed(self) -> None:
        """Say that every norm has statistics of its own now, as with ``norm="frozen"``."""
        if self.norm in ("batch", "support"):
            self.norm = "frozen"
            for name in ("mean", "std"):
                self.register_buffer(name, getattr(self, name))

    head: nn.Module

    def features(self, x: Tensor, support: int | None = None) -> Tensor:
        raise NotImplementedError


def _head(features: int, ways: int | None) -> nn.Module:
    return nn.Identity() if ways is None else nn.Linear(features, ways)


class _ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: Norm, stride: int) -> None:
        super().__init__()
        bias = norm not in _WITHOUT_BIAS
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)
        self.norm = _norm(norm, outputs)
        nn.init.xavier_uniform_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, support: int | None = None) -> Tensor:
        x = self.conv(x)
        x = self.norm(x, support) if isinstance(self.norm, TaskNorm) else self.norm(x)
        return x


class Conv4(_Backbone):
    """The four-block convolutional network of Vinyals et al. 2016 and Finn et al. 2017.

    Args:
        ways: outputs N; None leaves the head out, and the outputs are features.
        channels: input channels C.
        image_size: height and width of the input, at least 16.
        hidden: filters per block; 64 for Omniglot, 32 for mini-ImageNet in MAML.
        pool: ``"stride"``, stride-2 convolutions and a spatial mean (MAML's Omniglot network), or
            ``"max"``, 2 x 2 max-pooling and flattened features.
        norm: see the module's docstring.
        mean, std: per-channel input normalisation, the model's first step; a part of its
            ``state_dict`` with ``norm="frozen"`` alone.
    """

    def __init__(
        self,
        ways: int | None = 5,
        channels: int = 1,
        image_size: int = 28,
        hidden: int = 64,
        pool: Literal["stride", "max"] = "stride",
        norm: Norm = "batch",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(norm, mean, std)
        if pool not in ("stride", "max"):
            raise InputError(f"Conv4: pool must be 'stride' or 'max', got '{pool}'")
        if image_size < 16:
            raise InputError(f"Conv4: image_size must be at least 16, got {image_size}")
        self.pool = pool
        stride = 2 if pool == "stride" else 1
        self.blocks = nn.ModuleList(
            _ConvBlock(channels if i == 0 else hidden, hidden, norm, stride) for i in range(4)
        )
        side = image_size // 16
        self.head = _head(hidden if pool == "stride" else hidden * side * side, ways)
        if isinstance(self.head, nn.Linear):
            nn.init.xavier_uniform_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor, support: int | None = None) -> Tensor:
        """The head's input, ``(B, hidden)`` or ``(B, hidden x H/16 x W/16)``."""
        for block in self.blocks:
            x = F.relu(block(x, support))
            if self.pool == "max":
                x = F.max_pool2d(x, 2)
        return x.mean((2, 3)) if self.pool == "stride" else x.flatten(1)


class _ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        sizes = [inputs, outputs, outputs, outputs]
        self.blocks = nn.ModuleList(_ConvBlock(sizes[i], outputs, norm, 1) for i in range(3))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=norm not in _WITHOUT_BIAS)
        self.norm = _norm(norm, outputs)

    def forward(self, x: Tensor, support: int | None = None) -> Tensor:
        y = x
        for i, block in enumerate(self.blocks):
            y = block(y, support)
            y = F.leaky_relu(y, 0.1) if i < 2 else y
        x = self.shortcut(x)
        x = self.norm(x, support) if isinstance(self.norm, TaskNorm) else self.norm(x)
        return F.max_pool2d(F.leaky_relu(x + y, 0.1), 2)


class ResNet12(_Backbone):
    """ResNet-12 (Oreshkin et al. 2018; widths of Lee et al. 2019), without dropout.

    Args:
        ways: outputs N; None leaves the head out, and the outputs are features.
        channels: input channels C.
        widths: filters of the four residual blocks.
        norm, mean, std: as in `Conv4`.
    """

    def __init__(
        self,
        ways: int | None = 5,
        channels: int = 3,
        widths: Sequence[int] = (64, 160, 320, 640),
        norm: Norm = "batch",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(norm, mean, std)
        sizes = [channels, *widths]
        self.blocks = nn.ModuleList(
            _ResBlock(sizes[i], sizes[i + 1], norm) for i in range(len(widths))
        )
        self.head = _head(sizes[-1], ways)

    def features(self, x: Tensor, support: int | None = None) -> Tensor:
        """The head's input, ``(B, widths[-1])``: a spatial mean."""
        for block in self.blocks:
            x = block(x, support)
        return x.mean((2, 3))


class MLP(nn.Module):
    """ReLU layers; inputs are flattened. (40, 40) is the sinusoid network of Finn et al. 2017.

    Args:
        inputs: features of the flattened input.
        outputs: targets, or ways; None leaves the head out, and the outputs are features.
        hidden: widths of the hidden layers.
    """

    def __init__(
        self, inputs: int = 1, outputs: int | None = 1, hidden: Sequence[int] = (40, 40)
    ) -> None:
        super().__init__()
        sizes = [inputs, *hidden]
        self.layers = nn.ModuleList(nn.Linear(sizes[i], sizes[i + 1]) for i in range(len(hidden)))
        self.head = _head(sizes[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, outputs)`` of ``(B, *x)``."""
        x = x.flatten(1)
        for layer in self.layers:
            x = F.relu(layer(x))
        prediction: Tensor = self.head(x)
        return prediction
