from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gametalearn import ClassImages, InputError


def images(shape: tuple[int, ...] = (3, 8, 8), classes: int = 3, each: int = 2) -> ClassImages:
    count = classes * each
    pixels = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=torch.manual_seed(0))
    return ClassImages.from_tensors(pixels, torch.arange(count) // each)


def test_from_tensors_sorts_by_label() -> None:
    pixels = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    data = ClassImages.from_tensors(pixels, [7, 2, 7, 2, 7, 9])
    assert data.classes == ("2", "7", "9")
    assert data.first.tolist() == [0, 2, 5]
    assert data.count.tolist() == [2, 3, 1]
    assert data.images.flatten().tolist() == [1, 3, 0, 2, 4, 5]


def test_take_is_a_float_in_0_1() -> None:
    data = images()
    index = torch.tensor([[0, 5], [2, 2]])
    taken = data.take(index)
    assert taken.shape == (2, 2, 3, 8, 8)
    assert torch.equal((taken[0, 1] * 255).round().to(torch.uint8), data.images[5])
    assert taken.min() >= 0
    assert taken.max() <= 1


def test_subset_keeps_names_and_images_together() -> None:
    data = images(classes=5)
    part = data.subset([4, 1], split="val")
    assert part.split == "val"
    assert part.classes == ("4", "1")
    assert torch.equal(part.take(part.first[0]), data.take(data.first[4]))
    with pytest.raises(InputError, match="has no classes"):
        data.subset([])


MASK = [False, True, False, False, True]


@pytest.mark.parametrize(
    "keep",
    [MASK, np.array(MASK), torch.tensor(MASK), (1, 4), {1: "a", 4: "b"}, iter([1, 4]),
     np.array([1, 4], np.uint8), torch.tensor([1, 4], dtype=torch.int16), [torch.tensor(1), np.int64(4)]],
)  # fmt: skip
def test_subset_by_a_mask_or_by_indices(keep: Any) -> None:
    assert images(classes=5).subset(keep).classes == ("1", "4")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([1, 2, 1], "got index 1 twice; name each class once"),
        ([0, 5], "got index 5, but its 5 classes have the indices 0 to 4"),
        (torch.tensor([-1]), "got index -1, but"),
        ([1.0, 2.0], "takes one integer per class, or a mask of bool, got float64"),
        (torch.tensor([0.5]), "takes one integer per class, or a mask of bool, got float32"),
        (["1"], "takes one integer per class"),
        (torch.ones(1, 2, dtype=torch.int64), r"got int64 of shape \(1, 2\)"),
        ([True, False], r"a mask for subset has one value per class, 5, got shape \(2,\)"),
        ([[1], [2, 3]], "subset takes a list of indices"),
        (3, "subset takes a list of indices"),
    ],
)
def test_what_is_no_subset(keep: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"ClassImages '.*': .*{message}") as error:
        images(classes=5).subset(keep)
    assert "\n" not in str(error.value)


def test_rotated_of_a_subset() -> None:
    data = images(classes=4).subset([3, 0])
    turned = data.rotated()
    assert turned.num_classes == 8
    assert turned.classes[:4] == ("3", "0", "3@90", "0@90")
    for k in range(4):
        for c in range(2):
            for i in range(2):
                expected = np.rot90(data.images[data.first[c] + i].numpy(), k, (1, 2))
                found = turned.images[turned.first[2 * k + c] + i].numpy()
                assert np.array_equal(found, expected)


def test_what_is_not_square_cannot_be_turned() -> None:
    data = ClassImages.from_tensors(torch.zeros(4, 1, 4, 6, dtype=torch.uint8), [0, 0, 1, 1])
    with pytest.raises(
        InputError, match=r"4 x 6 pixels cannot be turned .* converted\(6\).rotated"
    ):
        data.rotated()
    assert data.converted(6).rotated().shape == (1, 6, 6)


@pytest.mark.parametrize("size", [4, 8, 20])
@pytest.mark.parametrize(("have", "want"), [(1, 3), (3, 1), (3, 3)])
def test_converted_against_pillow(size: int, have: int, want: int) -> None:
    ramp = torch.linspace(0, 255, 8 * 8).view(1, 8, 8)
    pixels = torch.stack([ramp, ramp.flip(2), ramp.mT]).view(3, 8, 8)[:have].to(torch.uint8)
    data = ClassImages.from_tensors(pixels.expand(4, -1, -1, -1), [0, 0, 1, 1]).subset([1])
    found = data.converted(size, want)
    assert found.shape == (want, size, size)
    assert len(found.images) == (2 if found.shape != data.shape else 4)
    array = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if have == 1 else array)
    image = image.convert("L" if want == 1 else "RGB").resize(
        (size, size), Image.Resampling.BILINEAR
    )
    expected = np.asarray(image).astype(int)
    expected = expected[None] if want == 1 else expected.transpose(2, 0, 1)
    assert (
        np.abs(found.images[found.first[0] + 1].numpy() - expected).max() <= 2
    )  # fixed-point rounding


