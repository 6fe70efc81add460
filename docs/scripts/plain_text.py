"""Docstrings are plain text with a little Markdown, and this extension of Python-Markdown reads them so.

A formula such as ``<g_i, g_j>`` is text and no HTML tag, and an example that begins with ``>>>`` is code
and no quotation.
"""

from __future__ import annotations

from typing import Any

from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

__all__ = ["PlainText"]


class PlainText(Extension):  # type: ignore[misc]
    """Without raw HTML, and with doctests as blocks of code."""

    def extendMarkdown(self, md: Any) -> None:
        """Register what reads doctests; leave out what reads HTML."""
        md.preprocessors.register(Doctests(md), "doctests", 35)
        for registry, name in ((md.preprocessors, "html_block"), (md.inlinePatterns, "html")):
            if name in registry:
                registry.deregister(name)


class Doctests(Preprocessor):  # type: ignore[misc]
    """Fences around examples; they end with an empty line."""

    def run(self, lines: list[str]) -> list[str]:
        """The lines, with fences."""
        found, indent = [], None
        for line in [*lines, ""]:
            text = line.lstrip()
            if indent is None and text.startswith(">>> "):
                indent = line[: len(line) - len(text)]
                found.append(f"{indent}```pycon")
            elif indent is not None and not text:
                found.append(f"{indent}```")
                indent = None
            found.append(line)
        return found[:-1]
