"""The programs in ``examples/`` that bring data of their own: short, and they learn something."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests run beside each other, and such small models gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["embeddings", "tokens"])
def test_what_is_learned_helps_with_new_classes(name: str) -> None:
    file = EXAMPLES / f"{name}.py"
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 60
    before, after = runpy.run_path(str(file))["main"](iterations=60)
    assert len(before.values) == len(after.values) == 300
    assert after.mean - after.ci95 > before.mean + before.ci95


def test_a_run_over_embeddings_goes_on_and_is_the_same(tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLES / "embeddings.py"))["main"]
    first = main(tmp_path / "run", iterations=4)[1]
    again = main(tmp_path / "run", iterations=4)[1]  # finished: nothing is trained
    assert (first.values == again.values).all()
