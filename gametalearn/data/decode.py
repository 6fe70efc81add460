"""Image files to uint8 arrays."""

from __future__ import annotations

import io
import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from gametalearn.errors import InputError, summary
from gametalearn.pixels import nothing_left, plain

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DECODER", "brightest", "decode", "is_lost", "resized"]

DECODER = 2
"""Raised when a file's pixels come out otherwise than before, so that packed folders are made anew."""

MAX_PIXELS = 2**26  # ImageNet's largest image has 2**24
# No format that runs a program (EPS) or that hides a document (PDF, PSD).
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")

_SILENT = logging.NullHandler()


def decode(data: bytes, what: str) -> Image:
    """Decode an image file to a Pillow image of mode ``L`` or ``RGB``.

    What becomes of each kind of image is said in `gametalearn.pixels.plain`. The orientation tag of
    cameras is ignored, as torchvision does.

    Args:
        data: the file's bytes.
        what: the file's name, for the message.

    Raises:
        InputError: not an image, truncated, of more than 2**26 pixels, or of an unknown kind.
    """
    from PIL import Image, UnidentifiedImageError

    logging.getLogger("PIL").addHandler(_SILENT)  # what it logs, it also raises
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(
                        f"{what}: {image.width} x {image.height} pixels, "
                        f"at most {MAX_PIXELS} are read"
                    )
                return plain(image)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{what}: not a readable image: none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise anything on damaged input
        raise InputError(f"{what}: not a readable image: {summary(error)}") from error


def brightest(image: Image) -> int:
    """The largest value of any pixel and channel of an image of mode ``L`` or ``RGB``."""
    return int(np.asarray(image).max(initial=0))


def is_lost(image: Image, data: bytes) -> bool:
    """Whether `decode` made nothing but white of a file in which something is transparent."""
    from PIL import Image as module

    if int(np.asarray(image).min(initial=255)) < 255:  # the usual case, and the quick one
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `decode` has told them
        with module.open(io.BytesIO(data), formats=FORMATS) as original:
            original.load()  # it may add to what is known of transparency
            return nothing_left(original, image)


def resized(image: Image, size: int, channels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """``(channels, size, size)`` uint8 with 1 or 3 channels.

    Resized with an antialiasing Lanczos filter to a square, as the field does with mini-ImageNet;
    the aspect ratio is not kept and nothing is cropped.
    """
    from PIL.Image import Resampling

    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Resampling.LANCZOS)
    array = np.asarray(image)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))
