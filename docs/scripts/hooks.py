"""What ``mkdocs build`` does beside its plugins.

Pages that lie elsewhere in the repository join the site, and links to them follow; hidden test blocks
leave it; and names of the library in backquotes, in pages and docstrings alike, become links to their
entries in the reference. It is imported with the root of the repository on Python's path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from docs.scripts.check_site import DOCS, ELSEWHERE, ROOT, public
from docs.scripts.plain_text import PlainText
from gametalearn.cli import parser_of  # imports nothing that the library requires
from gametalearn.flags import subcommands

__all__ = ["on_config", "on_files", "on_page_content", "on_page_markdown"]

PUBLIC = set(public(ROOT / "gametalearn" / "public.py"))

_HIDDEN = re.compile(r"^<!-- test\n.*?^-->\n", re.MULTILINE | re.DOTALL)
_HELP = re.compile(r"^<!-- help (\w+) -->$", re.MULTILINE)
_LINK = re.compile(r"\]\((\.\./[^)#\s]+)")
_KEPT = re.compile(r"(<(pre|a|autoref|h\d)\b.*?</\2>)", re.DOTALL)
_NAME = re.compile(r"<code>([A-Za-z_]\w*(?:\.\w+)*)</code>")


def on_config(config: Any) -> None:
    """Read docstrings as plain text."""
    config.markdown_extensions.append(PlainText())


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere."""
    for file, place in ELSEWHERE.items():
        files.append(File.generated(config, place, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Without what only tests read (tests/support/pages.py), with links and help as the site has them."""
    here = DOCS / Path(page.file.src_uri).parent  # in the site; the file itself may lie elsewhere
    folder = Path(page.file.abs_src_path).parent

    def moved(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        place = DOCS / ELSEWHERE[target] if target in ELSEWHERE else target
        return f"]({os.path.relpath(place, here)}" if place.is_relative_to(DOCS) else link[0]

    return _HELP.sub(_help, _LINK.sub(moved, _HIDDEN.sub("", markdown)))


def _help(command: re.Match[str]) -> str:
    return f"```text\n{subcommands(parser_of())[command[1]].format_help()}```"


def on_page_content(html: str, **_: Any) -> str:
    """Link names of the library, except in code, headings and links."""
    parts, end = [], 0
    for kept in _KEPT.finditer(html):
        parts += [_NAME.sub(_linked, html[end : kept.start()]), kept[0]]
        end = kept.end()
    return "".join([*parts, _NAME.sub(_linked, html[end:])])


def _linked(found: re.Match[str]) -> str:
    name = found[1]
    first = name.partition(".")[0]
    if first != "gametalearn" and first not in PUBLIC:
        return found[0]
    full = name if first == "gametalearn" else f"gametalearn.{name}"
    return f'<autoref identifier="{full}" optional>{found[0]}</autoref>'
