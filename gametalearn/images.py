"""Labelled images in one uint8 tensor, the form that every image data set takes in memory."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gametalearn.classes import Classes, by_label, read_pairs
from gametalearn.errors import InputError
from gametalearn.pixels import eight_bit, is_finer, to_uint8
from gametalearn.records import one_line

__all__ = ["ClassImages"]


@dataclass(frozen=True)
class ClassImages(Classes):
    """The classes of one split, as ranges of one tensor of images of 8 bits.

    Attributes:
        images: ``(N, C, H, W)`` uint8, each class contiguous; may be a memory map shared by splits.
        name, split, first, count, classes, class_group, groups: as in
            `gametalearn.classes.Classes`.
    """

    images: Tensor

    __repr__ = one_line

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise InputError(
                f"ClassImages '{self.name}': images must be (N, C, H, W) uint8, got "
                f"{tuple(self.images.shape)} {self.images.dtype}"
            )
        super().__post_init__()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def take(self, index: Tensor) -> Tensor:
        """The images at ``index`` (any shape) as float32 in [0, 1], ``(*index, C, H, W)``."""
        flat = self.images.index_select(0, index.flatten()).to(torch.float32).div_(255)
        return flat.view(*index.shape, *self.shape)

    def rotated(self) -> ClassImages:
        """Every class four times, turned by 0, 90, 180 and 270 degrees (Santoro et al. 2016).

        Raises:
            InputError: the images are not square.
        """
        _, height, width = self.shape
        if height != width:
            raise InputError(
                f"'{self.name}': images of {height} x {width} pixels cannot be turned by 90 degrees; make them "
                f"square first: converted({max(height, width)}).rotated()"
            )
        upright, first = self.images[self._used()], self.count.cumsum(0) - self.count
        return dataclasses.replace(
            self,
            images=torch.cat([torch.rot90(upright, k, (2, 3)) for k in range(4)]),
            first=torch.cat([first + k * len(upright) for k in range(4)]),
            count=self.count.repeat(4),
            classes=tuple(f"{c}@{90 * k}" if k else c for k in range(4) for c in self.classes),
            class_group=self.class_group.repeat(4),
        )

    def converted(self, size: int | None = None, channels: int | None = None) -> ClassImages:
        """The classes as ``(channels, size, size)`` images; None keeps what the images have.

        Resized bilinearly with antialiasing; RGB becomes grayscale by the weights of ITU-R 601
        (Pillow's), grayscale becomes RGB by repetition.

        Raises:
            InputError: a size below 1, or channels other than 1 and 3.
        """
        c, h, w = self.shape
        size_to = (h, w) if size is None else (size, size)
        c_to = c if channels is None else channels
        if min(size_to) < 1 or (c_to != c and {c, c_to} != {1, 3}):
            raise InputError(
                f"'{self.name}' has {c} x {h} x {w} images, which cannot become "
                f"{c_to} x {size_to[0]} x {size_to[1]}; sizes are at least 1, channels 1 or 3"
            )
        if (c_to, *size_to) == (c, h, w):
            return self
        used = self._used()
        images = torch.empty(len(used), c_to, *size_to, dtype=torch.uint8)
        for index, target in zip(used.split(1024), images.split(1024), strict=True):  # type: ignore[no-untyped-call]
            x = self.images[index].to(torch.float32)
            if c_to < c:
                x = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
            if size_to != (h, w):
                x = interpolate(x, size_to, mode="bilinear", antialias=True)
            target.copy_(x.round_().clamp_(0, 255))  # 1 channel spreads over 3
        return dataclasses.replace(self, images=images, first=self.count.cumsum(0) - self.count)

    def _used(self) -> Tensor:
        """The numbers of the classes' images, class after class."""
        ranges = zip(self.first.tolist(), self.count.tolist(), strict=True)
        return torch.cat([torch.arange(first, first + count) for first, count in ranges])

    @staticmethod
    def from_tensors(
        images: Tensor | np.ndarray[Any, Any],
        labels: Tensor | Sequence[int],
        name: str = "tensors",
        split: str = "all",
    ) -> ClassImages:
        """Wrap ``(N, C, H, W)`` images (any type that `gametalearn.pixels.eight_bit` takes) and N labels.

        Warns where 8 bits do not hold what they hold.

        Raises:
            InputError: numbers or shapes that do not fit, or pixels without a known range.
        """
        shape = tuple(images.shape)
        if len(shape) == 4 and shape[3] in (1, 3, 4) and min(shape[1:3]) > 4:
            told = f"ClassImages '{name}': images are (N, C, H, W), got {shape}, which look like (N, H, W, C)"
            remedy = "pass images.permute(0, 3, 1, 2), or of an array images.transpose(0, 3, 1, 2)"
            if shape[1] == shape[2]:
                raise InputError(f"{told}; {remedy}")
            # or they have many channels, and are narrow
            warnings.warn(f"{told}; if they are, {remedy}", stacklevel=2)
        order, fields = by_label(labels, name, len(images))
        if is_finer(images):
            _warn_of_8_bits(name)
        try:
            images = eight_bit(images)
        except ValueError as error:
            raise InputError(f"ClassImages '{name}': {error}") from error
        return ClassImages(**fields, split=split, images=images[order])

    @staticmethod
    def from_pairs(dataset: Any, name: str | None = None) -> ClassImages:
        """Read a map-style data set of ``(image, label)`` pairs (torchvision's, say) into memory.

        Images may be Pillow images of any mode, arrays ``(H, W[, C])`` or tensors ``(C, H, W)``, as
        `gametalearn.pixels.to_uint8` says; all of one size and number of channels. Warns where 8 bits
        do not hold what arrays or tensors hold.

        Raises:
            InputError: no such data set, an image that cannot be read (the message names the item),
                images of different sizes, or ones that differ from one reading to the next.
        """
        name = name or type(dataset).__name__
        finer = []

        def read(image: Any) -> Tensor:
            found = to_uint8(image)
            finer.append(is_finer(image))
            return found

        images, labels = read_pairs(dataset, name, read)
        if any(finer):
            _warn_of_8_bits(name)
        return ClassImages.from_tensors(images, labels, name=name)


def _warn_of_8_bits(name: str) -> None:
    warnings.warn(
        f"{name}: images are stored in 8 bits, and these have finer values: they were rounded, by up to "
        "1/510; where that matters, give floats to EpisodeSampler or ClassExamples, which keep them",
        stacklevel=4,
    )
