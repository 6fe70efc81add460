"""A picture gives the same numbers as a file in a folder and as an item of a data set."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gametalearn import ClassImages, EpisodeSampler, InputError
from gametalearn.data.decode import decode
from gametalearn.data.folder import load_folder
from gametalearn.examples import as_input
from gametalearn.pixels import eight_bit, plain, to_uint8

SIDE = 8
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
ALPHA = np.linspace(0, 255, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint8)
RAMP = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
COLOUR = Image.fromarray(RGB)
RGBA = Image.fromarray(np.dstack([RGB, ALPHA]))
LA = Image.fromarray(np.dstack([GRAY, ALPHA]))


def palette(*, transparency: int | bytes | None = None) -> Image.Image:
    image = COLOUR.quantize(8)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def keyed(image: Image.Image, key: Any) -> Image.Image:
    """One colour of the image is transparent, as a PNG's tRNS chunk says."""
    image = image.copy()
    image.info["transparency"] = key
    return image


def over_white(colour: np.ndarray[Any, Any], alpha: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    share = alpha.astype(float)[..., None] / 255
    return np.moveaxis(share * colour + (1 - share) * 255, -1, 0)


def first(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


INDEX = np.asarray(palette())
SEEN = np.asarray(palette().convert("RGB"))
IMAGES: dict[str, tuple[Image.Image, np.ndarray[Any, Any]]] = {
    "1": (Image.fromarray(GRAY > 127), first(np.where(GRAY > 127, 255, 0))),
    "L": (Image.fromarray(GRAY), first(GRAY)),
    "L, a shade transparent": (
        keyed(Image.fromarray(GRAY), int(GRAY[0, 0])),
        first(np.where(GRAY[0, 0] == GRAY, 255, GRAY)),
    ),
    "LA": (LA, over_white(GRAY[..., None], ALPHA)),
    "La": (LA.convert("La"), over_white(GRAY[..., None], ALPHA)),
    "P": (palette(), first(SEEN)),
    "P, a colour transparent": (
        palette(transparency=int(INDEX[0, 0])),
        first(np.where(INDEX[..., None] == INDEX[0, 0], 255, SEEN)),
    ),
    "P, colours half transparent": (
        palette(transparency=bytes(range(0, 256, 32))),
        over_white(SEEN, np.arange(0, 256, 32, dtype=np.uint8)[INDEX]),
    ),
    "PA": (
        Image.merge("PA", (Image.fromarray(INDEX), Image.fromarray(ALPHA))),
        np.empty(0),  # filled below: a palette cannot be merged
    ),
    "RGB": (COLOUR, first(RGB)),
    "RGB, a colour transparent": (
        keyed(COLOUR, tuple(RGB[0, 0].tolist())),
        first(np.where((RGB[0, 0] == RGB).all(-1, keepdims=True), 255, RGB)),
    ),
    "RGBA": (RGBA, over_white(RGB, ALPHA)),
    "RGBa": (RGBA.convert("RGBa"), over_white(RGB, ALPHA)),
    "RGBX": (COLOUR.convert("RGBX"), first(RGB)),
    "CMYK": (COLOUR.convert("CMYK"), first(RGB)),
    "YCbCr": (COLOUR.convert("YCbCr"), first(RGB)),
    "LAB": (COLOUR.convert("LAB"), first(RGB)),
    "HSV": (COLOUR.convert("HSV"), first(RGB)),
    "I;16": (Image.fromarray(RAMP), first(RAMP / 257)),
    "I;16, a shade transparent": (
        keyed(Image.fromarray(RAMP), int(RAMP[0, 0])),
        first(np.where(RAMP[0, 0] == RAMP, 255, RAMP / 257)),
    ),
    "I;16B": (Image.frombytes("I;16B", (SIDE, SIDE), RAMP.astype(">u2").tobytes()), first(RAMP / 257)),
    "I;16L": (Image.frombytes("I;16L", (SIDE, SIDE), RAMP.astype("<u2").tobytes()), first(RAMP / 257)),
}  # fmt: skip
with_palette = palette().convert("PA")
with_palette.putalpha(Image.fromarray(ALPHA))
IMAGES["PA"] = (with_palette, over_white(SEEN, ALPHA))
TOLERANCE = {"HSV": 6, "LAB": 20, "YCbCr": 3, "RGBa": 2, "La": 2}
"""What the mode itself loses: LAB has no place for the strongest colours."""


@pytest.mark.parametrize("name", IMAGES)
def test_every_mode_of_pillow_shows_what_it_means(name: str) -> None:
    image, expected = IMAGES[name]
    assert image.mode == name.split(",")[0]
    found = to_uint8(image)
    assert found.shape == expected.shape
    error = np.abs(found.numpy() - expected.astype(float))
    assert error.max() <= TOLERANCE.get(name, 1)
    assert error.mean() < 1.5


def written(image: Image.Image, folder: Path) -> Path | None:
    """A file that holds exactly this image; None if no format takes its mode."""
    for kind in ("png", "tiff"):
        file = folder / f"picture.{kind}"
        try:
            image.save(file)
        except (OSError, KeyError, ValueError):
            file.unlink(missing_ok=True)
            continue
        return file
    return None


NO_FILE = {"La", "RGBa", "HSV"}
"""Modes that no format writes."""


@pytest.mark.parametrize("name", sorted(IMAGES.keys() - NO_FILE))
def test_a_file_and_an_item_of_a_data_set_give_the_same(name: str, tmp_path: Path) -> None:
    for c in "abc":
        (tmp_path / "in" / c).mkdir(parents=True)
        assert written(IMAGES[name][0], tmp_path / "in" / c) is not None
    file = next((tmp_path / "in" / "a").iterdir())
    with Image.open(file) as image:
        pairs = ClassImages.from_pairs([(image, 0)])
        assert (
            np.asarray(decode(file.read_bytes(), "x")).tolist() == np.asarray(plain(image)).tolist()
        )
    gray = pairs.shape[0] == 1
    for channels in (1, 3) if gray else (3,):
        with pytest.warns(UserWarning, match="in two splits, byte for byte"):  # as they are meant
            folder = load_folder(
                tmp_path / "in", "test", tmp_path / "root", image_size=SIDE, channels=channels
            )
        assert torch.equal(
            folder.images[folder.first[0]], pairs.converted(None, channels).images[0]
        )


@pytest.mark.parametrize("name", sorted(NO_FILE))
def test_no_file_has_the_modes_that_are_left_out_above(name: str, tmp_path: Path) -> None:
    assert written(IMAGES[name][0], tmp_path) is None


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused_by_item_and_by_file(mode: str) -> None:
    image = Image.new(mode, (SIDE, SIDE), 300)
    with pytest.raises(
        InputError, match=f"item 1 of list .*mode {mode} .*scale .* mode L"
    ) as error:
        EpisodeSampler([(COLOUR, 0), (image, 1)])
    assert "\n" not in str(error.value)
    out = io.BytesIO()
    image.save(out, "TIFF")
    with pytest.raises(InputError, match=f"a.tif: .*mode {mode} .*scale .* mode L"):
        decode(out.getvalue(), "a.tif")


def test_an_image_file_that_breaks_off_is_named_by_its_item(tmp_path: Path) -> None:
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:4000])
    with (
        Image.open(tmp_path / "a.png") as image,
        pytest.raises(InputError, match="item 0 of list cannot be read"),
    ):
        EpisodeSampler([(image, 0)])


