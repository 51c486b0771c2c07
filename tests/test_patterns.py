"""Every regular expression of ours takes a time that grows with its input, not with its square:
what a stranger sends must not stop a run."""

from __future__ import annotations

import ast
import importlib
import re
from re import _parser as parser  # type: ignore[attr-defined]

import pytest

from tests.conftest import ROOT
from tests.toys.growth import LIMIT, SIZE, assert_linear, seconds

CALLS = {"compile", "match", "search", "fullmatch", "sub", "split", "findall", "finditer"}
# Patterns that are put together at run time, and why they are harmless.
COMPUTED = {
    "adapters/targets.py": "the user's own, on names of layers",
    "adapters/peft_targets.py": "the user's own, on names of layers",
    "adapters/reached.py": "with the name of a layer, on the source of a class",
    "trainer/config/compose.py": "with the name of a setting of ours",
    "trainer/config/forbidden.py": "with the name of a setting of ours",
    "trainer/exporting/mtp_layers.py": "with a number",
    "trainer/data/rendering.py": "of fixed texts",
}
CONSTANT = (
    ast.Constant,
    ast.JoinedStr,
    ast.FormattedValue,
    ast.Name,
    ast.Load,
    ast.BinOp,
    ast.Add,
)
OF_OURS = {
    "scripts/docs_site.py",
    "trainer/config/schema.py",
    "trainer/config/conflicts.py",
}  # conf/, docs/
WORDS = {"CATEGORY_DIGIT": "7", "CATEGORY_SPACE": " ", "CATEGORY_WORD": "a"}
OTHERS = {"CATEGORY_NOT_DIGIT": "a", "CATEGORY_NOT_SPACE": "a", "CATEGORY_NOT_WORD": "-"}


def patterns():
    """(place, compiled pattern) of each call of re, in the code of the program and the scripts."""
    for package in ("trainer", "tasks", "adapters", "scripts"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                function = node.func if isinstance(node, ast.Call) else None
                if not (
                    isinstance(function, ast.Attribute)
                    and isinstance(function.value, ast.Name)
                    and function.value.id == "re"
                    and function.attr in CALLS
                ):
                    continue
                relative = str(path.relative_to(ROOT))
                yield relative, node, computed(relative, node)


def methods(path, node):
    """How a pattern is used: the call of re itself, or the methods of the compiled pattern."""
    if node.func.attr != "compile":
        return {node.func.attr}
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    name = next(
        (
            ast.unparse(n.targets[0])
            for n in ast.walk(tree)
            if (isinstance(n, ast.Assign) and n.value is node)
            or (isinstance(n, ast.Assign) and ast.unparse(n.value) == ast.unparse(node))
        ),
        ast.unparse(node),
    )
    used = {n.attr for n in ast.walk(tree)
            if isinstance(n, ast.Attribute) and ast.unparse(n.value) == name} & CALLS  # fmt: skip
    return used or CALLS - {"compile"}


def computed(path, node):
    """The pattern of a call, None if it needs more than the module's own constants."""
    constant = all(isinstance(n, CONSTANT) for n in ast.walk(node.args[0]))
    names = {n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)}
    module = vars(importlib.import_module(path[:-3].replace("/", "."))) if names else {}
    if not constant or not names <= module.keys():
        return None
    flags = [ast.unparse(a) for a in [*node.args[1:], *(k.value for k in node.keywords)]]
    flags = [text for text in flags if text.startswith("re.")]
    pattern = eval(ast.unparse(node.args[0]), dict(module))
    return re.compile(pattern, eval(flags[0]) if flags else 0)


def character(items):
    """A character of a class."""
    negated = items[0][0].name == "NEGATE"
    if not negated:
        return one(items[0])
    excluded = re.compile("[" + "".join(map(written, items[1:])) + "]")
    return next(c for c in "a7 -_.xZ(\n" if not excluded.match(c))


def written(item):
    name, value = item[0].name, item[1]
    if name == "CATEGORY":
        kind = value.name.removeprefix("CATEGORY_")
        letter = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}[kind.removeprefix("NOT_")]
        return "\\" + (letter.upper() if kind.startswith("NOT_") else letter)
    if name == "RANGE":
        return f"{re.escape(chr(value[0]))}-{re.escape(chr(value[1]))}"
    return re.escape(chr(value))


