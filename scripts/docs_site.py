"""MkDocs hook: links from a page to a file outside docs/ work in the site too.

In the repository, docs/speed.md links to ../scripts/bench/results/train.md. The site has no such
folder, so each linked file becomes a page or a download below repository/, and the link follows.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = "repository"  # where files from outside docs/ appear in the site
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    """Add each file of the repository that a page links to, and the files that those link to."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        uri = waiting.pop()
        for target in linked(uri):
            if files.get_file_from_path(target) is None and source(target).is_file():
                files.append(File.generated(config, target, abs_src_path=str(source(target))))
                if target.endswith(".md"):
                    waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links to the files' paths in the site."""
    uri = page.file.src_uri
    here = posixpath.dirname(uri)

    def moved(match: re.Match[str]) -> str:
        if "://" in match[2] or match[2].startswith(("/", "mailto:")):
            return match[0]
        return match[1] + posixpath.relpath(in_site(uri, match[2]), here or ".") + match[3]

    return LINK.sub(moved, markdown)


def linked(uri: str) -> list[str]:
    """Return the files that a page links to, as paths in the site."""
    text = source(uri).read_text("utf-8")
    return [in_site(uri, match[2]) for match in LINK.finditer(text) if "://" not in match[2]]


def source(uri: str) -> Path:
    """Return the file of the repository that is at `uri` in the site."""
    inside, _, rest = uri.partition("/")
    return ROOT / rest if inside == ELSEWHERE else ROOT / "docs" / uri


def in_site(uri: str, link: str) -> str:
    """Return the path in the site of the target of a page's relative link."""
    path = source(uri).parent.joinpath(link).resolve().relative_to(ROOT).as_posix()
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{ELSEWHERE}/{path}"
