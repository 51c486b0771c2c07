"""The commands of the program and its help text, read from the files and not imported."""

from __future__ import annotations

import ast
import difflib
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in HERE.glob("[a-z]*.py") if path.stem != "run")
CONFIG = """\
A config is composed from the files of conf/: one file of each group, then single values.

    adapter=rosa               the group's choice, conf/adapter/rosa.yaml
    optimizer.lr=1e-4          one value; the files of conf/ name and explain all of them
    experiment=quickstart      conf/experiment/quickstart.yaml, which sets several of both
    --config-dir=FOLDER        your own experiments, FOLDER/experiment/NAME.yaml
    --multirun seed=0,1,2      one run for each value
    --cfg job                  print the composed config and stop

--hydra-help shows Hydra's own options. The groups of conf/ and their choices:
"""


def no_such_command(word: str) -> str:
    """Return the message for a word that is no command."""
    if word in ("run", "train"):
        return f"{word}: training needs no command. Use: graft experiment=NAME"
    close = difflib.get_close_matches(word, NAMES, n=1, cutoff=0.6)
    hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(NAMES)}."
    return f"{word}: there is no such command. {hint}"


def help_text(usage: str) -> str:
    """Return the text of `graft --help`. Importing the commands would take seconds."""
    from trainer.config import schema
    from trainer.config.overrides import groups

    trees = {name: ast.parse((HERE / f"{name}.py").read_text("utf-8")) for name in NAMES}
    commands = [
        f"    {name:<10} {(ast.get_docstring(tree) or '').partition(chr(10))[0]}"
        for name, tree in trees.items()
    ]
    choices = [f"    {name:<10} {', '.join(schema.options(name))}" for name in groups()]
    return "\n".join(
        [
            usage,
            "Commands; graft COMMAND --help shows the options:\n",
            *commands,
            "",
            CONFIG,
            *choices,
        ]
    )


def version() -> str:
    """Return the installed version of Graft."""
    try:
        return metadata.version("graft-trainer")
    except metadata.PackageNotFoundError:
        return "(not installed)"
