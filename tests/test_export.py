"""An adapted model that was exported says what it says itself, image by image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

from gametalearn import MAML, ClassImages, Conv4, EpisodeSampler, ResNet12, adapt

WAYS, SIZE = 3, 20


def own() -> nn.Module:
    """Batch norm as one would write it, in two places."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 9 * 9, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, WAYS),
    )  # fmt: skip


MODELS: dict[str, Any] = {
    "conv4": lambda: Conv4(WAYS, image_size=SIZE, hidden=6),
    "conv4, max-pool, by support": lambda: Conv4(
        WAYS, image_size=SIZE, hidden=6, pool="max", norm="support", mean=(0.4,), std=(0.3,)
    ),
    "resnet12": lambda: ResNet12(WAYS, 1, (3, 4)),
    "of one's own": own,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_torch_export_and_onnx_agree_image_by_image(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (60, 1, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    data = ClassImages.from_tensors(pixels, torch.arange(60) // 6)
    batch = EpisodeSampler(data, WAYS, 2, 4, seed=1).sample(1)
    torch.manual_seed(0)
    model = MODELS[name]()
    adapted = adapt(model, batch.support_x[0], batch.support_y[0], MAML(0.3, 2)).eval()
    images = batch.query_x[0]
    with torch.no_grad():
        wanted = torch.cat([adapted(image[None]) for image in images])
        torch.testing.assert_close(adapted(images), wanted, rtol=0, atol=1e-5)
    assert (wanted.max(0).values - wanted.min(0).values).max() > 0.1  # there is something to tell

    torch.export.save(torch.export.export(adapted, (images[:1],)), tmp_path / "a.pt2")
    exported = torch.export.load(tmp_path / "a.pt2").module()
    program = torch.onnx.export(adapted, (images[:1],), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    (given,) = (one.name for one in session.get_inputs())
    for image, logits in zip(images, wanted, strict=True):
        (found,) = session.run(None, {given: image[None].numpy()})
        torch.testing.assert_close(torch.from_numpy(found)[0], logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(exported(image[None])[0], logits, rtol=0, atol=1e-5)
