"""The README is short, and its links, like those of all pages, lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.pages import README, ROOT, documents

OTHERS = ("CONTRIBUTING.md", "SECURITY.md")
PAGES = [
    *documents(),
    *(ROOT / name for name in OTHERS),
    *sorted(ROOT.glob("ex*/*.md")),
]
FENCES = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    text = FENCES.sub("", page.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


def dead_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere in the repository."""
    text = FENCES.sub("", page.read_text(encoding="utf-8"))
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two()`\n\n[a](#one-two) [b](#three) [c](page.md#one-two) [d](none.md)\n"
    )
    assert dead_links(page) == ["#three", "none.md"]
