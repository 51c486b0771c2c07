"""The pages of the repository as text, links and code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
GENERATED = {"docs/cli.md", "docs/knobs.md", "docs/template-table.md", "docs/families.md"}
PAGES = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]  # fmt: skip
WRITTEN = [page for page in PAGES if page not in GENERATED]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def text(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def prose(page: str) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", text(page))


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return [body for kind, body in FENCE.findall(text(page)) if kind == language]


def links(page: str) -> list[str]:
    """The targets of a page's links and pictures, without those on other servers."""
    actual = [one or other for one, other in LINK.findall(prose(page))]
    return [link for link in actual if not re.match(r"[a-z]+:", link)]


def anchors(page: str) -> set[str]:
    """The names that a link can point at, one for each heading."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head).lower() for head in heads]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip()) for head in plain}