def test_converted_to_what_it_is_does_nothing() -> None:
    data = images()
    assert data.converted() is data
    assert data.converted(8, 3) is data


@pytest.mark.parametrize("wrong", [{"size": 0}, {"channels": 2}, {"channels": 4}])
def test_converted_to_the_impossible(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="cannot become"):
        images().converted(**wrong)


def test_from_pairs_reads_what_torchvision_gives() -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    expected = torch.from_numpy(array).permute(2, 0, 1)
    forms = [
        Image.fromarray(array),
        array,
        expected,
        expected / 255,
        (array / 255).astype(np.float32),
        Image.fromarray(array).convert("RGBA"),
    ]
    data = ClassImages.from_pairs([(form, i) for i, form in enumerate(forms)], name="forms")
    for i in range(len(forms)):
        assert torch.equal(data.images[i], expected), i


def test_one_bit_images_are_black_and_white() -> None:
    image = Image.new("1", (4, 4), 1)
    data = ClassImages.from_pairs([(image, 0), (image, 1)])
    assert data.shape == (1, 4, 4)
    assert data.images.min() == 255


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(torch.full((1, 2, 2), 7.0), 0)], r"lie in \[0, 1\]"),
        ([(torch.zeros(1, 2, 2, dtype=torch.int64), 0)], "uint8"),
        ([1, 2], r"\(example, label\) pairs"),
        ([(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 3, 3), 0)], "one shape"),
    ],
)
def test_from_pairs_refuses(pairs: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClassImages.from_pairs(pairs)


def test_from_tensors_refuses() -> None:
    with pytest.raises(InputError, match="3 examples but 2 labels"):
        ClassImages.from_tensors(torch.zeros(3, 1, 2, 2), [0, 1])
    with pytest.raises(InputError, match=r"\[0, 2\]"):
        ClassImages.from_tensors(
            torch.full((1, 1, 2, 2), 2.0).index_fill(3, torch.tensor([0]), 0), [0]
        )
    with pytest.raises(InputError, match="uint8"):
        ClassImages.from_tensors(torch.zeros(3, 2, 2, dtype=torch.uint8), [0, 1, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_8_bits_hold_is_not_warned_of(dtype: torch.dtype) -> None:
    every = torch.arange(256).view(1, 1, 16, 16).to(dtype) / 255
    ClassImages.from_tensors(every, [0])  # a warning is an error here
    ClassImages.from_pairs([(every[0], 0)])


@pytest.mark.parametrize(
    "image",
    [
        torch.linspace(0, 1, 1000).view(1, 25, 40),
        np.linspace(0, 1, 1000).reshape(25, 40),
        np.arange(1000, dtype=np.uint16).reshape(25, 40),
        torch.linspace(0, 1, 1000).view(1, 25, 40).half(),
    ],
)
def test_what_8_bits_do_not_hold_is_told_once(image: Any) -> None:
    with pytest.warns(UserWarning, match="pairs: images are stored in 8 bits") as told:
        data = ClassImages.from_pairs([(image, 0), (image, 1)], "pairs")
    assert len(told) == 1
    exact = torch.as_tensor(np.asarray(image).astype(np.float64))
    exact = exact / 65535 if np.asarray(image).dtype == np.uint16 else exact
    lost = (data.take(torch.tensor(0)).double().flatten() - exact.flatten()).abs().max()
    assert lost <= 1 / 255
    stacked = torch.as_tensor(np.asarray(image)).view(1, 1, 25, 40)
    with pytest.warns(UserWarning, match="tensors: images are stored in 8 bits") as told:
        ClassImages.from_tensors(stacked, [0])
    assert len(told) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_are_refused(channels: int) -> None:
    """They were read as H channels of W x C pixels."""
    images = torch.zeros(4, 8, 8, channels, dtype=torch.uint8)
    for given in (images, images.numpy()):
        with pytest.raises(InputError, match=r"look like \(N, H, W, C\); pass images.permute"):
            ClassImages.from_tensors(given, [0, 0, 1, 1])
    assert ClassImages.from_tensors(images.permute(0, 3, 1, 2), [0, 0, 1, 1]).shape == (
        channels,
        8,
        8,
    )
    assert ClassImages.from_tensors(torch.zeros(4, 8, 1, 1), [0, 0, 1, 1]).shape == (8, 1, 1)
    with pytest.warns(UserWarning, match=r"look like \(N, H, W, C\); if they are, pass"):
        narrow = ClassImages.from_tensors(torch.zeros(4, 9, 8, channels), [0, 0, 1, 1])
    assert narrow.shape == (9, 8, channels)
