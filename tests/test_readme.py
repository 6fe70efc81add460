"""The README's section on Python, run as it stands, one block after the other."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gametalearn import Conv4, TrainConfig, train

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = README.read_text(encoding="utf-8").partition("\n## In Python\n")[2]
    section = re.split(r"^## ", section, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    config = TrainConfig.of(iterations=2, meta_batch=2, validation_episodes=4, threads=1)
    run = train(config, tmp_path / "runs" / "demo" / "uniform" / "seed0")  # what make demo leaves
    names: dict[str, Any] = {}
    for block in blocks[:2]:
        exec(block, names)
    assert "100 episodes, transductive" in capsys.readouterr().out
    exec(blocks[2], {**names})
    assert "% (600 episodes, inductive)" in capsys.readouterr().out.partition("near ")[2]
    assert names["gradients"].rows.shape == (16, sum(p.numel() for p in run.model.parameters()))
    weights = torch.load("fitted.pt", weights_only=True)
    fitted, x = names["fitted"], names["batch"].query_x[0]
    fresh = Conv4(config.ways, hidden=config.hidden, pool=config.pool, norm="frozen")  # type: ignore[arg-type]
    fresh.load_state_dict(weights)  # strict: the same names and shapes
    assert torch.equal(fresh(x), fitted(x))
    torch.testing.assert_close(torch.export.load("fitted.pt2").module()(x), fitted(x))
    for name in ("checkpoint.pt", "best.pt"):
        saved = torch.load(run.out / name, weights_only=True) if run.out else {}
        run.model.load_state_dict(saved["model"])
