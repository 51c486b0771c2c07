"""Complete words of `graft` in bash, zsh and fish: commands, options, groups, choices and keys.

    eval "$(graft completion shell=bash)"                        in ~/.bashrc
    eval "$(graft completion shell=zsh)"                         in ~/.zshrc, after compinit
    graft completion shell=fish > ~/.config/fish/completions/graft.fish

line=TEXT prints what can follow a line; the shells ask with it. Hydra's own completion (-sc) knows
neither the commands nor their options, and composes a config for each key press.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from trainer.config.options import exit_with, option, parse
from trainer.config.shown import say

SCRIPTS = {
    "bash": r"""
_graft() {
    local line="${COMP_LINE:0:COMP_POINT}" word IFS=$'\n'
    word="${line##*[[:space:]]}"
    COMPREPLY=($(graft completion line="$line" 2>/dev/null))
    # readline completes what follows the last = alone
    if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
    fi
    if [[ "${COMPREPLY[0]}" == *[=./] ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o default -F _graft graft
""",
    "zsh": r"""
_graft() {
    local -a words
    words=("${(@f)$(graft completion line="${BUFFER[1,CURSOR]}" 2>/dev/null)}")
    if [[ -n "${words[1]}" ]]; then compadd -Q -S '' -- $words; else _files; fi
}
compdef _graft graft
""",
    "fish": r"""
complete -c graft -f -a '(graft completion line=(commandline -cp | string collect) 2>/dev/null)'
""",
}


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    shell: Literal["bash", "zsh", "fish"] | None = option("print the script for a shell", None)
    line: str | None = option("print what can follow a line", None, value="TEXT")

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        if (self.shell is None) == (self.line is None):
            yield "give either shell=bash|zsh|fish or line=TEXT"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft completion")
    if options.shell is not None:
        say(SCRIPTS[options.shell].strip())
    else:
        for word in candidates(options.line or ""):
            say(word)
    return 0


def candidates(line: str) -> list[str]:
    """Return the words that the last, unfinished word of a line can become. `graft` is its first
    word. A word that ends in = or . goes on."""
    words = line.split(" ")
    earlier, last = [word for word in words[1:-1] if word], words[-1]
    first = earlier[0] if earlier else ""
    if not earlier:
        return _starting(last, [*commands(), *_settings(last, earlier)])
    if first in commands():
        return _starting(last, _options(first, last, earlier))
    return _starting(last, _settings(last, earlier))


def commands() -> list[str]:
    """Return the commands, and help."""
    here = Path(__file__).parent
    return sorted({path.stem for path in here.glob("[a-z]*.py")} - {"run"} | {"help"})


def _starting(word: str, names: Any) -> list[str]:
    return [name for name in dict.fromkeys(names) if name.startswith(word) and name != word]


def _options(command: str, word: str, earlier: list[str]) -> Iterator[str]:
    """Yield `KEY=` and `KEY=VALUE` of a command's options, and of the settings that it takes."""
    if command == "help":
        yield from commands()
        return
    kind = getattr(import_module(f"trainer.{command}"), "Options", None)
    if kind is None:
        return
    hints = typing.get_type_hints(kind)
    earlier_keys = {each.partition("=")[0] for each in earlier}
    for field in dataclasses.fields(kind):
        if "takes" in field.metadata:
            if not field.metadata.get("places"):
                allowed = field.metadata["takes"]
                yield from (w for w in _settings(word, earlier) if allowed(w.partition("=")[0]))
            continue
        key = field.metadata.get("key") or field.name
        if key in earlier_keys:
            continue
        yield f"{key}="
        if word.startswith(f"{key}="):
            yield from (f"{key}={value}" for value in _values(hints[field.name]))


def _values(hint: Any) -> list[str]:
    from trainer.config.options import choices_of, members

    return [*choices_of(hint), *(["true", "false"] if bool in members(hint) else [])]


def _settings(word: str, earlier: list[str]) -> Iterator[str]:
    """Yield groups with their choices, and keys of conf/ with theirs, as far as `word` goes."""
    from trainer.config import schema
    from trainer.config.groups import default_choices
    from trainer.config.overrides import groups

    plus = word[: len(word) - len(word.lstrip("+~"))]
    name, equals, _ = word.lstrip("+~").partition("=")
    known = groups()
    if equals and name in known:
        yield from (f"{plus}{name}={choice}" for choice in schema.options(name))
        return
    chosen: dict[str, Any] = default_choices() | {
        key.lstrip("+"): value
        for key, _, value in (each.partition("=") for each in earlier)
        if key.lstrip("+") in known
    }
    table, prefix = schema.load("config"), plus
    *parents, leaf = name.split(".")
    if parents and parents[0] in known:
        choice = chosen.get(parents[0])
        choices = [choice] if choice in schema.options(parents[0]) else schema.options(parents[0])
        tables = [schema.load(f"{parents[0]}/{each}") for each in choices]
        children = {key: child for each in tables for key, child in each.children.items()}
        table, prefix = schema.Table(children, None, ""), f"{plus}{parents[0]}."
        parents = parents[1:]
    for parent in parents:
        child = table.children.get(parent)
        if not isinstance(child, schema.Table):
            return
        table, prefix = child, f"{prefix}{parent}."
    if equals:
        yield from (f"{prefix}{leaf}={value}" for value in _choices_of(table.children.get(leaf)))
        return
    for key, child in table.children.items():
        yield f"{prefix}{key}" + ("." if isinstance(child, schema.Table) else "=")
    if prefix == plus:
        for group in known:
            yield f"{plus}{group}="
            if group != "experiment":
                yield f"{plus}{group}."


def _choices_of(leaf: Any) -> list[str]:
    """The literal values of a setting, from its comment."""
    from trainer.config import json_schema, schema

    if leaf is None or not hasattr(leaf, "type"):
        return []
    values = []
    for part in map(json_schema.alternative, schema.alternatives(leaf.type)):
        values += [str(each) for each in part.get("enum", [])[:1]]
        values += ["true", "false"] if part.get("type") == "boolean" else []
        values += ["null"] if part.get("type") == "null" else []
    return values


if __name__ == "__main__":
    exit_with(main)
