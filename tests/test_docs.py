"""The documentation does what it says: Python blocks run, commands parse, public names are there."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gametalearn
from gametalearn import Comparison, Evaluation, TrainConfig, cli, commands, registry
from gametalearn.config import OF_OBJECTIVES
from gametalearn.flags import read_config
from gametalearn.results import Result, write_results
from gametalearn.weighting.make import rule_options
from tests.support.commands import run
from tests.support.pages import (
    DOCS,
    HIDDEN,
    ROOT,
    Block,
    blocks,
    documents,
    programs,
    run_python,
)
from tests.support.pictures import pictures

EXPERIMENTS = sorted((ROOT / "experiments").glob("*.md"))
PYTHON = [page for page in documents() if blocks(page, "python")]
SHELL = [block for page in [*documents(), *EXPERIMENTS] for block in blocks(page, "sh")]

OTHERS = {"cd", "git", "open", "parallel", "sbatch", "tr", "xargs"}
"""What stands in shell blocks beside this project's own commands."""

LANGUAGES = {"python", "sh", "diff", "toml", "text", "bash", HIDDEN}


def ident(item: Path | Block) -> str:
    if isinstance(item, Block):
        return f"{item.page.relative_to(ROOT)}:{item.line}"
    return str(item.relative_to(ROOT))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(file: Path) -> Any:
    """A program that lies outside of the package, as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PYTHON, ids=ident)
def test_python_blocks_run(page: Path, elsewhere: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        run_python(blocks(page, "python", HIDDEN))


def test_every_block_is_of_a_language_that_is_tested() -> None:
    for page in documents():
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(
            [block for block in blocks(page) if block.language != HIDDEN]
        ), f"{page}: a fence that is indented, or that does not end"
        assert {block.language for block in blocks(page)} <= LANGUAGES, page


def test_a_block_that_fails_is_named_by_page_and_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_python(blocks(page, "python"))
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 5)


@pytest.mark.parametrize("block", SHELL, ids=ident)
def test_commands_are_commands(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flag, value, file and target of a shell block is one that there is."""
    monkeypatch.chdir(ROOT)
    shell = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True)
    assert not shell.returncode, shell.stderr
    for words in programs(block):
        check_program(words)


def check_program(words: list[str]) -> None:
    while re.fullmatch(r"[A-Z_]+=\S+", words[0]):  # a variable of its environment
        words = words[1:]
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if words[:2] == ["python", "-m"]:
        module, *rest = words[2:]
        if module == "gametalearn.benchmark":
            importlib.import_module("gametalearn.benchmark.__main__")._parse(rest)
            return
        assert module == "gametalearn", words
        words = ["gametalearn", *rest]
    if words[0] == "gametalearn":
        check_own(words[1:])
    elif words[0] == "python":
        check_script(words[1], words[2:])
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        for target in targets:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), target
    elif words[:2] == ["pip", "install"]:
        check_extras(words[2])
    else:
        assert words[0] in OTHERS, f"{words[0]}: what is that?"


def check_own(words: list[str]) -> None:
    """A command of ours: its parser takes it, and its settings fit each other."""
    parser = cli.parser_of(words)
    args = parser.parse_args(read_config(parser, words))
    if args.command in ("train", "compare", "episodes") and not getattr(args, "resume", None):
        commands.config_of(args)
    rules = getattr(args, "rules", "uniform")
    for rule in rules.split(",") if isinstance(rules, str) else rules:
        registry.require_known("rule", rule)


def check_script(file: str, words: list[str]) -> None:
    """A script: it is there, and its own parser takes the words."""
    script(ROOT / file).parse(words)


def check_extras(requirement: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.fullmatch(r"gametalearn(?:\[(\w+)\])?|\.(?:\[(\w+)\])?", requirement)
    assert found, requirement
    extra = found[1] or found[2]
    assert extra is None or extra in project["optional-dependencies"], requirement


@pytest.mark.parametrize(
    "words",
    ["gametalearn train --rule nosuch --out a", "gametalearn train --inner-lrs 1", "make nothing",
     "python experiments/read_weights.py RUN --nothing", "pip install gametalearn[nothing]", "sudo rm"],
)  # fmt: skip
def test_what_is_no_command_is_found(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit, gametalearn.InputError)):
        check_program(words.split())


TRAINED = "--iterations 2 --meta-batch 2 --validation-episodes 2 --model mlp --hidden 4 --threads 1"
SMALL = {
    "train": f"{TRAINED} --quiet",
    "compare": f"{TRAINED} --quiet --rules uniform,agreement --episodes 4 --seeds 1 --jobs 1",
    "evaluate": "--episodes 4 --quiet",
}
"""What makes a command small enough for a test; the last one of two flags wins."""

RUN = (
    "start.md",
    "tutorials/comparison.md",
    "howto/elsewhere.md",
    "howto/resume.md",
    "explanations/batchnorm.md",
)
"""Pages whose commands are run, small, one after the other."""


