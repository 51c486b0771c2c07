"""Rules of CONTRIBUTING.md that a program can check."""

from __future__ import annotations

import ast
import io
import re
import tokenize

import pytest

from tests.conftest import ROOT

PRODUCT = ("adapters", "tasks", "trainer")
# Participles say nothing of the thing that they name.
PARTICIPLES = {"asked", "found", "given", "kept", "made", "said", "told", "took", "wanted"}
ARCHAIC = re.compile(
    r"\b(?:be had|for want of|want of memory|anew|mend(?:s|ed)?|told|beside|whoever|whereupon|hence"
    r"|thence|whence|upon which|thereof|lest|hitherto|goes on|otherwise than)\b",
    re.IGNORECASE,
)
# A docstring starts with none of these: questions, clauses, and an error before what is done.
QUESTIONS = {"How", "What", "When", "Where", "Whether", "Which", "Who", "Why"}
FIRST_WORDS = QUESTIONS | {"If", "Called", "Raises:"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# of a command; the others' limit is below. evaluate is three commands, study has two kinds of words
LINES = {"__main__": 200, "evaluate": 175, "study": 160}
MOST_LINES = 130


def sources(*folders):
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    # two files of tests name the words that they look for
    return [path for path in paths if path.name not in ("test_house_rules.py", "test_pages.py")]


def assigned(tree):
    """(name, line) of each variable, parameter, function and class. The fields of a class are no
    part of it: their names are recorded."""
    fields = {
        statement.target
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        if node in fields:
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno


def participles(text):
    return [f"{line}: {name}" for name, line in assigned(ast.parse(text)) if name in PARTICIPLES]


def participles_of_tests(text):
    """The same of the words that stood for results and expectations."""
    words = {"found", "given", "told", "wanted"}
    return [line for line in participles(text) if line.partition(": ")[2] in words]


def archaic(text):
    """The turns in comments and strings, docstrings and messages included."""
    return [
        f"{token.start[0]}: {match}"
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type in (tokenize.COMMENT, tokenize.STRING)
        for match in ARCHAIC.findall(token.string)
    ]


def first_words(text):
    """Docstrings that do not start with a verb or a noun."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED)]
    first = {node: ((ast.get_docstring(node) or "").split() or [""])[0] for node in nodes}
    return [
        f"{getattr(node, 'lineno', 1)}: {word}"
        for node, word in first.items()
        if word in FIRST_WORDS
    ]


def untyped_options(text):
    """Functions that take the options of a command as a mapping."""
    return [
        f"{node.lineno}: {node.arg}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.arg)
        and node.arg in ("options", "opts")
        and (node.annotation is None or re.match(r"(dict|Mapping)\b", ast.unparse(node.annotation)))
    ]


@pytest.mark.parametrize(
    ("rule", "folders"),
    [
        (participles, (*PRODUCT, "scripts")),
        (participles_of_tests, ("tests",)),
        (archaic, (*PRODUCT, "scripts", "tests")),
        (first_words, (*PRODUCT, "scripts")),
        (untyped_options, PRODUCT),
    ],
)
def test_every_file_keeps_the_rule(rule, folders):
    broken = {
        str(path.relative_to(ROOT)): rule(path.read_text("utf-8")) for path in sources(*folders)
    }
    assert {path: places for path, places in broken.items() if places} == {}


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (participles, "found = 1"),
        (participles, "def told(): pass"),
        (participles, "for wanted in (): pass"),
        (participles_of_tests, "found = made()"),
        (archaic, "# as it cannot be had here"),
        (archaic, '"""Compute it anew."""'),
        (archaic, 'raise ValueError(f"{x} stands beside it")'),
        (first_words, '"""What a row becomes."""'),
        (first_words, 'def f():\n    """Whether a row is kept."""'),
        (first_words, 'def f():\n    """Raises: ValueError"""'),
        (untyped_options, "def f(options: dict[str, Any]): pass"),
        (untyped_options, "def f(options): pass"),
    ],
)
def test_a_rule_notices(rule, text):
    assert len(rule(text)) == 1


def test_files_of_yaml_have_the_words_of_the_field():
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        assert ARCHAIC.findall(path.read_text("utf-8")) == [], path


def test_a_command_is_thin():
    """It reads its arguments, calls a folder and prints."""
    for path in sorted((ROOT / "trainer").glob("*.py")):
        assert len(path.read_text("utf-8").splitlines()) <= LINES.get(path.stem, MOST_LINES), path
