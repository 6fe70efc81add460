"""`read_metrics`: the columns are what ``metrics.jsonl`` holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gametalearn import InputError, read_metrics, train
from tests.support.runs import tiny


def test_a_column_for_each_number_and_nan_where_a_line_has_none(tmp_path: Path) -> None:
    train(tiny(iterations=7), tmp_path / "run", progress=False)
    columns = read_metrics(tmp_path / "run")
    lines = [
        json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert {len(column) for column in columns.values()} == {len(lines)} == {7}
    assert columns["iteration"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert columns["loss"].tolist() == [line["loss"] for line in lines]
    norms = [line["diagnostics"]["update_norm"] for line in lines]
    assert columns["diagnostics/update_norm"].tolist() == norms
    tested = ["validation" in line for line in lines]
    assert np.isfinite(columns["validation/mse"]).tolist() == tested
    assert sum(tested) == 3
    assert "losses" not in columns
    assert "cosine" not in lines[0]["diagnostics"]


def test_cosines_are_logged_where_they_are_asked_for(tmp_path: Path) -> None:
    train(tiny(iterations=1, log_matrices=True), tmp_path / "run", progress=False)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert np.array(record["diagnostics"]["cosine"]).shape == (4, 4)


def test_what_is_not_there_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run there"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iter')
    with pytest.raises(InputError, match=r"metrics\.jsonl: damaged"):
        read_metrics(tmp_path)
