"""Pages of documentation as tests read them: their fenced blocks, and programs made of those.

A page is Markdown. Its Python blocks are one program, from the first to the last. What that program
needs beside them (a model that the reader has, smaller numbers than a reader would take) stands in
comments that the page does not show::

    <!-- test
    model = torch.nn.Linear(2, 1)
    -->
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["DOCS", "README", "ROOT", "Block", "blocks", "documents", "programs", "run_python"]

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"

HIDDEN = "test"
"""The language of what a page does not show."""

_BLOCK = re.compile(
    r"^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$|^<!-- test\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
_INCLUDED = re.compile(r'^--8<-- "([^"]+)"\n', re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or a hidden one.

    Attributes:
        page: the page's file.
        line: of the page, on which the code begins, from 1.
        language: what stands after the fence; ``"test"`` for a hidden block.
        code: the lines, with those of a file that the block includes.
    """

    page: Path
    line: int
    language: str
    code: str


def documents() -> list[Path]:
    """The README and all pages of ``docs/``."""
    return [README, *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path, *languages: str, heading: str = "") -> list[Block]:
    """The blocks of a page, of a section of it, or those of some languages.

    Args:
        page: its file.
        languages: such as ``"python"``; none of them stands for all.
        heading: a line such as ``"## In Python"``, after which the section begins.
    """
    text = page.read_text(encoding="utf-8")
    start, end = 0, len(text)
    if heading:
        start = text.find(f"\n{heading}\n") + 1
        assert start, f"{page} has no heading '{heading}'"
        level = heading.partition(" ")[0]
        following = re.compile(rf"^#{{1,{len(level)}}} ", re.MULTILINE)
        after = following.search(text, start + len(heading))
        end = after.start() if after else end
    found = []
    for match in _BLOCK.finditer(text, start, end):
        shown = match["code"] is not None
        language, part = (match["language"], "code") if shown else (HIDDEN, "hidden")
        code = _INCLUDED.sub(lambda m: (ROOT / m[1]).read_text(encoding="utf-8"), match[part])
        line = text.count("\n", 0, match.start(part)) + 1
        if not languages or language in languages:
            found.append(Block(page, line, language, code))
    return found


def run_python(found: list[Block], names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run Python blocks one after the other; errors name the page and its line."""
    names = {"__name__": "page"} if names is None else names
    for block in found:
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, str(block.page), "exec"), names)
    return names


def programs(block: Block) -> list[list[str]]:
    """The words of each simple command of a shell block, without comments and redirections."""
    found: list[list[str]] = []
    for line in block.code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        skip = False
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                found += [words] if words else []
                words = []
            elif set(word) <= set("<>"):
                skip = True
            elif skip:
                skip = False
            else:
                words.append(word)
    return found
