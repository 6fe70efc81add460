"""One image, whatever it came as, to 8 bits: the only place that says what pixels mean.

Files (`gametalearn.data.decode`) and data sets of images, arrays and tensors
(`gametalearn.images.ClassImages.from_pairs`) both go through here, so that a picture gives the same
numbers whichever way it comes.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LOST", "eight_bit", "is_finer", "nothing_left", "plain", "to_uint8"]

Array = np.ndarray[Any, np.dtype[Any]]

_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF 6.0
_GRAY = ("1", "L", "LA", "La")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def plain(image: Image) -> Image:
    """A Pillow image of any mode as a new one of mode ``L`` or ``RGB``.

    Gray images (``1``, ``L``, ``LA``, ``La`` and 16-bit ones) become ``L``, all others ``RGB``.
    Transparency, by an alpha channel or by a colour, is laid over white. Of 16 bits the upper 8
    are kept, as Pillow does with colours of 16 bits: 0 to 65535 map linearly to 0 to 255. Portable
    graymaps of more than 8 bits, which Pillow opens in mode ``I``, it has scaled to 16 bits.

    Raises:
        ValueError: mode ``I`` or ``F``, whose pixels have no known range, or an unknown mode.
    """
    image.load()  # it may add to what is known of transparency
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        return _from_16_bits(image)
    if mode in ("I", "F"):
        raise ValueError(
            f"pixels of mode {mode} have no known range; scale them to 0 to 255 and convert the "
            "image to mode L"
        )
    if mode not in (*_GRAY, *_COLOUR):
        raise ValueError(f"images of mode {mode} are not known; convert them to L or RGB")
    wanted = "L" if mode in _GRAY else "RGB"
    if image.has_transparency_data:
        image = image.convert("LA") if mode == "La" else image  # the only way out of La
        return _over_white(image.convert("RGBA")).convert(wanted)
    return image.copy() if mode == wanted else image.convert(wanted)


def _over_white(image: Image) -> Image:
    from PIL import Image as module

    return module.alpha_composite(module.new("RGBA", image.size, "white"), image)


def _from_16_bits(image: Image) -> Image:
    from PIL import Image as module

    pixels = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})  # an opened TIFF: Pillow gives the numbers as stored
    if tags.get(_BITS) == (12,):
        pixels = pixels << 4
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        pixels = 65535 - pixels
    gray = (pixels >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")  # a shade
    if transparent is not None:
        gray[np.asarray(image) == transparent] = 255
    return module.fromarray(gray)


def to_uint8(item: Any) -> Tensor:
    """An image as ``(C, H, W)`` uint8.

    Args:
        item: a Pillow image (see `plain`); an array ``(H, W)`` or ``(H, W, C)``, of which 2
            channels are gray with alpha and 4 are RGB with alpha, as in Pillow, laid over white;
            or a tensor ``(H, W)`` or ``(C, H, W)``. Their types are those of `eight_bit`.

    Warns where nothing is left of a picture once it is laid over white.

    Raises:
        ValueError: pixels without a known range, or a shape that is none of these.
    """
    if hasattr(item, "convert") and hasattr(item, "mode"):  # Pillow's, without importing it
        found = plain(item)
        if nothing_left(item, found):
            warnings.warn(f"an image became white {LOST}", stacklevel=2)
        return _channels_first(np.asarray(found))
    if isinstance(item, Tensor):
        return _checked_tensor(eight_bit(item))
    array = np.asarray(item)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"arrays are (H, W) or (H, W, C), got shape {array.shape}")
    if array.ndim == 3 and array.shape[2] > 4 >= array.shape[0]:
        raise ValueError(
            f"arrays are (H, W) or (H, W, C), got shape {array.shape}; pass (C, H, W) as a tensor"
        )
    pixels = eight_bit(array).numpy()
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        from PIL import Image as module

        return to_uint8(module.fromarray(np.ascontiguousarray(pixels)))
    return _channels_first(pixels)


def _channels_first(array: Array) -> Tensor:
    image = torch.from_numpy(array.copy())  # a Pillow image's own memory cannot be written
    return image.permute(2, 0, 1) if image.ndim == 3 else image.unsqueeze(0)


def _checked_tensor(image: Tensor) -> Tensor:
    shape = tuple(image.shape)
    if image.ndim not in (2, 3) or 0 in shape:
        raise ValueError(f"tensors are (H, W) or (C, H, W), got shape {shape}")
    if image.ndim == 2:
        return image.unsqueeze(0)
    if shape[0] > 4 >= shape[2]:
        raise ValueError(f"tensors are (C, H, W), got shape {shape}; pass (H, W, C) as an array")
    if shape[0] in (2, 4):
        raise ValueError(
            f"a tensor of {shape[0]} channels may have an alpha channel or not; convert the image "
            "to L or RGB before it becomes a tensor, or keep the channels by "
            "ClassImages.from_tensors"
        )
    return image


def eight_bit(pixels: Tensor | Array) -> Tensor:
    """Pixels of any shape as a uint8 tensor.

    uint8 stays as it is, uint16 keeps the upper 8 bits as in `plain`, False and True become 0 and
    255, and floats in [0, 1] are multiplied by 255 and rounded.

    Raises:
        ValueError: floats outside [0, 1] or NaN; a type whose pixels have no known range.

    >>> eight_bit(np.array([0, 255, 256, 65535], np.uint16)).tolist()
    [0, 0, 1, 255]
    >>> eight_bit(np.array([False, True])).tolist()
    [0, 255]
    """
    if isinstance(pixels, Tensor):
        if pixels.dtype == torch.uint8:
            return pixels
        narrow = pixels.dtype in (torch.float16, torch.bfloat16)  # numpy has no bfloat16
        pixels = (pixels.float() if narrow else pixels).numpy(force=True)
    kind, name = pixels.dtype.kind, pixels.dtype.name
    if kind == "b":
        found = pixels.astype(np.uint8) * np.uint8(255)
    elif name == "uint8":
        found = np.require(pixels, requirements=["C", "W"])  # else torch warns
    elif name == "uint16":
        found = (pixels >> 8).astype(np.uint8)
    elif kind == "f":
        if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(
                f"float images must lie in [0, 1], got [{pixels.min():g}, {pixels.max():g}]; "
                "scale them, or pass uint8"
            )
        wide = pixels.astype(np.float32) if pixels.itemsize < 4 else pixels
        found = (wide * 255).round().astype(np.uint8)
    else:
        raise ValueError(
            f"pixels of type {name} have no known range; give uint8 (0 to 255), uint16 (0 to "
            "65535), bool, or float in [0, 1]"
        )
    return torch.from_numpy(found)


def is_finer(pixels: Any) -> bool:
    """Whether an array or a tensor has values between the 256 steps that `eight_bit` keeps.

    A step that a narrow type had to round is one. Other things than arrays and tensors are not looked
    at: a file's 16 bits are known to lose the lower 8.

    >>> is_finer(np.array([0.0, 7 / 255])), is_finer(np.array([0.0, 0.5])), is_finer(torch.ones(1))
    (False, True, False)
    """
    if isinstance(pixels, Tensor):
        if pixels.dtype == torch.bfloat16:  # coarser than 8 bits itself
            return False
        pixels = pixels.numpy(force=True)
    if not isinstance(pixels, np.ndarray):
        return False
    if pixels.dtype.kind == "f":
        scaled = pixels.astype(np.float64) * 255
        rounding = min(512 * float(np.finfo(pixels.dtype).eps), 0.25)
        return bool((np.abs(scaled - scaled.round()) > rounding).any())
    return pixels.dtype.name == "uint16" and bool((pixels % 257).any())


def nothing_left(image: Image, made: Image) -> bool:
    """Whether `plain` made nothing but white of a Pillow image that is transparent somewhere."""
    pixels = np.asarray(made)
    if pixels.size == 1 or int(pixels.min(initial=255)) < 255 or not image.has_transparency_data:
        return False
    if image.mode.startswith("I"):  # of 16 bits, of which a shade is transparent
        return True
    image = image.convert("LA") if image.mode == "La" else image
    return int(np.asarray(image.convert("RGBA").getchannel("A")).min(initial=255)) < 255


LOST = "when transparency was laid over white; lay white drawings over a dark colour first"
"""How a picture can vanish, and what to do."""