@pytest.mark.parametrize("name", RUN)
def test_commands_run(name: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(elsewhere / "characters", "character", 6, each=10)  # the reader's own
    count = 0
    for block in blocks(DOCS / name, "sh"):
        for words in programs(block):
            if words[0] != "gametalearn":
                continue
            small = SMALL.get(words[1], "")
            if "--resume" in words:  # which leaves settings as they are
                small = "--iterations 3 --quiet" if "--iterations" in words else "--quiet"
            code, _, err = run(capsys, words[1], *words[2:], *small.split())
            assert not code, f"{' '.join(words)}: {err}"
            count += 1
    assert count, f"{name} has no command"


REFERENCE = (
    "public",
    "weighting",
    "bridges",
    "bridges.learn2learn",
    "bridges.torchjd",
    "statistics",
)
"""Modules of gametalearn all of whose names the reference has."""


@pytest.mark.parametrize("module", REFERENCE)
def test_the_reference_has_every_public_name(module: str) -> None:
    found: Any = importlib.import_module(f"gametalearn.{module}")
    pages = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("reference/*.md"))
    entries = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    place = "gametalearn" if module == "public" else found.__name__
    for name in found.__all__:
        part = getattr(found, name)
        assert part.__doc__ or not callable(part), name
        assert entries & {place, f"{place}.{name}", f"gametalearn.{name}"} - {"gametalearn"}, name


def test_entries_of_the_reference_exist() -> None:
    for page in DOCS.glob("reference/*.md"):
        for entry in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, name = entry.rpartition(".")
            assert hasattr(importlib.import_module(module), name), entry


def test_the_arguments_on_offer_are_told() -> None:
    text = (DOCS / "tutorials" / "own-parts.md").read_text(encoding="utf-8")
    words = {"dataset": "data set", "meta_optimizer": "outer optimiser"}
    for kind in ("model", "dataset", "learner", "rule", "meta_optimizer"):
        told = text.partition(f"\n| {words.get(kind, kind)} | ")[2].partition(" |")[0]
        assert told.replace("`", "") == registry.OFFERED[kind]


def test_the_options_of_rules_over_objectives_are_told() -> None:
    text = (DOCS / "tutorials" / "objectives.md").read_text(encoding="utf-8")
    for rule in OF_OBJECTIVES:
        options = ", ".join(f"`{name}` {value}" for name, value in rule_options(rule).items())
        assert f"\n| `{rule}` | {options} |\n" in text


def test_pictures_are_drawn(elsewhere: Path) -> None:
    script(DOCS / "scripts" / "plot_explanations.py").main(["", str(elsewhere)])
    config = TrainConfig.of("glyphs")
    accuracies = {"uniform": (0.5, 0.6, 0.7), "agreement": (0.52, 0.58, 0.69)}
    results = {
        rule: [
            Result(Evaluation(np.array([a, a + 0.1]), np.zeros(2, int), "accuracy", "inductive", s), 1.0, 1)
            for s, a in enumerate(values)
        ]
        for rule, values in accuracies.items()
    }  # fmt: skip
    write_results(elsewhere, Comparison(config, (0, 1, 2), 2, ("glyphs",), results))
    script(DOCS / "scripts" / "plot_demo.py").main(
        ["", str(elsewhere), str(elsewhere / "demo.png")]
    )
    drawn = {file.name for file in elsewhere.glob("*.png")}
    assert drawn == {file.name for file in (DOCS / "figures").glob("*.png")}


def test_the_picture_of_no_effect_shows_what_its_text_says() -> None:
    plots = script(DOCS / "scripts" / "plot_explanations.py")
    random = np.random.default_rng(1)
    pairs = [plots.simulated(random) for _ in range(400)]
    seeds, episodes = (
        np.mean([not e.ci95[0] <= 0 <= e.ci95[1] for e in estimates])
        for estimates in zip(*pairs, strict=True)
    )
    assert 0.02 < seeds < 0.09
    assert 0.5 < episodes < 0.65


def pages_of_the_site() -> dict[Path, str]:
    """The site's pages, and where they stand in it."""
    elsewhere = script(DOCS / "scripts" / "check_site.py").ELSEWHERE
    own = {page: page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    return own | {file: place for file, place in elsewhere.items() if file.suffix == ".md"}


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(pages_of_the_site().values())


@pytest.mark.parametrize("page", pages_of_the_site(), ids=ident)
def test_links_lead_to_what_the_site_has(page: Path) -> None:
    elsewhere = script(DOCS / "scripts" / "check_site.py").ELSEWHERE
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (page.parent / link).resolve()
        assert target.is_file(), f"{link} does not exist"
        assert target.is_relative_to(DOCS) or target in elsewhere, f"{link} is not in the site"


def test_a_site_with_faults_is_found_out(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = script(DOCS / "scripts" / "check_site.py")
    monkeypatch.setattr(check, "NAMES", {"m": "m.py"})
    (elsewhere / "m.py").write_text('__all__ = ["a", "b"]\n')
    (elsewhere / "site").mkdir()
    (elsewhere / "site" / "index.html").write_text(
        '<h1 id="m.a">a</h1><a href="index.html#m.a">x</a><a href="#none">x</a><a href="gone.html">'
        'x</a><a href=".">x</a><a href="https://example.org/">x</a>'
        '<script src="https://example.org/x.js"></script><img src="data:,x"><img src="gone.png">'
    )
    assert check.problems(elsewhere / "site") == [
        "index.html: #none has no such anchor",
        "index.html: gone.html does not exist",
        "index.html: . is a folder, which a browser without a server does not open",
        "index.html: loads https://example.org/x.js from a network",
        "index.html: gone.png does not exist",
        "m.b has no entry in the reference",
    ]
