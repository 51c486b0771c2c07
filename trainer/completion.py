"""Complete words of `graft` in bash, zsh and fish: commands, options, choices and keys.

    eval "$(graft completion shell=bash)"                        in ~/.bashrc
    eval "$(graft completion shell=zsh)"                         in ~/.zshrc, after compinit
    graft completion shell=fish > ~/.config/fish/completions/graft.fish

line=TEXT prints what can follow a line; the shells ask with it. Hydra's own completion (-sc) knows
neither the commands nor their options, and composes a config for each key press.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
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
    """Return the words that the last, unfinished word of a line can become."""
    from trainer.config import completion

    return completion.candidates(line, options_of)


def options_of(command: str) -> Any:
    """Return the dataclass of a command's options; None if it has none."""
    return getattr(import_module(f"trainer.{command}"), "Options", None)


if __name__ == "__main__":
    exit_with(main)
