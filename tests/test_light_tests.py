"""The tests reach every source file, most of them in `make check`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests import marks
from tests.conftest import ROOT

PACKAGES = ("adapters", "tasks", "trainer")
# Ten times as fast as a parser; what looks like an import within a text does no harm.
IMPORT = re.compile(
    r"^[ \t]*(?:from ([\w.]+) import (\([^)]*\)|[^\n]+)|import ([^\n]+))", re.MULTILINE
)


def module_of(root: Path, source: Path) -> str:
    """The dotted name of a file."""
    return ".".join(source.relative_to(root).with_suffix("").parts)


def sources(root: Path) -> dict[str, Path]:
    """The source files by their dotted names. An __init__.py is imported with its folder."""
    files = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    return {module_of(root, path): path for path in files if path.name != "__init__.py"}


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, those within its functions included."""
    for module, names, modules in IMPORT.findall(path.read_text("utf-8")):
        if module:
            yield module
            yield from (f"{module}.{name}" for name in re.findall(r"\w+", names))
        else:
            yield from re.findall(r"[\w.]+", modules)


def configured(root: Path) -> Iterator[str]:
    """Modules whose classes the files of conf/ name; tests compose and build all of these."""
    for path in (root / "conf").rglob("*.yaml"):
        yield from re.findall(r"_target_: ([\w.]+)\.\w+", path.read_text("utf-8"))


def mirrored(root: Path, source: Path) -> str:
    """The test file of a source file's name: tests/data/test_rows.py of trainer/data/rows.py."""
    folders = source.relative_to(root).parts[:-1]
    if folders[0] == "trainer":
        folders = folders[1:] or ("commands",)
    return "/".join(["tests", *folders, f"test_{source.name}"])


def unreached(root: Path, light: Iterable[str]) -> set[str]:
    """Modules that no test reaches. Light tests reach what they import, what has their name, what a
    file of conf/ names, and whatever these import in turn; the others what they import themselves.
    """
    files, light = sources(root), set(light)
    tests = [*(root / file for file in light), *(root / "tests/toys").glob("*.py")]
    waiting = {name for file in tests for name in imported(file)} | {*configured(root)}
    waiting |= {name for name, file in files.items() if mirrored(root, file) in light}
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in files and name not in reached:
            reached.add(name)
            waiting |= {*imported(files[name])} - reached
    heavy = {name for file in (root / "tests").rglob("*.py") for name in imported(file)}
    return {*files} - reached - heavy


def test_tests_reach_every_source_file(pytestconfig):
    light = pytestconfig.stash[marks.LIGHT]
    written = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    if set(light) != written:
        pytest.skip("only where all tests are collected")
    missed = unreached(ROOT, [file for file, count in light.items() if count])
    assert not missed, f"no test reaches {', '.join(sorted(missed))}: test what is in there"


def test_a_file_is_reached_by_a_test_its_name_a_config_or_another_file(tmp_path):
    for file, text in {
        "tests/data/test_named.py": "",
        "tests/test_one.py": "def f():\n    from trainer.data import direct\n",
        "tests/toys/toy.py": "import trainer.toy\n",
        "tests/test_heavy.py": "import trainer.heavy\n",
        "conf/adapter/a.yaml": "_target_: adapters.configured.Adapter\n",
        "trainer/data/direct.py": "'''Text.'''\nfrom trainer.data import (\n    further,\n)\n",
        "trainer/data/further.py": "'''Text.'''\ndef f(): ...\n",
        "trainer/data/named.py": "'''Text.'''\nx = 1\n",
        "trainer/data/__init__.py": "'''Only text.'''\n",
        "trainer/toy.py": "'''Text.'''\nx = 1\n",
        "trainer/heavy.py": "'''Text.'''\nfrom trainer.data import of_heavy\n",
        "trainer/data/of_heavy.py": "'''Text.'''\nx = 1\n",
        "trainer/command.py": "'''Text.'''\nfrom trainer.data import of_command\n",
        "trainer/data/of_command.py": "'''Text.'''\nx = 1\n",
        "adapters/configured.py": "'''Text.'''\nclass Adapter: ...\n",
        "tasks/alone.py": "'''Text.'''\nx = 1\n",
    }.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    light = ["tests/data/test_named.py", "tests/test_one.py"]
    assert unreached(tmp_path, light) == {
        "tasks.alone",
        "trainer.command",
        "trainer.data.of_command",
        "trainer.data.of_heavy",
    }
