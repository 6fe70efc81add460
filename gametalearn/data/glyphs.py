"""Glyphs: the embedded data set, drawn from the fonts that matplotlib ships. Needs no download.

A class is one character; its samples are drawn in the DejaVu and STIX faces that have it (sans,
serif and mono, regular and bold), each with its own affine and elastic distortion and stroke width.
Every glyph fills the same box, so size tells no class from another. `gametalearn.data.glyph_table`
lists the characters, which script is in which split, and how look-alikes were found and left out.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from gametalearn.data.glyph_table import SCRIPTS, Script
from gametalearn.data.packed import PackedWriter, data_root, packing, read_or_build
from gametalearn.errors import InputError, require_whole
from gametalearn.images import ClassImages
from gametalearn.terminal import on_terminal, tell

__all__ = ["SCRIPTS", "Script", "build_glyphs", "load_glyphs"]

GENERATOR = 1  # raise it when images or classes change: caches of another generator are rebuilt
LEAST = 1000  # classes; fonts that have fewer of our characters are refused
SAMPLES, SIZE = 20, 28
SPLITS = ("train", "val", "test", "all")
FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
)
CANVAS, DRAWN = 64, 48  # pixels: side of a drawing, and the longer side of the ink on it
FILLED = 20 / 28  # the part of an image's side that the ink fills, before it is scaled at random
MARGIN = 2 / 28  # the part of an image's side that the ink's box stays away from every edge


def load_glyphs(split: str, root: Path | None = None, seed: int = 0) -> ClassImages:
    """The classes of one split, 20 images of 1 x 28 x 28 each, white ink on black.

    They are drawn on first use, which is said on stderr, and kept in ``root/glyphs`` (for a seed
    other than 0, ``root/glyphs-SEED``); a cache that is damaged or of another version is rebuilt.

    Args:
        split: ``train``, ``val``, ``test`` (scripts that are in no other split) or ``all``.
        root: the data root; `data_root` by default.
        seed: of the distortions, at least 0. The classes and splits do not depend on it.

    Raises:
        InputError: an unknown split, matplotlib's fonts are missing, or ``root`` is not writable.
    """
    if split not in SPLITS:
        raise InputError(f"glyphs: split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    _check(seed=seed)
    root = data_root() if root is None else root
    folder = root / ("glyphs" if seed == 0 else f"glyphs-{seed}")
    images, records = read_or_build(
        folder,
        "glyphs",
        (1, SIZE, SIZE),
        lambda out: _write(out, folder, seed, SAMPLES, SIZE),
        **_info(seed, SAMPLES, SIZE),
    )
    kept = [i for i, record in enumerate(records) if split in (record.split, "all")]
    return images.subset(kept, split)


def build_glyphs(folder: Path, seed: int = 0, samples: int = SAMPLES, size: int = SIZE) -> None:
    """Draw the data set and write it, packed, to ``folder``.

    Equal arguments and equal versions of Pillow, matplotlib and torch give equal files.

    Args:
        folder: for `gametalearn.data.packed.read_packed`; what it holds is replaced.
        seed: of the distortions, at least 0.
        samples: images per class.
        size: side of an image in pixels, at least 8.

    Raises:
        InputError: an argument out of range, fonts missing, or ``folder`` is not writable.
    """
    _check(seed=seed, samples=samples, size=size)
    with packing(folder, (1, size, size), **_info(seed, samples, size)) as out:
        _write(out, folder, seed, samples, size)


def _check(**given: int) -> None:
    least = {"seed": 0, "samples": 1, "size": 8}
    for name, value in given.items():
        require_whole(f"glyphs: {name}", value, least[name])


def _info(seed: int, samples: int, size: int) -> dict[str, int]:
    return {"generator": GENERATOR, "seed": seed, "samples": samples, "size": size}


def _write(out: PackedWriter, folder: Path, seed: int, samples: int, size: int) -> None:
    fonts = Fonts()
    work = [(s, c) for s in SCRIPTS for c in s.characters if fonts.having(c)]
    if len(work) < LEAST:
        raise InputError(
            f"glyphs: the fonts in {fonts.folder} have {len(work)} of the data set's "
            f"{sum(len(s.characters) for s in SCRIPTS)} characters; reinstall matplotlib"
        )
    tell(f"glyphs: drawing {len(work)} x {samples} images to {folder} (once)")
    images = draw(fonts, [c for _, c in work], seed, samples, size)
    with tqdm(total=len(work), unit="class", desc="glyphs", disable=not on_terminal()) as progress:
        for (script, character), drawn in zip(work, images, strict=True):
            name = f"U+{ord(character):04X} {unicodedata.name(character)}"
            out.add(name, script.name, drawn, script.split)
            progress.update()


class Fonts:
    """The faces of `FACES` that matplotlib's font folder has, and the characters that each covers.

    Raises:
        InputError: there is no face at all.
    """

    def __init__(self, folder: Path | None = None) -> None:
        from PIL import ImageFont

        if folder is None:
            import matplotlib

            folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self.folder = folder
        files = {face: folder / f"{face}.ttf" for face in FACES}
        files = {face: file for face, file in files.items() if file.is_file()}
        if not files:
            raise InputError(
                f"glyphs: no DejaVu or STIX font in {folder}; reinstall matplotlib, which ships them"
            )
        from matplotlib.ft2font import FT2Font

        # the basic layout draws one glyph a character, whatever text shaping Pillow was built with
        self._fonts = {
            face: ImageFont.truetype(str(file), 64, layout_engine=ImageFont.Layout.BASIC)
            for face, file in files.items()
        }
        self._covered = {
            face: set(FT2Font(str(file)).get_charmap()) for face, file in files.items()
        }

    def having(self, character: str) -> list[str]:
        """The faces that have a character."""
        return [face for face, covered in self._covered.items() if ord(character) in covered]

    def ink(self, character: str, face: str) -> NDArray[np.bool_]:
        """A character, its longer side `DRAWN` pixels, in the middle of a square of `CANVAS`."""
        from PIL import Image, ImageDraw

        font = self._fonts[face]
        left, top, right, bottom = font.getbbox(character)
        font = font.font_variant(size=font.size * DRAWN / max(right - left, bottom - top))
        left, top, right, bottom = font.getbbox(character)
        image = Image.new("L", (CANVAS, CANVAS))
        middle = (CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2
        ImageDraw.Draw(image).text(middle, character, font=font, fill=255)
        return np.asarray(image) >= 128


@dataclass(frozen=True)
class Outline:
    """A character in one face, as a signed distance field; lengths are in canvas pixels.

    Attributes:
        distance: ``(CANVAS, CANVAS)``, from a pixel's centre to the outline, positive in the ink.
        box: half the width and half the height of the ink.
        stroke: half the width of a typical stroke.
        thin: half the width of the thin strokes.
    """

    distance: NDArray[np.float32]
    box: tuple[float, float]
    stroke: float
    thin: float

    @staticmethod
    def of(ink: NDArray[np.bool_]) -> Outline:
        """Trace a drawing of black and white."""
        from scipy.ndimage import distance_transform_edt, maximum_filter

        inside, outside = distance_transform_edt(ink), distance_transform_edt(~ink)
        distance = np.where(ink, inside - 0.5, 0.5 - outside).astype(np.float32)
        ridge = distance[ink & (distance >= maximum_filter(distance, 3))]
        rows, columns = np.nonzero(ink)
        return Outline(
            distance,
            (float(np.ptp(columns) + 1) / 2, float(np.ptp(rows) + 1) / 2),
            float(np.median(ridge)),
            float(np.quantile(ridge, 0.25)),
        )


def draw(
    fonts: Fonts, characters: Sequence[str], seed: int, samples: int, size: int
) -> Iterator[NDArray[np.uint8]]:
    """The samples ``(samples, 1, size, size)`` of each character.

    A character's samples depend on the seed and itself alone, not on the others. Each face is drawn
    equally often, as far as the numbers allow.
    """
    for start in range(0, len(characters), 50):  # 50 at a time: fast, and about 100 MB
        outlines: list[Outline] = []
        distortions: list[Distortion] = []
        for character in characters[start : start + 50]:
            rng = np.random.default_rng((seed, ord(character)))
            faces = [Outline.of(fonts.ink(character, face)) for face in fonts.having(character)]
            chosen = rng.permutation(len(faces))[np.arange(samples) % len(faces)]
            outlines += [faces[i] for i in chosen]
            distortions.append(Distortion.draw(rng, samples))
        images = warp(outlines, Distortion.cat(distortions), size)
        yield from images.view(-1, samples, 1, size, size).numpy()


@dataclass(frozen=True)
class Distortion:
    """Random numbers of n samples; lengths are fractions of the image's side.

    Attributes:
        rotation: ``(n,)`` radians, U(-15, 15) degrees.
        shear: ``(n,)`` U(-0.15, 0.15), of x by y.
        scale: ``(n,)`` U(0.8, 1.1).
        stretch: ``(n,)`` log of the ratio of width to height, U(-0.24, 0.24).
        shift: ``(n, 2)`` U(-1, 1), of the room that the glyph leaves, at most 3/28 of the side.
        stroke: ``(n,)`` U(0.75, 1.3), the factor on the stroke's width.
        elastic: ``(n, 2, 4, 4)`` normal, the displacements at the nodes of a grid over the image,
            standard deviation 0.7/28.
    """

    rotation: Tensor
    shear: Tensor
    scale: Tensor
    stretch: Tensor
    shift: Tensor
    stroke: Tensor
    elastic: Tensor

    @staticmethod
    def draw(rng: np.random.Generator, n: int) -> Distortion:
        """Draw n distortions."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.from_numpy(rng.uniform(low, high, (n, *shape)).astype(np.float32))

        elastic = 0.7 / 28 * rng.standard_normal((n, 2, 4, 4))
        return Distortion(
            rotation=torch.deg2rad(uniform(-15, 15)),
            shear=uniform(-0.15, 0.15),
            scale=uniform(0.8, 1.1),
            stretch=uniform(-0.24, 0.24),
            shift=uniform(-1, 1, 2),
            stroke=uniform(0.75, 1.3),
            elastic=torch.from_numpy(elastic.astype(np.float32)),
        )

    @staticmethod
    def cat(parts: Sequence[Distortion]) -> Distortion:
        """Join distortions along the samples."""
        return Distortion(
            **{f: torch.cat([getattr(p, f) for p in parts]) for f in Distortion.__annotations__}
        )