def pgm(top: int, values: np.ndarray[Any, Any]) -> bytes:
    return f"P5 {SIDE} {SIDE} {top}\n".encode() + values.astype(">u2").tobytes()


@pytest.mark.parametrize("top", [1023, 4095, 65535])
def test_a_graymap_of_more_than_8_bits_has_its_own_white(top: int) -> None:
    data = pgm(top, RAMP.astype(np.int64) * top // 65535)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "I"
        found = to_uint8(image)
        assert np.abs(found.numpy() - first(RAMP / 257)).max() <= 1.01
        assert np.array_equal(np.asarray(decode(data, "x")), found[0].numpy())
        with pytest.raises(ValueError, match="mode I"):  # a copy no longer tells its range
            to_uint8(image.copy())


def tiff(bits: int, photometric: int, data: bytes) -> bytes:
    """The TIFF files that Pillow reads and does not write."""
    tags = [(256, 4, SIDE), (257, 4, SIDE), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8 + 2 + 9 * 12 + 4), (277, 3, 1), (278, 4, SIDE), (279, 4, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def in_12_bits(values: np.ndarray[Any, Any]) -> bytes:
    pairs = values.reshape(-1, 2).astype(int).tolist()
    return b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in pairs)


@pytest.mark.parametrize(
    "data",
    [tiff(12, 1, in_12_bits(RAMP >> 4)), tiff(16, 0, (65535 - RAMP).tobytes())],
    ids=["12 bits", "white is 0"],
)
def test_what_a_tiff_says_of_its_range_counts(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        assert np.abs(to_uint8(image).numpy() - first(RAMP / 257)).max() <= 1


def test_a_ramp_of_16_bits_stays_a_ramp() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pairs = [(form, i % 3) for i in range(6) for form in (Image.fromarray(ramp), ramp)]
    with pytest.warns(UserWarning, match="stored in 8 bits"):
        x = EpisodeSampler(pairs, ways=3, shots=1, queries=1).sample(1).support_x
    assert x.shape == (1, 3, 1, 64, 64)
    wanted = torch.linspace(0, 1, 64 * 64).view(64, 64)
    assert (x - wanted).abs().max() <= 1 / 255


FORMS: dict[str, Callable[[], Any]] = {
    "(H, W)": lambda: GRAY,
    "(H, W, 1)": lambda: GRAY[..., None],
    "not writable": lambda: np.asarray(Image.fromarray(GRAY)),
    "reversed twice": lambda: np.ascontiguousarray(GRAY[::-1, ::-1])[::-1, ::-1],
    "uint16": lambda: GRAY.astype(np.uint16) * 257,
    "big-endian": lambda: (GRAY.astype(np.uint16) * 257).astype(">u2"),
    "float16": lambda: (GRAY / 255).astype(np.float16),
    "float64": lambda: GRAY / 255,
    "(H, W) tensor": lambda: torch.from_numpy(GRAY),
    "(1, H, W) tensor": lambda: torch.from_numpy(GRAY)[None],
    "uint16 tensor": lambda: torch.from_numpy(GRAY.astype(np.uint16) * 257)[None],
    "float tensor": lambda: torch.from_numpy(GRAY)[None] / 255,
    "half tensor": lambda: (torch.from_numpy(GRAY)[None] / 255).half(),
    "tensor with a gradient": lambda: (torch.from_numpy(GRAY)[None] / 255).requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_gray_image_in_every_form(form: str) -> None:
    assert to_uint8(FORMS[form]()).tolist() == GRAY[None].tolist()


def test_colours_are_channels_last_in_arrays_and_first_in_tensors() -> None:
    wanted = RGB.transpose(2, 0, 1).tolist()
    assert to_uint8(RGB).tolist() == wanted
    assert to_uint8(RGB.astype(np.uint16) * 257).tolist() == wanted
    assert to_uint8(torch.from_numpy(RGB).permute(2, 0, 1)).tolist() == wanted
    bands = torch.zeros(7, SIDE, SIDE)
    assert to_uint8(bands).shape == bands.shape


@pytest.mark.parametrize("image", [RGBA, LA], ids=lambda image: image.mode)
@pytest.mark.parametrize("scale", ["uint8", "uint16", "float"])
def test_alpha_in_an_array_is_that_of_the_image(image: Image.Image, scale: str) -> None:
    array = np.asarray(image)
    forms = {"uint8": array, "uint16": array.astype(np.uint16) * 257, "float": array / 255}
    assert torch.equal(to_uint8(forms[scale]), to_uint8(image))


def test_bools_are_black_and_white() -> None:
    mask = GRAY > 127
    wanted = first(np.where(mask, 255, 0)).tolist()
    assert to_uint8(mask).tolist() == wanted
    assert to_uint8(torch.from_numpy(mask)).tolist() == wanted
    data = ClassImages.from_tensors(torch.from_numpy(mask)[None, None], [0])
    assert data.images[0].tolist() == wanted


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros((8, 8), np.int16), "type int16 have no known range"),
        (np.zeros((8, 8), np.int64), "type int64"),
        (np.zeros((8, 8), np.uint32), "type uint32"),
        (np.zeros((8, 8), complex), "type complex128"),
        (torch.zeros(1, 8, 8, dtype=torch.int32), "type int32"),
        (np.full((8, 8), 1.5), r"lie in \[0, 1\], got \[1.5, 1.5\]"),
        (np.full((8, 8), np.nan), r"lie in \[0, 1\], got \[nan, nan\]"),
        (torch.full((1, 8, 8), float("nan")), r"lie in \[0, 1\]"),
        (np.zeros((3, 8, 8), np.uint8), r"pass \(C, H, W\) as a tensor"),
        (torch.zeros(8, 8, 3), r"pass \(H, W, C\) as an array"),
        (torch.zeros(4, 8, 8), "4 channels may have an alpha channel or not"),
        (torch.zeros(2, 8, 8), "2 channels may have"),
        (np.zeros((2, 8, 8, 3), np.uint8), "got shape"),
        (torch.zeros(1, 1, 8, 8), "got shape"),
        (np.zeros((0, 8), np.uint8), "got shape"),
        (torch.zeros(1, 0, 8), "got shape"),
        ("a.png", "got shape"),
    ],
)  # fmt: skip
def test_what_could_mean_several_things_is_refused_by_item(item: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"item 1 of list cannot be read: .*{message}") as error:
        EpisodeSampler([(COLOUR, 0), (item, 1)])
    assert "\n" not in str(error.value)


