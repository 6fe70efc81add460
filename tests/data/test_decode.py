import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from gametalearn.data.decode import decode, resized
from gametalearn.errors import InputError

COLOUR = (200, 100, 50)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_every_format_gives_its_colour(kind: str) -> None:
    image = decode(encoded(Image.new("RGB", (9, 7), COLOUR), kind), "x")
    assert image.mode == "RGB"
    assert image.size == (9, 7)
    assert np.abs(np.asarray(image).astype(int) - COLOUR).max() <= 4


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("1", (4, 4), 1), "PNG", 255),
        (Image.new("L", (4, 4), 77), "PNG", 77),
        (Image.fromarray(np.full((4, 4), 0x4D4D, np.uint16)), "PNG", 0x4D),
        (Image.new("LA", (4, 4), (77, 255)), "PNG", 77),
        (Image.new("RGBA", (4, 4), (*COLOUR, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (*COLOUR, 255)), "PNG", COLOUR),
        (Image.new("RGB", (4, 4), COLOUR).quantize(), "PNG", COLOUR),
        (Image.new("CMYK", (4, 4), (55, 155, 205, 0)), "JPEG", COLOUR),
        (Image.new("CMYK", (4, 4), (55, 155, 205, 0)), "TIFF", COLOUR),
    ],
)
def test_modes(image: Image.Image, kind: str, expected: int | tuple[int, ...]) -> None:
    found = decode(encoded(image, kind), "x")
    assert found.mode == ("L" if isinstance(expected, int) else "RGB")
    assert np.abs(np.asarray(found).astype(int) - expected).max() <= 3


def test_a_transparent_palette_colour_is_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *COLOUR])
    found = decode(encoded(image, transparency=1), "x")
    assert np.asarray(found).min() == 255


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(InputError, match=f"photo.tif: .* mode {mode}"):
        decode(encoded(Image.new(mode, (4, 4)), "TIFF"), "photo.tif")


def test_truncated_images_are_named() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP"):
        data = encoded(noise, kind)
        for keep in (0, 10, len(data) // 2, len(data) * 9 // 10):
            with pytest.raises(InputError, match=r"a\.img: not a readable image"):
                decode(data[:keep], "a.img")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [8200, 12000, 60000, 2**31 - 1])
def test_decompression_bombs_are_refused(side: int) -> None:
    with pytest.raises(InputError, match=r"bomb\.png.*(pixels|decompression bomb)"):
        decode(bomb(side, side), "bomb.png")


def test_programs_are_not_images() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    with pytest.raises(InputError, match="not a readable image"):
        decode(eps, "x.png")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 84])
def test_resized(size: int, channels: int) -> None:
    array = resized(Image.new("RGB", (100, 37), COLOUR), size, channels)
    assert array.shape == (channels, size, size)
    assert array.dtype == np.uint8
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    expected = np.array(COLOUR if channels == 3 else (grey,))[:, None, None]
    assert np.abs(array.astype(int) - expected).max() <= 1


def test_resized_keeps_the_whole_image() -> None:
    halves = np.zeros((40, 200, 3), np.uint8)
    halves[:, 100:] = 255
    array = resized(Image.fromarray(halves), 20, 3)
    assert array[:, :, :9].max() <= 2
    assert array[:, :, 11:].min() >= 253
