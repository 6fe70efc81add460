"""Check a built site: python docs/scripts/check_site.py site

Every link and anchor leads to something, nothing is loaded from a network, and every public name has an
entry of its own in the reference. Prints what is wrong, a line each; the exit code is then 1.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

_FOLDERS = ("experiments/*.md", "experiments/figures/*.png", "examples/*.*", "examples/plugin/*.*")
ELSEWHERE: dict[Path, str] = {
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "gametalearn" / "engine" / "README.md": "engine.md",
    **{file: file.relative_to(ROOT).as_posix() for part in _FOLDERS for file in ROOT.glob(part)},
}
"""Files of the repository outside of docs/, and where they stand in the site."""

LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
"""What a browser loads by itself, and the attribute that says from where."""

NAMES = {
    "gametalearn": "gametalearn/public.py",
    "gametalearn.bridges": "gametalearn/bridges/__init__.py",
    "gametalearn.bridges.learn2learn": "gametalearn/bridges/learn2learn.py",
    "gametalearn.bridges.torchjd": "gametalearn/bridges/torchjd.py",
    "gametalearn.statistics": "gametalearn/statistics.py",
    "gametalearn.weighting": "gametalearn/weighting/__init__.py",
}
"""Modules whose ``__all__`` is public, and their files."""


@dataclass
class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag has."""
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in LOADED and LOADED[tag] in given and given.get("rel") != "canonical":
            self.loaded.append(given[LOADED[tag]])


def read(site: Path) -> dict[Path, Page]:
    """The pages of a site by file."""
    pages = {}
    for file in sorted(site.rglob("*.html")):
        pages[file.resolve()] = page = Page()
        page.feed(file.read_text(encoding="utf-8"))
    return pages


def problems(site: Path) -> list[str]:
    """What is wrong, a line each."""
    pages, found = read(site), list[str]()
    for file, page in pages.items():
        if file.name == "404.html":  # its links are those of a server's root
            continue
        place = file.relative_to(site.resolve())
        for link in page.links:
            if reason := _dead(file, link, pages):
                found.append(f"{place}: {link} {reason}")
        for link in page.loaded:
            if urlsplit(link).scheme not in ("", "data") or link.startswith("//"):
                found.append(f"{place}: loads {link} from a network")
            elif reason := _dead(file, link, pages):
                found.append(f"{place}: {link} {reason}")
    anchors = set().union(*(page.anchors for page in pages.values()))
    for module, source in NAMES.items():
        for name in public(Path(source)):
            if not anchors & {f"{module}.{name}", f"gametalearn.{name}"}:
                found.append(f"{module}.{name} has no entry in the reference")
    return found


def _dead(file: Path, link: str, pages: dict[Path, Page]) -> str:
    """Why a link leads nowhere; empty if it leads somewhere, or out of the site."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return ""
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if target.is_dir():
        return "is a folder, which a browser without a server does not open"
    if not target.exists():
        return "does not exist"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return "has no such anchor"
    return ""


def public(file: Path) -> list[str]:
    """The names in a module's ``__all__``, without importing it."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{file} has no __all__")


def main(argv: list[str]) -> int:
    """Check, and print; the exit code."""
    site = Path(argv[1])
    found = problems(site)
    print("\n".join(found) or f"{len(read(site))} pages: every link leads somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