def test_images_without_a_known_range_are_refused_whole() -> None:
    with pytest.raises(InputError, match="int64 have no known range; give uint8"):
        ClassImages.from_tensors(torch.zeros(3, 1, 2, 2, dtype=torch.int64), [0, 1, 2])
    with pytest.raises(InputError, match="nan"):
        ClassImages.from_tensors(torch.full((3, 1, 2, 2), float("nan")), [0, 1, 2])
    with pytest.raises(InputError, match="no examples"):
        EpisodeSampler([])


def test_all_8_bits_survive_a_float() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert torch.equal(eight_bit(every.to(dtype) / 255), every)


@pytest.mark.parametrize(
    "item", [Image.new("LA", (3, 2), (255, 7)), np.full((2, 3, 4), (255, 255, 255, 9), np.uint8)]
)
def test_a_white_drawing_that_vanishes_over_white_is_told(item: Image.Image) -> None:
    """Read at once or whenever it is drawn."""
    text = "an image became white when transparency was laid over white; lay white drawings over"
    for read in (to_uint8, as_input, lambda x: ClassImages.from_pairs([(x, 0)])):
        with pytest.warns(UserWarning, match=text):
            read(item)


def test_images_of_one_colour_that_were_drawn_so_are_not_told() -> None:
    assert to_uint8(Image.new("RGB", (3, 2), "white")).min() == 255
    assert to_uint8(Image.new("LA", (1, 1), (255, 7))).tolist() == [[[255]]]  # a single pixel
    assert to_uint8(Image.new("RGBA", (3, 2), (255, 0, 0, 255)))[:, 0, 0].tolist() == [255, 0, 0]
    assert to_uint8(Image.new("RGBA", (3, 2), "white")).min() == 255  # all of it opaque
    assert to_uint8(Image.new("RGBA", (3, 2), (255, 0, 0, 127)))[0].min() == 255  # pink
