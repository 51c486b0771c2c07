"""The pages: links lead somewhere, names exist, and the form is what CONTRIBUTING.md asks for."""

from __future__ import annotations

import re

import pytest

from scripts import docs
from tests.docs.pages import PAGES, ROOT, WRITTEN, anchors, links, prose, text
from trainer.config import schema

GROUPS = sorted(
    path.name for path in schema.CONF.iterdir() if path.is_dir() and path.name != "hydra"
)
# Options of commands that are called as a group of conf/ is, and names that stand for a user's own.
OTHER_CHOICES = {
    "task": {"speculation"},
    "drafter": {"lookup", "edit", "recycling", "small", "run"},
    "target": {"eval"},  # of graft select
}


def keys(node, prefix):
    """All dotted keys below a table of the schema."""
    for name, child in node.children.items():
        yield f"{prefix}{name}"
        if isinstance(child, schema.Table):
            yield from keys(child, f"{prefix}{name}.")


KEYS = {
    key
    for group in GROUPS
    for choice in schema.options(group)
    for key in keys(schema.load(f"{group}/{choice}"), f"{group}.")
}
KEYS |= set(keys(schema.load("slurm"), "slurm."))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.resolve().is_relative_to(ROOT), link
        assert target.is_file(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link


def test_every_page_is_in_the_navigation():
    nav = set(re.findall(r"([\w./-]+\.md)$", text("mkdocs.yml"), re.MULTILINE))
    assert {f"docs/{page}" for page in nav} == {page for page in PAGES if page.startswith("docs/")}


@pytest.mark.parametrize("page", WRITTEN)
def test_settings_that_pages_name_exist(page):
    key = rf"(?<![\w./-])((?:{'|'.join(GROUPS)}|slurm)(?:\.[a-z]\w*)+)(?![\w./*-])"
    named = {name for name in re.findall(key, text(page)) if not name.endswith((".yaml", ".md"))}
    modules = {name for name in named if (ROOT / f"{name.replace('.', '/')}.py").exists()}
    assert named - modules <= KEYS, sorted(named - modules - KEYS)


@pytest.mark.parametrize("page", WRITTEN)
def test_choices_that_pages_name_exist(page):
    for group, choice in re.findall(
        rf"(?<![\w./-])({'|'.join(GROUPS)})=([a-z][a-z0-9_]*)(?![\w.(:])", text(page)
    ):
        assert choice in {
            *schema.options(group),
            *OTHER_CHOICES.get(group, ()),
            "null",
            "rank_one",
            "mine",
        }, f"{group}={choice}"


@pytest.mark.parametrize("page", WRITTEN)
def test_commands_that_pages_name_exist(page):
    used = set(re.findall(r"(?:^|`)graft ([a-z]+)(?=[ `\n])", text(page), re.MULTILINE))
    assert used <= {*docs.commands()}, page


def test_the_readme_lists_every_command():
    assert set(re.findall(r"^\| `graft (\w+)`", text("README.md"), re.MULTILINE)) == set(
        docs.commands()
    )


def test_the_readme_fits_a_screen_or_two():
    assert len(text("README.md").splitlines()) <= 130


@pytest.mark.parametrize("page", WRITTEN)
def test_lines_cells_and_paragraphs_are_short(page):
    for line in prose(page).splitlines():
        shown = re.sub(r"\]\([^)]*\)", "]", line)
        assert len(shown) <= 100, line
        if line.startswith("|"):
            for cell in re.split(r"(?<!\\)\|", shown):
                assert len(cell.split()) <= 15, cell
    for paragraph in re.split(r"\n\s*\n", prose(page)):
        lines = paragraph.strip().splitlines()
        if lines and not re.match(r"[-|#!>\d]|    ", lines[0]):
            assert len(lines) <= 5, paragraph


@pytest.mark.parametrize("page", [page for page in WRITTEN if page != "CONTRIBUTING.md"])
def test_pages_use_the_words_of_the_field(page):
    """CONTRIBUTING.md has the words to use instead."""
    shown = re.sub(r"\]\([^)]*\)", "]", prose(page)).lower()
    assert (
        re.findall(r"\b(?:beside|anew|mend|be had|told|go on|goes on|for want of)\b", shown) == []
    )


@pytest.mark.parametrize("page", PAGES)
def test_no_paths_of_a_machine(page):
    assert not re.search(r"/(root|home|work|tmp)/", text(page)), page