def warp(outlines: Sequence[Outline], d: Distortion, size: int) -> Tensor:
    """Draw distorted outlines as ``(n, size, size)`` uint8, 255 = ink, anti-aliased.

    An output pixel at x (from the image's centre) looks up the signed distance of its glyph at
    M^-1 (x - shift + elastic(x)), M = rotation @ [[width, lean], [0, height]], and takes it for its own distance
    to the outline; adding a constant to it changes the stroke width, and its clamp to one pixel
    around the outline is the anti-aliased ink.
    """
    n, unit = len(outlines), size * FILLED / DRAWN  # output pixels a canvas pixel
    box = torch.tensor([o.box for o in outlines]) * unit
    stroke = torch.tensor([o.stroke for o in outlines]) * unit
    thin = torch.tensor([o.thin for o in outlines]) * unit

    cos, sin = d.rotation.cos(), d.rotation.sin()
    width, height = d.scale * (d.stretch / 2).exp(), d.scale * (-d.stretch / 2).exp()
    lean = d.shear * height
    # the rows of M = rotation @ [[width, lean], [0, height]]
    forward = torch.stack(
        [cos * width, cos * lean - sin * height, sin * width, sin * lean + cos * height], dim=-1
    ).view(n, 2, 2)
    # where the turned box would come too near to the edge, the glyph is made smaller
    extent = (forward.abs() * box.unsqueeze(1)).sum(dim=-1)
    room = size * (0.5 - MARGIN)
    fit = (room / extent.amax(dim=1)).clamp(max=1)
    shift = d.shift * (room - extent * fit.unsqueeze(1)).clamp(0, size * 3 / 28)
    (a, b), (c, e) = forward[:, 0].unbind(-1), forward[:, 1].unbind(-1)
    inverse = torch.stack([e, -b, -c, a], dim=-1) / (fit * width * height).unsqueeze(-1)

    centres = torch.arange(size) + 0.5 - size / 2
    at = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1)
    elastic = F.interpolate(d.elastic, (size, size), mode="bicubic", align_corners=True)
    at = at + size * elastic.permute(0, 2, 3, 1) - shift.view(n, 1, 1, 2)
    # no matrix product here: its summation may depend on n, and with it the last bit
    grid = (at.unsqueeze(-2) * inverse.view(n, 1, 1, 2, 2)).sum(dim=-1) / (unit * CANVAS / 2)
    field = torch.from_numpy(np.stack([o.distance for o in outlines])).unsqueeze(1)
    distance = F.grid_sample(field, grid, padding_mode="border", align_corners=False).squeeze(1)

    scale = d.scale * fit
    distance = distance * (unit * scale).view(n, 1, 1)
    # half widths in 28ths of the side: strokes end between 0.7 and 1.5, hairlines above 0.55
    pixel = size / 28
    target = (stroke * scale * d.stroke).clamp(0.7 * pixel, 1.5 * pixel)
    wider = torch.maximum(target - stroke * scale, 0.55 * pixel - thin * scale)
    ink = (distance + wider.view(n, 1, 1) + 0.5).clamp(0, 1)
    return (255 * ink).round().to(torch.uint8)
