"""Imports follow the flow of data: the order of the packages, checked on the code itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gametalearn

ROOT = Path(gametalearn.__file__).parent

ORDER = [
    "copies errors frozen pixels records trees units words",
    "classes files models randomness registry statistics terminal update",
    "canvas checkpoint images losses normalisation places tradeoffs",
    "examples scores settings shares",
    "adaptation config episodes",
    "data disagreement engine environment flags loader mixture objective_tables prototypes schedules sheet",
    "gradients peek provenance tables",
    "benchmark dependence resuming weighting",
    "bridges build diagnostics distributed predictor",
    "evaluation transfer",
    "objectives run",
    "metrics progress results",
    "live protocols runfolder stored tensorboard",
    "evaluating probing training",
    "jobs",
    "logs singles workers",
    "cautions comparison figures objective_figures",
    "public report",
    "commands",
    "cli",
    "__main__",
]
"""A module imports from lines above its own; a package from itself, too."""

LEVEL = {name: i for i, names in enumerate(ORDER) for name in names.split()}


def modules():
    return [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]


@pytest.mark.parametrize("file", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_upstream(file):
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own}: say in ORDER where it stands in the flow"
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "gametalearn":
            names = [f"gametalearn.{a.name}" for a in node.names if a.name != "__version__"]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            other = name.removeprefix("gametalearn.").split(".")[0]
            if name.startswith("gametalearn.") and other != own:
                assert LEVEL[other] < LEVEL[own], f"{own} imports {other}, which is downstream"


def test_a_rule_sees_no_model_data_or_optimiser():
    for file in (ROOT / "weighting").glob("*.py"):
        text = file.read_text()
        for name in ("models", "data", "training", "update", "episodes"):
            assert f"gametalearn.{name}" not in text, f"{file.name} imports {name}"


def test_the_import_is_light():
    program = (
        "import sys, gametalearn, gametalearn.cli; assert 'torch' not in sys.modules; "
        "gametalearn.train; print([m for m in ('matplotlib', 'torchvision', 'learn2learn', 'torchjd', 'scipy', 'PIL', "
        "'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    assert all(hasattr(gametalearn, name) for name in gametalearn.__all__)
    fixed = """TaskBatch EpisodeSampler MAML ANIL MetaSGD Reptile meta_gradients TaskGradients evaluate
    train compare agreement_weights agreement_weights_from_gramian Uniform GradientAgreement"""
    assert set(fixed.split()) <= set(gametalearn.__all__)