def one(item):
    """A text that one item of a parsed pattern matches."""
    name, value = item[0].name, item[1]
    if name == "LITERAL":
        return chr(value)
    if name == "NOT_LITERAL":
        return "a" if chr(value) != "a" else "b"
    if name == "ANY":
        return "a"
    if name == "IN":
        return character(value)
    if name == "RANGE":
        return chr(value[0])
    if name == "CATEGORY":
        return (WORDS | OTHERS)[value.name]
    if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return text(value[2]) * max(1, value[0])
    if name == "SUBPATTERN":
        return text(value[-1])
    if name == "ATOMIC_GROUP":
        return text(value)
    if name == "BRANCH":
        return text(value[1][0])
    return ""  # a place, or what is looked at and not taken


def text(items):
    return "".join(map(one, items))


def beginnings(items):
    """Texts that a pattern begins to match and does not finish, for each of its parts."""
    before = ""
    for item in items:
        name, value = item[0].name, item[1]
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            inner = text(value[2])
            yield from (before + part for part in beginnings(value[2]))
            if inner:
                yield before + inner * (SIZE // len(inner))
        elif name == "SUBPATTERN":
            yield from (before + part for part in beginnings(value[-1]))
        elif name == "BRANCH":
            for branch in value[1]:
                yield from (before + part for part in beginnings(branch))
        elif name in ("ASSERT", "ASSERT_NOT"):
            yield from (before + part for part in beginnings(value[1]))
        before += one(item)
        yield before


def attacks(pattern):
    """Texts of SIZE characters on which a pattern has to try much: what it begins to match, once
    more and once more, and one repeated part with an end that does not fit."""
    seen = set()
    for part in beginnings(parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE)):
        for whole in (part * (SIZE // max(1, len(part))), part[:SIZE]):
            for attack in (whole, whole + "\x00", whole + "!"):
                if attack and attack not in seen:
                    seen.add(attack)
                    yield attack


ALL = [(path, node, pattern) for path, node, pattern in patterns()]


def test_every_computed_pattern_is_listed():
    computed = [path for path, _, pattern in ALL if pattern is None and path[:7] != "scripts"]
    assert sorted(computed) == sorted(COMPUTED)
    assert len(ALL) > 60


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "pattern", "called"),
    sorted(
        {
            (path, pattern, tuple(sorted(methods(path, node))))
            for path, node, pattern in ALL
            if pattern is not None and path not in OF_OURS
        },
        key=str,
    ),
    ids=lambda value: str(getattr(value, "pattern", value))[:40],
)
def test_a_pattern_is_linear(path, pattern, called):
    for attack in attacks(pattern):
        for name in called:
            # these two stop at no place of their own
            method = getattr(pattern, {"sub": "findall", "finditer": "findall"}.get(name, name))
            assert not grows(method, attack), (path, pattern.pattern, name, attack[:60])


def grows(method, attack):
    """Whether four times a text takes more than eight times as long, where a square takes sixteen
    times. What takes less than 3 ms is not looked at: a fast processor needs 8 for a square."""
    part = attack[: len(attack) // 4] + attack[-1]
    if seconds(method, part) > LIMIT:  # it may be worse than a square
        return True
    return seconds(method, attack) > 0.003 and all(
        seconds(method, attack) > 8 * seconds(method, part) for _ in range(3)
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "quadratic",
    [r"eyJ[\w-]{10,}\.[\w-]{10,}", r"CREATE\s+TABLE\s+(\[[^\]]+\])\(", r"\s+x", r"(a|b|ab)*c$"],
)
def test_the_attacks_find_what_is_not(quadratic):
    pattern = re.compile(quadratic)
    # noise of the machine hides a ratio of times, and does not make one: try more than once
    assert any(grows(pattern.search, attack) for _ in range(4) for attack in attacks(pattern))


def redacted(value):
    from trainer.config.secrets import redact

    return redact(value)


@pytest.mark.parametrize(
    "part", ["eyJ", "eyJhbGciOiJIUzI1NiJ9.", "hf_", "sk-", "://a:", "-----BEGIN A ", "gh", "xoxb-"]
)
def test_redaction_is_linear(part):
    assert_linear(redacted, lambda size: part * (size // len(part)))


def test_a_web_token_is_redacted_wherever_it_stands():
    token = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
    for before, after in (("", ""), ("Bearer ", "!"), ("a=", "\n"), ("x.", " y"), ("token_", "")):
        assert token not in redacted(before + token + after)
        assert redacted(before + token + after).endswith("[redacted]" + after)
    for harmless in ("eyJ", "a.b.c", "aaaaaaaaaaaaaaa.bbbbbbbbbbbbbbb.cccccccccccc", "eyJx.y.z"):
        assert redacted(harmless) == harmless
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvQ\n-----END PRIVATE KEY-----"
    assert redacted(f"a {key} b") == "a [redacted] b"
    assert redacted("a -----BEGIN RSA PRIVATE KEY----- b") == "a [redacted] b"
